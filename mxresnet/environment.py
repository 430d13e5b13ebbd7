# SPDX-License-Identifier: Apache-2.0
"""Check what libraries read from the environment, and explain the errors that it causes.

MXNet ends the process, without an exception, when one of its variables is not a number. Python
imports what it finds in PYTHONPATH before the packages of the environment, and before its own
modules. This module imports the standard library only, and before all others.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import site
import sys
import traceback
from typing import Callable, Dict, List, Mapping, Optional, Tuple

from mxresnet.errors import UserError

_PROJECT_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PACKAGES = ("mxnet", "numpy", "horovod", "mpi4py", "nvidia", "mlperf_logging", "cv2", "requests")
MAX_THREADS = 1024
_MAX_INT = 2**31 - 1
# What a rank needs before it allocates anything for the network (measured: 2.8 GiB, 20 files).
_GIB = 2**30
_LIMITS = (
    (resource.RLIMIT_AS, "ulimit -v", 2.5 * _GIB, 1024, "address space"),
    (resource.RLIMIT_DATA, "ulimit -d", 0.5 * _GIB, 1024, "memory"),
    (resource.RLIMIT_STACK, "ulimit -s", 2**20, 1024, "stack"),
    (resource.RLIMIT_NOFILE, "ulimit -n", 64, 1, "open files"),
)

_TEMPORARY_BYTES = 32 * 2**20  # for the shared memory files of mpirun and the ranks

# Returns whether a value is valid, and the description of valid values.
Rule = Tuple[Callable[[str], bool], str]


def _integer(low: int, high: int) -> Rule:
    def is_valid(text: str) -> bool:
        return bool(re.fullmatch("[+-]?[0-9]{1,18}", text, re.ASCII)) and low <= int(text) <= high

    return is_valid, f"a whole number from {low} to {high}"


def _number(low: float, high: float) -> Rule:
    def is_valid(text: str) -> bool:
        number = re.fullmatch(r"[0-9]{1,18}(\.[0-9]*)?", text, re.ASCII)
        return bool(number) and low <= float(text) <= high

    return is_valid, f"a number from {low:g} to {high:g}"


def _choice(*values: str) -> Rule:
    return (lambda text: text in values), f"one of {', '.join(values)}"


_THREADS = _integer(1, MAX_THREADS)
_RULES: Dict[str, Rule] = {
    "OMP_NUM_THREADS": _THREADS,
    "MXNET_ENGINE_TYPE": _choice("NaiveEngine", "ThreadedEngine", "ThreadedEnginePerDevice"),
    # The multi-tensor kernels of MXNet hold 60 tensors, and do not check the number.
    "MXNET_OPTIMIZER_AGGREGATION_SIZE": _integer(1, 60),
    "HOROVOD_CYCLE_TIME": _number(0, 10_000),
    "HOROVOD_FUSION_THRESHOLD": _integer(0, 2**40),
    "HOROVOD_CACHE_CAPACITY": _integer(0, _MAX_INT),
    "HOROVOD_NUM_NCCL_STREAMS": _integer(1, 64),
}
_MXNET_THREADS = re.compile(r"MXNET_\w+_(NTHREADS|MAX_THREADS|NUM_THREADS)")
# Variables of MXNet that are numbers or, for some of them, switches.
_MXNET_NUMBERS = re.compile(
    r"MXNET_(EXEC_\w+|DISABLE_\w+|ENABLE_\w+|EXTENDED_\w+|\w+_VERBOSE(_LOGGING)?|\w+_COPY"
    "|BACKWARD_DO_MIRROR|CPU_PARALLEL_SIZE|CUDA_ALLOW_TENSOR_CORE|ELIMINATE_COMMON_EXPR"
    r"|CUDNN_(AUTOTUNE_DEFAULT|WARN_ON_IGNORED_FLAGS|NHWC_\w+)|GPU_MEM_POOL_RESERVE"
    "|MKLDNN_(CACHE_NUM|DEBUG|ENABLED)|PROFILER_(AUTOSTART|MODE)|SAFE_ACCUMULATION|USE_FUSION"
    "|UPDATE_(ON_KVSTORE|AGGREGATION_SIZE))"
)


def check_environment(environ: Mapping[str, str]) -> None:
    """Raise UserError if libraries cannot work with these variables or with the limits."""
    for name, value in sorted(environ.items()):
        rule = _rule(name)
        if value and rule and not rule[0](value):
            raise UserError(f"variable {name}={value!r} must be {rule[1]}: change or unset it")
    if sys.flags.optimize > 1:
        raise UserError(
            "PYTHONOPTIMIZE (python -OO) removes docstrings, which packages need: unset it"
        )
    for limit, name, needed, unit, meaning in _LIMITS:
        found, _ = resource.getrlimit(limit)
        if found != resource.RLIM_INFINITY and found < needed:
            raise UserError(
                f"{name} {found // unit} is too small ({meaning}): a rank needs at least "
                f"{-(-int(needed) // unit)}: raise the limit of this shell or container"
            )


def _rule(name: str) -> Optional[Rule]:
    """Return the rule for a variable of a library, or None when any value is accepted."""
    if name in _RULES:
        return _RULES[name]
    if _MXNET_THREADS.fullmatch(name):
        return _integer(0, MAX_THREADS)
    if _MXNET_NUMBERS.fullmatch(name):
        is_number, text = _integer(-1, _MAX_INT)
        return (lambda value: value in ("true", "false") or is_number(value)), text
    return None


def check_temporary_folder(environ: Mapping[str, str]) -> None:
    """Raise UserError if mpirun cannot write its files; it may hang when their disk is full."""
    folder = next(filter(None, map(environ.get, ("TMPDIR", "TEMP", "TMP"))), "/tmp")
    try:
        usage = os.statvfs(folder)
        problem = None if os.access(folder, os.W_OK | os.X_OK) else "cannot be written"
    except OSError as error:
        problem = f"cannot be used ({error.strerror})"
    else:
        free = usage.f_bavail * usage.f_frsize
        if free < _TEMPORARY_BYTES:
            problem = f"has {free >> 20} MiB of free space, less than {_TEMPORARY_BYTES >> 20}"
    if problem:
        raise UserError(f"TMPDIR={folder} {problem}: free some space or name another folder")


def check_python_path(environ: Mapping[str, str]) -> None:
    """Raise UserError if a folder in PYTHONPATH hides a module of Python or of the environment."""
    library = os.path.dirname(os.__file__)
    for folder in environ.get("PYTHONPATH", "").split(os.pathsep):
        if not os.path.isdir(folder) or os.path.realpath(folder) in map(
            os.path.realpath, [library, _PROJECT_FOLDER, *_package_folders()]
        ):
            continue
        for name in _module_names(folder):
            hides_python = name in _module_names(library) or name in sys.builtin_module_names
            if hides_python or (
                name in _PACKAGES and any(name in _module_names(f) for f in _package_folders())
            ):
                raise UserError(
                    f"PYTHONPATH={environ['PYTHONPATH']}: the module {name} in {folder} hides that "
                    f"of {'Python' if hides_python else 'the environment'}: unset PYTHONPATH"
                )


def _package_folders() -> List[str]:
    return [folder for folder in site.getsitepackages() if os.path.isdir(folder)]


def _module_names(folder: str) -> List[str]:
    """Return the names of the modules and packages in a folder, sorted."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return []
    names = []
    for entry in entries:
        stem, extension = os.path.splitext(entry.name)
        if extension in (".py", ".so"):
            names.append(stem.partition(".")[0])
        elif stem.isidentifier() and entry.is_dir() and os.path.exists(f"{entry.path}/__init__.py"):
            names.append(stem)
    return names


