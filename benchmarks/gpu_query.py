# SPDX-License-Identifier: Apache-2.0
"""The GPUs of this machine, as nvidia-smi describes them."""

import shutil
import subprocess
from dataclasses import dataclass

from mxresnet.errors import UserError

FIELDS = "name,compute_cap,driver_version,memory.total"
TIMEOUT_SECONDS = 60  # a driver that hangs


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    capability: float
    driver: str
    memory: str

    @property
    def memory_gib(self):
        """Return the memory in GiB, rounded up: drivers reserve some of it."""
        return (int(self.memory.split()[0]) + 1023) // 1024


def query_gpus(environ):
    """Return the GPUs that CUDA would use, in nvidia-smi's order.

    Args:
        environ: Its CUDA_VISIBLE_DEVICES selects the GPUs.

    Raises:
        UserError: There is none, or nvidia-smi cannot describe them.
    """
    program = shutil.which("nvidia-smi", path=environ.get("PATH"))
    if not program:
        raise UserError("nvidia-smi is not installed: run this on a machine with an NVIDIA GPU")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    command = [program, f"--query-gpu={FIELDS}", "--format=csv,noheader"]
    if visible is not None:
        if visible in ("", "-1", "NoDevFiles"):
            raise UserError(f"CUDA_VISIBLE_DEVICES={visible} hides every GPU: unset it")
        command += ["-i", visible]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"nvidia-smi has not ended in {TIMEOUT_SECONDS} s: its driver hangs; restart it"
        ) from None
    lines = done.stdout.strip().splitlines()
    if "No devices" in done.stdout or (not done.returncode and not lines):
        raise UserError("nvidia-smi lists no GPU: run this on a machine with one")
    if done.returncode:
        raise UserError(f"nvidia-smi fails with status {done.returncode}: {done.stdout.strip()}")
    return [_parse(line) for line in lines]


def _parse(line):
    """Return the GPU that a line of nvidia-smi describes."""
    values = [value.strip() for value in line.split(",")]
    try:
        name, capability, driver, memory = values
        gpu = Gpu(name, float(capability), driver, memory)
        gpu.memory_gib  # noqa: B018 (raises an error if it is not a number)
    except (ValueError, IndexError):
        raise UserError(f"nvidia-smi describes a GPU as {line!r}, not as {FIELDS}") from None
    return gpu
