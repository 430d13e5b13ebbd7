# SPDX-License-Identifier: Apache-2.0
"""Run a rank under Nsight Systems (nsys), where PROFILE or NVTX_FLAG asks for it.

    python -m mxresnet.launch.nsys command [arguments]

run_and_time.sh puts this in front of the command of each rank. The variables, the ranks and the
names of the reports in LOGDIR are those of NVIDIA's v2.1 run_and_time.sh:

    PROFILE=1                  profile local rank 0 of the first machine, between the start and the
                               stop of CUDA's profiler
    PROFILE_ALL_LOCAL_RANKS=1  with PROFILE: every rank of that machine
    NVTX_FLAG=1                profile every rank, from start to end

The flags --profile and --nvtx-flag do not start nsys.
"""

from __future__ import annotations

import os
import sys
from typing import List, Mapping, Optional, Sequence

from mxresnet.errors import ExitStatus, UserError
from mxresnet.launch.processes import find_program, replace_process
from mxresnet.launch.run_log import DEFAULT_LOGDIR
from mxresnet.launch.terminal import print_to_stderr

_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "SLURM_PROCID")
_LOCAL_RANK_VARIABLES = ("OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "LOCAL_RANK")


def is_wanted(environ: Mapping[str, str]) -> bool:
    """Return whether any rank of a run is profiled."""
    return _is_on(environ, "PROFILE") or _is_on(environ, "NVTX_FLAG")


def check(environ: Mapping[str, str]) -> None:
    """Raise UserError if a rank is to be profiled, and nsys is not found."""
    if is_wanted(environ) and find_program("nsys", environ) is None:
        name = "PROFILE" if _is_on(environ, "PROFILE") else "NVTX_FLAG"
        raise UserError(
            f"{name}={environ[name]} starts the ranks under nsys, which is not found on PATH: "
            f"install Nsight Systems, or give the flag --{name.lower().replace('_', '-')} "
            f"{environ[name]}, which does not start it"
        )


def command_prefix(environ: Mapping[str, str]) -> List[str]:
    """Return the nsys command to put in front of the command of this rank; empty: none."""
    logdir = environ.get("LOGDIR") or DEFAULT_LOGDIR
    rank, local_rank = _number(environ, _RANK_VARIABLES), _number(environ, _LOCAL_RANK_VARIABLES)
    if _is_on(environ, "PROFILE"):
        # The ranks of a machine are consecutive.
        on_first_machine = rank is not None and rank == local_rank
        if not on_first_machine or (local_rank and not _is_on(environ, "PROFILE_ALL_LOCAL_RANKS")):
            return []
        name = f"{environ.get('NETWORK', '')}_b{environ.get('BATCHSIZE', '')}_%h_{local_rank}_0"
        return [
            *("nsys", "profile", "--capture-range=cudaProfilerApi", "--capture-range-end=stop"),
            *("--sample=cpu", "--trace=cuda,nvtx", "--force-overwrite=true", "--export=sqlite"),
            f"--output={logdir}/{name}.nsys-rep",
        ]
    if _is_on(environ, "NVTX_FLAG"):
        sizes = "x".join(environ.get(name) or "1" for name in ("DGXNNODES", "DGXNGPU", "BATCHSIZE"))
        parts = ["image_classification_mxnet", sizes, environ.get("DATESTAMP", "")]
        parts += [str(rank or 0), environ.get("SYNTH_DATA") or "0"]
        return [
            *("nsys", "profile", "--sample=none", "--cpuctxsw=none", "--trace=cuda,nvtx"),
            *("--force-overwrite=true", f"--output={logdir}/{'_'.join(parts)}.nsys-rep"),
        ]
    return []


def _is_on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "") not in ("", "0")


def _number(environ: Mapping[str, str], names: Sequence[str]) -> Optional[int]:
    """Return the first of some variables that is a number."""
    for name in names:
        if environ.get(name, "").isdecimal():
            return int(environ[name])
    return None


def main() -> int:
    """Replace this process with the rank's command, under nsys if this rank is profiled."""
    command = sys.argv[1:]
    try:
        prefix = command_prefix(os.environ)
        if prefix:
            check(os.environ)
        replace_process([*prefix, *command], dict(os.environ))
    except UserError as error:
        print_to_stderr(f"run_and_time.sh: {error}")
        return ExitStatus.USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
