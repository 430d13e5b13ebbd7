# SPDX-License-Identifier: Apache-2.0
"""Detect the GPUs of this machine, and choose the configuration that was published for them."""

from __future__ import annotations

import collections
import fnmatch
from dataclasses import dataclass
from typing import List, Mapping, Optional

from mxresnet.errors import UserError
from mxresnet.launch.processes import capture_output, find_program
from mxresnet.launch.system_config import systems_text

CPU_SYSTEM = "CPU_digits"


@dataclass(frozen=True)
class GpuSystem:
    """A set of GPUs that has a configuration."""

    count: int
    name_pattern: str
    memory_gib: int
    system: str


# The first match is used.
GPU_SYSTEMS = (
    GpuSystem(8, "*A100*", 80, "DGXA100"),
    GpuSystem(8, "*A100*", 40, "A100-40GB_8gpu"),
    GpuSystem(4, "*A100*PCI[eE]*", 80, "A100-PCIe-80GB_4gpu"),
    GpuSystem(4, "*A100*", 80, "A100-80GB_4gpu"),
    GpuSystem(4, "*A100*", 40, "A100-40GB_4gpu"),
    GpuSystem(2, "* A30", 24, "A30_1x2x204"),
    GpuSystem(2, "A30", 24, "A30_1x2x204"),
    # Two RTX A5000 were submitted to v2.1 with the settings of two A30.
    GpuSystem(2, "*RTX A5000", 24, "A30_1x2x204"),
    GpuSystem(8, "*V100*", 32, "V100-32GB_8gpu"),
    GpuSystem(8, "*V100*", 16, "V100-16GB_8gpu"),
    GpuSystem(4, "* T4", 15, "T4_4gpu"),
    GpuSystem(4, "* T4", 16, "T4_4gpu"),
)


@dataclass(frozen=True)
class Choice:
    """A system, and a description of the hardware for which it was chosen."""

    system: str
    hardware: str


def choose_system(environ: Mapping[str, str]) -> Choice:
    """Choose the configuration for the GPUs of this machine, or for its CPU if it has none.

    Args:
        environ: Its CUDA_VISIBLE_DEVICES selects the GPUs; with SETUP_DEVICE=cpu none is used.

    Raises:
        UserError: The GPUs cannot be queried or have no configuration, or the job has several
            machines.
    """
    if environ.get("SETUP_DEVICE") == "cpu":
        return Choice(CPU_SYSTEM, "SETUP_DEVICE=cpu")
    gpus = _query_gpus(environ)
    if not gpus:
        return Choice(CPU_SYSTEM, "no GPU")
    counts = sorted(collections.Counter(gpus).items())
    hardware = "; ".join(f"{count} x {gpu} MiB" for gpu, count in counts)
    system = _system_for(gpus)
    if system is None:
        raise UserError(
            f"no configuration is known for the GPUs of this machine ({hardware}): "
            f"set DGXSYSTEM to one of: {systems_text()}"
        )
    if _on_several_machines(environ):
        raise UserError(
            "this job has several machines, and the hardware of only one of them can be detected: "
            f"set DGXSYSTEM to one of: {systems_text()}"
        )
    return Choice(system, hardware)


def _query_gpus(environ: Mapping[str, str]) -> List[str]:
    """Return "name, memory in MiB" of each visible GPU of this machine."""
    visible = environ.get("CUDA_VISIBLE_DEVICES", "all")
    program = find_program("nvidia-smi", environ)
    if visible in ("", "-1", "NoDevFiles") or program is None:
        return []
    if visible == "all":
        return _ask(program, [], environ)
    found = _ask(program, ["-i", visible], environ)
    if not found and _ask(program, [], environ):  # such as parts of GPUs (MIG)
        raise _query_error(f"it knows no GPU of CUDA_VISIBLE_DEVICES={visible}")
    return found


def _ask(program: str, only: List[str], environ: Mapping[str, str]) -> List[str]:
    """Return what nvidia-smi prints, a line for each GPU; none if it finds none."""
    try:
        done = capture_output(
            [program, *only, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"],
            environ,
        )
    except OSError as error:
        raise _query_error(f"{program}: {error.strerror}") from error
    lines = done.stdout.splitlines()
    if done.returncode == 0:
        return lines
    if "No devices were found" in done.stdout:
        return []
    raise _query_error(" ".join(lines))


def _query_error(reason: str) -> UserError:
    return UserError(
        f"nvidia-smi fails ({reason}), so the hardware is not known: "
        f"set DGXSYSTEM to one of: {systems_text()}"
    )


def _system_for(gpus: List[str]) -> Optional[str]:
    """Return the system with these GPUs ("name, memory in MiB" each), or None."""
    names = {gpu.partition(", ")[0] for gpu in gpus}
    memories = [gpu.partition(", ")[2] for gpu in gpus]
    if len(names) != 1 or not all(memory.isdecimal() for memory in memories):
        return None
    (name,) = names
    # The smallest memory, rounded up: drivers reserve some of it.
    memory_gib = (min(map(int, memories)) + 1023) // 1024
    for known in GPU_SYSTEMS:
        if (len(gpus), memory_gib) == (known.count, known.memory_gib) and fnmatch.fnmatchcase(
            name, known.name_pattern
        ):
            return known.system
    return None


def _on_several_machines(environ: Mapping[str, str]) -> bool:
    ranks = environ.get("OMPI_COMM_WORLD_SIZE") or "1"
    ranks_here = environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or "1"
    return ranks != ranks_here or (environ.get("SLURM_JOB_NUM_NODES") or "1") != "1"
