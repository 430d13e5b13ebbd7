# SPDX-License-Identifier: Apache-2.0
"""The parts of gpu.sh: what each proves, its command, its time limit, what it needs."""

import functools
import pathlib
import subprocess
import sys
from dataclasses import dataclass
from typing import Callable, List, Optional

from training_variants import VARIANTS, Variant

from mxresnet.model.cudnn_bn import build

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Compute capabilities that the public GPU package of MXNet has machine code for.
MXNET_CAPABILITIES = (5.0, 8.6)
MIN_OWN_CAPABILITY = 7.0  # cuDNN's fused batch norms need the instructions of Volta
QUERY_SECONDS = 120  # an import, from a cold disk
# What no part proves, for the summary.
NEVER_PROVEN = (
    "a whole training run to the target accuracy",
    "several machines, and more than two GPUs",
    "NVIDIA's container and its fused operators",
)


@dataclass(frozen=True)
class Part:
    """A command that proves something.

    Attributes:
        name: name of its output file, and its name in the summary.
        proves: what it proves, for the summary.
        command: the command.
        limit_seconds: its time limit.
        obstacle: returns why it cannot run here, or None.
    """

    name: str
    proves: str
    command: List[str]
    limit_seconds: int
    obstacle: Callable[[], Optional[str]]


def _succeeds(code: str) -> bool:
    """Return whether another process can run some code: an import may crash or hang."""
    try:
        return not subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=QUERY_SECONDS,
        ).returncode
    except subprocess.TimeoutExpired:
        return False


@functools.lru_cache(maxsize=None)
def is_importable(module: str) -> bool:
    """Return whether a module can be imported."""
    return _succeeds(f"import {module}")


@functools.lru_cache(maxsize=None)
def mxnet_finds_gpu() -> bool:
    """Return whether an MXNet with CUDA is installed and finds a GPU."""
    return _succeeds("import mxresnet, mxnet; assert mxnet.context.num_gpus()")


def without(*modules: str) -> Callable[[], Optional[str]]:
    """Return an obstacle: modules that are not installed."""

    def missing() -> Optional[str]:
        names = [name for name in modules if not is_importable(name)]
        return f"{', '.join(names)} cannot be imported" if names else None

    return missing


def no_cuda_11(folder: pathlib.Path) -> Optional[str]:
    """Return the obstacle of the parts that need cuDNN 8: a folder that lacks it, or PyTorch."""
    if not (folder / "nvidia" / "cudnn").is_dir():
        wheels = " ".join(build.WHEELS)
        return f"{folder} lacks cuDNN 8: pip install --target {folder} --no-deps {wheels}"
    return without("torch")()


def runs_mxnet(capability: float) -> bool:
    """Return whether public MXNet has machine code for a compute capability."""
    return MXNET_CAPABILITIES[0] <= capability <= MXNET_CAPABILITIES[1]


def no_mxnet_for(capability: float) -> Optional[str]:
    """Return the obstacle of the parts that use MXNet on a GPU."""
    if not runs_mxnet(capability):
        return f"public MXNet has no code for compute capability {capability}"
    return None if mxnet_finds_gpu() else "no MXNet with CUDA is installed: run ./setup_env.sh"


def _script(name: str, *arguments: str) -> List[str]:
    return [sys.executable, str(ROOT / "benchmarks" / name), *arguments]


def kernel_parts(cuda: pathlib.Path) -> List[Part]:
    """Return the parts that need no MXNet."""
    with_cuda_11 = ["--cuda", str(cuda)]
    records = cuda / "records"
    return [
        Part(
            "kernels",
            "batch norms against float64 and PyTorch, cuDNN of PyTorch",
            _script("gpu_batch_norm.py"),
            300,
            without("torch", "numpy"),
        ),
        Part(
            "kernels-cudnn8",
            "the same with cuDNN 8, which MXNet uses",
            _script("gpu_batch_norm.py", *with_cuda_11),
            240,
            lambda: no_cuda_11(cuda),
        ),
        Part(
            "memory",
            "no wrong access to memory (compute-sanitizer)",
            _script("gpu_batch_norm.py", *with_cuda_11, "--sanitize"),
            150,
            lambda: no_cuda_11(cuda),
        ),
        Part(
            "input",
            "DALI's graph on the GPU against the CPU's: pixels and speed",
            _script(
                *("input.py", "--gpu", "--batch", "64", "--rounds", "5"),
                *("--records", str(records)),
            ),
            120,
            lambda: (
                without("nvidia.dali")()
                or (None if records.is_dir() else f"{records} is missing: see --help")
            ),
        ),
    ]


def training_parts(capability: float) -> List[Part]:
    """Return the parts that train 100 steps: each precision, layout and set of operators."""
    parts = []
    for name, variant in VARIANTS.items():
        if "gpu" not in variant.devices:
            continue
        operators = "this project's batch norms" if variant.own_batch_norms else "public operators"
        parts.append(
            Part(
                name,
                f"100 steps and an evaluation against float64: {variant.dtype}, "
                f"{variant.layout}, {operators}",
                _script("gpu_training.py", name),
                150 if variant.own_batch_norms else 60,
                lambda variant=variant: no_mxnet_for(capability) or _too_old(variant, capability),
            )
        )
    return parts


def _too_old(variant: Variant, capability: float) -> Optional[str]:
    if variant.own_batch_norms and capability < MIN_OWN_CAPABILITY:
        return f"cuDNN's fused batch norms need compute capability {MIN_OWN_CAPABILITY}"
    return None


def mxnet_parts(capability: float, gpus: int) -> List[Part]:
    """Return the parts that use MXNet, in the order of worth."""

    def no_second_gpu() -> Optional[str]:
        return no_mxnet_for(capability) or (None if gpus > 1 else "there is one GPU only")

    own, *others = training_parts(capability)
    return [
        Part(
            "operators",
            "batch norms inside MXNet against its own operators",
            [
                *(sys.executable, "-m", "mxresnet.model.cudnn_bn", "test"),
                *("--gpu", "0", "--batch-size", "256"),
            ],
            150,
            lambda: no_mxnet_for(capability),
        ),
        own,
        Part(
            "speed",
            "images/s of ResNet-50 as published; with two GPUs also their scaling",
            _script("gpu_speed.py", "--ranks", "1", *(["2"] if gpus > 1 else [])),
            130 * min(gpus, 2),
            lambda: no_mxnet_for(capability),
        ),
        Part(
            "two-gpus",
            "averages over NCCL are exact, and two GPUs keep the same weights",
            _script("gpu_ranks.py"),
            120,
            no_second_gpu,
        ),
        *others,
    ]


def make_parts(capability: float, gpus: int, cuda: pathlib.Path) -> List[Part]:
    """Return the parts, in the order in which they run.

    Where MXNet runs, what it does comes first: the kernels alone prove less.

    Args:
        capability: Compute capability of GPU 0.
        gpus: Number of GPUs.
        cuda: Folder with cuDNN 8, CUDA 11 and records.
    """
    with_mxnet, kernels = mxnet_parts(capability, gpus), kernel_parts(cuda)
    return [*with_mxnet, *kernels] if runs_mxnet(capability) else [*kernels, *with_mxnet]
