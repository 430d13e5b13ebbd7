# SPDX-License-Identifier: Apache-2.0
"""Check whether the batch-norm operators can be used, load them, and make symbols of them."""

from __future__ import annotations

import ctypes
import functools
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, Callable, Dict, Optional, Tuple

from mxresnet.model.cudnn_bn import build

# The operator names in MXNet: batch norm alone, with ReLU, with addition and ReLU. MXNet's own
# BatchNorm cannot replace the first: it describes NHWC data to cuDNN as N * H * W images of one
# pixel.
OPERATORS = ("mxresnet_batch_norm", "mxresnet_batch_norm_relu", "mxresnet_batch_norm_add_relu")
EVALUATION_OPERATORS = tuple(f"{name}_inference" for name in OPERATORS)
# The first use of a GPU by a process takes seconds, or a minute if cuDNN is on a network file
# system.
SELF_TEST_SECONDS = 180
DEFAULT_EPSILON, DEFAULT_MOMENTUM = 1e-5, 0.9

# Environment variables of MXNet with which these operators would compute wrong results, because its
# interface for external operators does not pass them on: (whether a value is unsupported, why).
UNSUPPORTED_ENV: Dict[str, Tuple[Callable[[str], bool], str]] = {
    "MXNET_EXEC_INPLACE_GRAD_SUM_CAP": (
        lambda value: value.isdigit() and int(value) < 8,
        "below its default, 8, MXNet may ask operators to add to a gradient, which these overwrite",
    ),
    "MXNET_BACKWARD_DO_MIRROR": (
        lambda value: value not in ("", "0"),
        "forward would run twice, and these operators update the running statistics in it",
    ),
}


class UnavailableError(Exception):
    """The operators cannot be used on a device; the message is the reason."""


def batch_norm(
    x: Any,
    name: str,
    channels: int,
    eps: float = DEFAULT_EPSILON,
    momentum: float = DEFAULT_MOMENTUM,
    layout: str = "NHWC",
    relu: bool = False,
    addend: Any = None,
    training: bool = True,
) -> Any:
    """Return the symbol of a batch norm with optional addition and ReLU.

    Without an addend it computes batch_norm(x) or relu(batch_norm(x)); with one it computes
    relu(batch_norm(x) + addend). Its parameters and running statistics are float32, and are named
    and initialized as those of mx.sym.BatchNorm(name=name, fix_gamma=False). The running variance
    is the unbiased one.

    Call unavailable_reason() or check_and_load() first: they load the operators.

    Args:
        x: Symbol of the input: float16 in the GPU library, float32 in the CPU library.
        name: Name of the layer and prefix of its variables.
        channels: Number of channels of x.
        eps: Added to the variance.
        momentum: Share of the old value in a new running statistic.
        layout: NHWC or NCHW; the GPU library has NHWC only.
        relu: Whether to apply ReLU, where there is no addend.
        addend: Symbol of the same shape and type as x, or None.
        training: True to normalize with the statistics of x and to update the running statistics
            in every forward pass; False to normalize with the running statistics, without a
            backward pass.
    """
    import mxnet as mx

    inputs = [
        x,
        mx.sym.var(f"{name}_gamma", shape=(channels,)),
        mx.sym.var(f"{name}_beta", shape=(channels,)),
        mx.sym.var(f"{name}_moving_mean", shape=(channels,), init=mx.init.Zero()),
        mx.sym.var(f"{name}_moving_var", shape=(channels,), init=mx.init.One()),
    ]
    if addend is not None:
        inputs.append(addend)
    names = OPERATORS if training else EVALUATION_OPERATORS
    operator = getattr(mx.sym, names[2 if addend is not None else int(relu)])
    return operator(*inputs, name=name, eps=eps, momentum=momentum, layout=layout)


@functools.lru_cache(maxsize=None)
def unavailable_reason(device: Any, batch_size: int = 0) -> Optional[str]:
    """Load the operators for a device and return None, or return why they cannot be used on it.

    A self-test runs first, in a subprocess, so that a crash or hang of the library does not affect
    the caller. It takes seconds, and needs device memory while it runs. The result is cached. Call
    this while the process is small, because it forks. The result may differ between ranks, which
    must agree on one before they build the network.

    Args:
        device: MXNet context.
        batch_size: If not 0, also test ResNet-50's largest and smallest feature maps with this
            number of images: cuDNN selects its kernels by size.
    """
    try:
        _check_build_metadata(device)
        _self_test_in_subprocess(device, batch_size)
        _load(device)
    except UnavailableError as error:
        return str(error)
    return None


