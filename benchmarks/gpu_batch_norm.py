# SPDX-License-Identifier: Apache-2.0
"""Check and time the GPU batch norms of mxresnet/model/cudnn_bn/csrc, without MXNet.

    python benchmarks/gpu_batch_norm.py [--batch-size 256] [--rounds 20] [--checks-only]
        [--sanitize] [--cuda DIR]
    python benchmarks/gpu_batch_norm.py --cpu    run the checks on the C++ library for CPUs

It needs an NVIDIA GPU, PyTorch for it, numpy, g++, and cuDNN 8 or 9 with its headers (cuDNN 9 still
has the functions). PyTorch's wheels contain cuDNN. The headers of CUDA, of the version that PyTorch
uses, come from a CUDA toolkit or NVIDIA's wheels.

It builds batch_norm_cudnn.cc, which MXNet's operators call, as a library. It compares forward,
backward, running statistics and evaluation with numpy in float64 on many sizes, and reports whether
a second run returns the same bits. Then it times each batch norm of ResNet-50 in turn with
PyTorch's batch_norm, add and relu (NHWC, float16) and with a copy. --sanitize runs the checks under
compute-sanitizer.

This has not been run on a GPU yet. The compilation for a GPU, and the checks with --cpu, have been.
"""

import argparse
import ctypes
import pathlib
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from batch_norm_library import GpuMemory, HostMemory  # noqa: E402
from batch_norm_reference import run_checks  # noqa: E402
from batch_norm_timing import run_timing  # noqa: E402

from mxresnet.errors import UserError  # noqa: E402
from mxresnet.model.cudnn_bn import build  # noqa: E402

SANITIZERS = (
    # PyTorch queries features that a GPU may not have, which would be reported as API errors.
    ["memcheck", "--report-api-errors", "no"],
    ["racecheck"],
    ["initcheck"],
)


def build_library(kind, cuda_folders, target):
    """Build the C interface without MXNet's operators.

    Args:
        kind: "cpu" or "gpu".
        cuda_folders: Folders to search first for CUDA and cuDNN; PyTorch's wheels are next.
        target: Path of the library.
    """
    if kind == "cpu":
        build.compile_library([build.SOURCES / "batch_norm_cpu.cc"], target, [])
        return
    wheels = [path for path in sys.path if (pathlib.Path(path) / "nvidia" / "cudnn").is_dir()]
    cuda = build.CudaFiles([*cuda_folders, *wheels])
    flags = [*cuda.flags, *cuda.libraries]
    build.compile_library([build.SOURCES / "batch_norm_cudnn.cc"], target, flags)


def load_library(path):
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UserError(
            f"{error}: the CUDA and cuDNN that were found differ from PyTorch's; pass the right "
            "folders with --cuda DIR"
        ) from error


def import_torch():
    """Return the module torch, with CUDA initialized.

    Raises:
        UserError: PyTorch is not installed or finds no GPU.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            "PyTorch is not installed, and this benchmark needs it for GPU memory and as a "
            "comparison: install it, or run only the checks with --cpu"
        ) from None
    if not torch.cuda.is_available():
        raise UserError(
            "PyTorch finds no NVIDIA GPU: run this on a machine with one, or run only the checks "
            "with --cpu"
        )
    torch.cuda.init()
    torch.zeros(1, device="cuda")
    return torch


def sanitize(cuda_folders):
    """Run the small checks under compute-sanitizer; return the largest exit status."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path="/usr/local/cuda/bin"
    )
    if not sanitizer:
        raise UserError(
            "compute-sanitizer is not installed: it is part of the CUDA toolkit (apt-get install "
            "cuda-sanitizer-11-8)"
        )
    checks = [sys.executable, __file__, "--checks-only", "--small"]
    for folder in cuda_folders:
        checks += ["--cuda", folder]
    return max(
        subprocess.run([sanitizer, "--error-exitcode", "9", "--tool", *tool, *checks]).returncode
        for tool in SANITIZERS
    )


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--cpu", action="store_true", help="check the C++ library for CPUs: no GPU, no timing"
    )
    parser.add_argument("--checks-only", action="store_true", help="no timing")
    parser.add_argument("--small", action="store_true", help="leave out the large sizes")
    parser.add_argument(
        "--sanitize", action="store_true", help="run the small checks under compute-sanitizer"
    )
    parser.add_argument(
        "--cuda",
        action="append",
        default=[],
        metavar="DIR",
        help="folder to search first for CUDA and cuDNN; may be repeated",
    )
    parser.add_argument(
        "--library", help="use this library with batch_norm.h's functions, do not build one"
    )
    return parser.parse_args()


def main():
    """Run the command line; return 0 if all results are right, 1 if not, 2 if it cannot run."""
    options = parse_arguments()
    try:
        torch = None if options.cpu else import_torch()
        if options.sanitize:
            return sanitize(options.cuda)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(options.library or f"{folder}/libbatch_norm.so")
            if not options.library:
                build_library("cpu" if options.cpu else "gpu", options.cuda, path)
            library = load_library(path.resolve())
            memory = HostMemory() if options.cpu else GpuMemory(torch, library)
            failures = run_checks(library, memory, options.small or options.cpu)
            if not (options.cpu or options.checks_only):
                run_timing(torch, library, memory, options.batch_size, options.rounds)
        return 1 if failures else 0
    except UserError as error:
        print(f"gpu_batch_norm.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