def explain(error: BaseException) -> Optional[str]:
    """Return in one sentence what the environment lacks, or None for another cause.

    Args:
        error: the exception that ended the run or an import.
    """
    text = str(error)
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"too many open files: ulimit -n {limit} is too small: raise it"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk of {error.filename or 'a file'}: free some or set TMPDIR"
    if isinstance(error, OSError) and text.startswith("libcuda.so.1:"):
        return (
            "this environment is for GPUs, and the NVIDIA driver's library libcuda.so.1 is not "
            "found: start the container with GPUs (docker run --gpus all, nvidia.com/gpu), or make "
            "an environment for the CPU (SETUP_DEVICE=cpu ./setup_env.sh)"
        )
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(text):
        return f"out of memory ({_last_line(text)}): use a smaller --batch-size, or raise the limit"
    if "Resource temporarily unavailable" in text:
        return (
            f"no more threads can be started ({_last_line(text)}): see ulimit -u, OMP_NUM_THREADS"
        )
    if isinstance(error, ImportError) and not (error.name or "").startswith("mxresnet"):
        frames = traceback.extract_tb(error.__traceback__)
        place = frames[-1].filename if frames else "unknown"
        return (
            f"the environment is damaged: {_last_line(text)} (imported by {place}): make it again "
            "with ./setup_env.sh, and unset PYTHONPATH and LD_LIBRARY_PATH"
        )
    return None


_OUT_OF_MEMORY = re.compile(
    "bad_alloc|Failed to allocate|Cannot allocate memory|out of memory|failed to map segment"
)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no details"