def check_and_load(device: Any) -> None:
    """Load the operators for a device without the self-test.

    Raises:
        UnavailableError: The operators cannot be used on the device.
    """
    _check_build_metadata(device)
    _load(device)


def device_kind(device: Any) -> str:
    """Return which library an MXNet context needs: "gpu" or "cpu"."""
    return "gpu" if device.device_type == "gpu" else "cpu"


def _check_build_metadata(device: Any) -> None:
    """Raise UnavailableError if the library was built for another MXNet, device or environment."""
    import mxnet as mx

    kind = device_kind(device)
    path = build.library_path(kind)
    rebuild = f"run {build.COMMAND} --{kind}"
    if not path.is_file():
        raise UnavailableError(f"{path.name} is not built: {rebuild}")
    metadata = build.read_build_metadata(path)
    if metadata is None or metadata["kind"] != kind:
        raise UnavailableError(f"{path} was not built by {build.COMMAND} --{kind}: {rebuild}")
    if metadata["mxnet"] != mx.__version__:
        raise UnavailableError(
            f"{path.name} was built for MXNet {metadata['mxnet']} and this is {mx.__version__}: "
            f"{rebuild}"
        )
    if metadata["sources"] != build.source_hash():
        raise UnavailableError(f"{path.name} was built from other sources: {rebuild}")
    for name, (unsupported, why) in UNSUPPORTED_ENV.items():
        value = os.environ.get(name, "")
        if unsupported(value):
            raise UnavailableError(f"{name}={value} is set: {why}")


def _self_test_in_subprocess(device: Any, batch_size: int) -> None:
    """Raise UnavailableError if the self-test, run by another process, fails on the device."""
    project = pathlib.Path(__file__).resolve().parents[3]
    command = [sys.executable, "-m", "mxresnet.model.cudnn_bn", "test"]
    command += ["--batch-size", str(batch_size)]
    command += ["--gpu", str(device.device_id)] if device_kind(device) == "gpu" else ["--cpu"]
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            command,
            cwd=project,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            status = child.wait(SELF_TEST_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()  # without waiting: a process that hangs in a driver may not end
            raise UnavailableError(
                f"its self-test did not end within {SELF_TEST_SECONDS} s"
            ) from None
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines() or ["no message"]
    if status < 0:
        raise UnavailableError(f"its self-test was killed by signal {-status}")
    if status == 1:
        raise UnavailableError(lines[-1])
    if status > 1:
        raise UnavailableError(f"its self-test ended with status {status}: {lines[-1]}")


# A process can load only one of the libraries, because both define the same operators.
_loaded_kind: Optional[str] = None


def _load(device: Any) -> None:
    """Load the library for a device into this process's MXNet.

    Raises:
        UnavailableError: The library cannot be loaded.
    """
    global _loaded_kind
    import mxnet as mx

    kind = device_kind(device)
    path = build.library_path(kind)
    operators = (*OPERATORS, *EVALUATION_OPERATORS)
    if not all(hasattr(mx.sym, name) for name in operators):
        try:
            # The error of this call, unlike MXNet's, names a dependency that is missing.
            ctypes.CDLL(str(path), mode=os.RTLD_LAZY | os.RTLD_LOCAL)
            mx.library.load(str(path), verbose=False)
        except (OSError, mx.MXNetError) as error:
            raise UnavailableError(
                f"{path.name} cannot be loaded: {short_message(error)}"
            ) from error
        _loaded_kind = kind
    if kind != _loaded_kind:
        raise UnavailableError(f"this process has loaded the library for a {_loaded_kind} already")
    missing = [name for name in operators if not hasattr(mx.sym, name)]
    if missing:
        raise UnavailableError(f"{path.name} lacks the operator {missing[0]}")


def short_message(error: Exception) -> str:
    """Return the line of an error message that contains the reason.

    The other lines are MXNet's source location, a stack trace and all earlier messages of external
    operators.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    own = [
        line[line.index("mxresnet_batch_norm") :]
        for line in lines
        if "operators.cc[" in line and "mxresnet_batch_norm" in line
    ]
    return (own or lines or [type(error).__name__])[-1][:300]
