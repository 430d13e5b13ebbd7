# SPDX-License-Identifier: Apache-2.0
"""Our own batch-norm operators for public MXNet (mxresnet/model/cudnn_bn/csrc): whether they can be used here, and the symbols they make.

    python -m mxresnet.model.cudnn_bn build --gpu | --cpu      make the library that belongs to the installed MXNet
    python -m mxresnet.model.cudnn_bn test --gpu [N] | --cpu   load it, and compare its operators with MXNet's own

The GPU library is for training on float16, channel last. The CPU library (float32) is how everything but cuDNN's kernels is
tested; it is slower than MXNet's own operators.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from mxresnet.errors import UserError
from mxresnet.model.cudnn_bn import build as extension_build

# What MXNet is asked for, with and without an addend. Stock BatchNorm cannot take the place of the first one: it describes
# channel-last data to cuDNN as N * H * W images of one pixel.
OPERATORS = ("mxresnet_batch_norm", "mxresnet_batch_norm_relu", "mxresnet_batch_norm_add_relu")
# A first use of a GPU by a new process takes seconds, or a minute where cuDNN comes over a network file system.
SELF_TEST_SECONDS = 180
PR_SET_PDEATHSIG = 1  # Linux's <sys/prctl.h>
_EPSILON, _MOMENTUM = 1e-5, 0.9
_SIZES = (
    (112, 64),
    (56, 256),
    (7, 2048),
)  # pixels a side and channels of ResNet-50's first, largest and last batch norms
# What MXNet can be told and the interface of its extensions does not pass on: variable, which values, what would go wrong.
_CANNOT = {
    "MXNET_EXEC_INPLACE_GRAD_SUM_CAP": (
        lambda text: text.isdigit() and int(text) < 8,
        "below its default, 8, a gradient may have to be added to, and its operators would overwrite it",
    ),
    "MXNET_BACKWARD_DO_MIRROR": (
        lambda text: text not in ("", "0"),
        "forward would run twice, and its operators count running statistics in it",
    ),
}


def batch_norm(
    x: Any,
    name: str,
    channels: int,
    eps: float = _EPSILON,
    momentum: float = _MOMENTUM,
    layout: str = "NHWC",
    relu: bool = False,
    addend: Any = None,
) -> Any:
    """batch_norm(x), relu(batch_norm(x)), or with an addend, of x's shape, relu(batch_norm(x) + addend), for training only.

    Its arguments and auxiliary states are float32, named and initialized as those of mx.sym.BatchNorm(name=name,
    fix_gamma=False). The running variance is the unbiased one. Call unavailable_reason() first: the device decides what is computed.
    """
    import mxnet as mx

    parameters = [mx.sym.var(f"{name}_{part}", shape=(channels,)) for part in ("gamma", "beta")]
    statistics = [
        mx.sym.var(f"{name}_moving_mean", shape=(channels,), init=mx.init.Zero()),
        mx.sym.var(f"{name}_moving_var", shape=(channels,), init=mx.init.One()),
    ]
    inputs = [x, *parameters, *statistics] + ([] if addend is None else [addend])
    operator = getattr(mx.sym, OPERATORS[int(relu) if addend is None else 2])
    return operator(*inputs, name=name, eps=eps, momentum=momentum, layout=layout)[0]


@functools.lru_cache(maxsize=None)
def unavailable_reason(device: Any, batch_size: int = 0) -> Optional[str]:
    """Return None when the operators can be used on an MXNet context, which loads them; else why not. With a batch
    size they are tried on the largest and smallest images of ResNet-50 too: cuDNN chooses its kernels by the size.

    A crash or a hang of the library cannot reach the caller: another process has tried it on this device before. That takes
    seconds, and memory of the device for as long; the answer is kept. Call it before there is much to fork. Ranks may get
    different answers: agree on one before building a network.
    """
    reason = _unfit(device) or _tried_elsewhere(device, batch_size)
    return reason or _load(device) or None


def _kind(device: Any) -> str:
    return "gpu" if device.device_type == "gpu" else "cpu"


def _unfit(device: Any) -> str:
    """Why the library's file cannot be right, from what it says of itself."""
    import mxnet as mx

    path = extension_build.library(_kind(device))
    if not path.is_file():
        return f"{path.name} is not built ({extension_build.COMMAND} --{_kind(device)})"
    facts = extension_build.read_facts(path)
    if not facts or facts["kind"] != _kind(device):
        return f"{path} was not made by {extension_build.COMMAND}"
    if facts["mxnet"] != mx.__version__:
        return f"{path.name} was built for MXNet {facts['mxnet']} and this is {mx.__version__} ({extension_build.COMMAND} --{_kind(device)})"
    if facts["sources"] != extension_build.source_hash():
        return (
            f"{path.name} is older than its sources ({extension_build.COMMAND} --{_kind(device)})"
        )
    return next(
        (
            f"{name}={os.environ[name]}: {why}"
            for name, (wrong, why) in _CANNOT.items()
            if wrong(os.environ.get(name, ""))
        ),
        "",
    )


def _tried_elsewhere(device: Any, batch_size: int) -> str:
    """Why the self-test failed on the device in a process of its own."""
    where = ["--gpu", str(device.device_id)] if _kind(device) == "gpu" else ["--cpu"]
    root = pathlib.Path(__file__).resolve().parents[3]
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "mxresnet.model.cudnn_bn",
                "test",
                "--batch-size",
                str(batch_size),
                *where,
            ],
            cwd=root,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            status = child.wait(SELF_TEST_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()  # not waited for: a process that hangs in a driver does not die at once
            return f"its self-test did not end within {SELF_TEST_SECONDS} s"
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines() or ["no message"]
    if status < 0:
        return f"its self-test was ended by signal {-status}"
    return (
        ""
        if status == 0
        else lines[-1]
        if status == 1
        else f"its self-test ended with status {status}: {lines[-1]}"
    )


def _load(device: Any) -> str:
    """Give the library's operators to this process's MXNet. Empty, or why that failed."""
    import mxnet as mx

    path = extension_build.library(_kind(device))
    if not all(hasattr(mx.sym, name) for name in OPERATORS):
        try:
            ctypes.CDLL(
                str(path), mode=os.RTLD_LAZY | os.RTLD_LOCAL
            )  # names a library that is missing, as MXNet does not
            mx.library.load(str(path), verbose=False)
        except (OSError, mx.MXNetError) as error:
            return f"{path.name} does not load: {_short(error)}"
        _loaded.append(_kind(device))
    if _kind(device) not in _loaded:
        return f"this process has loaded the library for another device ({_loaded[0]})"
    missing = [name for name in OPERATORS if not hasattr(mx.sym, name)]
    if missing:
        return f"{path.name} lacks {missing[0]}"
    if _kind(device) == "gpu":
        # Shapes are inferred before any work is queued: only so can cuDNN be asked, on the right device, what it will want.
        ctypes.CDLL(str(path)).mxresnet_use_device(device.device_id)
    return ""


_loaded: List[
    str
] = []  # the kind of library that this process's MXNet has: one only, as the operators' names are the same


def _short(error: Exception) -> str:
    """The line of a message that says something: MXNet puts its own place in its source, a stack trace and all that
    extensions ever complained about around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    ours = [
        line[line.index("mxresnet_batch_norm") :]
        for line in lines
        if "operators.cc[" in line and "mxresnet_batch_norm" in line
    ]
    return (ours or lines or [type(error).__name__])[-1][:300]


def _step(
    symbol: Any, device: Any, arrays: Dict[str, np.ndarray], dtype: str
) -> Dict[str, np.ndarray]:
    """One training step of a symbol named bn: its output, gradients and new running statistics, by name."""
    import mxnet as mx

    inputs = [name for name in symbol.list_arguments() if name in ("data", "addend")]
    executor = symbol.simple_bind(
        device,
        grad_req="write",
        type_dict=dict.fromkeys(inputs, dtype),
        **{name: arrays[name].shape for name in inputs},
    )
    for name, array in [*executor.arg_dict.items(), *executor.aux_dict.items()]:
        array[:] = arrays[name]
    executor.forward(is_train=True)
    executor.backward([mx.nd.array(arrays["head"], ctx=device, dtype=dtype)])
    mx.nd.waitall()
    found = {"output": executor.outputs[0], **executor.grad_dict, **executor.aux_dict}
    return {name: array.asnumpy() for name, array in found.items()}


def _arrays(channels: int) -> Dict[str, np.ndarray]:
    """Inputs of a small odd-sized step, representable in float16."""
    random = np.random.RandomState(7)
    shape = (3, 5, 7, channels)
    arrays = {name: random.randn(*shape) for name in ("data", "addend", "head")}
    arrays["data"] = arrays["data"] * 2 + random.randn(channels)
    arrays.update(bn_gamma=random.rand(channels) + 0.5, bn_beta=random.randn(channels))
    arrays.update(bn_moving_mean=random.randn(channels), bn_moving_var=random.rand(channels) + 0.5)
    return {name: array.astype(np.float16).astype(np.float32) for name, array in arrays.items()}


def self_test(device: Any) -> str:
    """Compare a step of each operator on the device with MXNet's stock operators, in float32 on the CPU.

    Returns what differs, or nothing. For a process that may die of it.
    """
    import mxnet as mx

    dtype, tolerance = ("float16", 4e-3) if _kind(device) == "gpu" else ("float32", 1e-4)
    arrays = _arrays(channels=12)
    pixels = arrays["data"].size / 12
    data, addend = mx.sym.var("data"), mx.sym.var("addend")
    plain = mx.sym.BatchNorm(
        data, name="bn", fix_gamma=False, eps=_EPSILON, momentum=_MOMENTUM, axis=3
    )
    pairs = [
        (batch_norm(data, "bn", 12), plain),
        (batch_norm(data, "bn", 12, relu=True), mx.sym.relu(plain)),
        (batch_norm(data, "bn", 12, addend=addend), mx.sym.relu(plain + addend)),
    ]
    for operator, (ours, stock) in zip(OPERATORS, pairs):
        found, expected = (
            _step(ours, device, arrays, dtype),
            _step(stock, mx.cpu(), arrays, "float32"),
        )
        # Stock operators on a CPU keep the biased variance.
        kept = _MOMENTUM * arrays["bn_moving_var"]
        expected["bn_moving_var"] = kept + (expected["bn_moving_var"] - kept) * pixels / (
            pixels - 1
        )
        for name, value in expected.items():
            error = np.abs(found[name].astype(np.float64) - value).max() / np.abs(value).max()
            if not error <= tolerance:  # also when it is not a number
                return f"{operator} computes {name} with an error of {error:.2g} (at most {tolerance:g})"
    return ""


def large_test(device: Any, batch_size: int) -> str:
    """Take a step of each operator in ResNet-50's own sizes. Returns what fails or is not finite, or nothing."""
    import mxnet as mx

    dtype = "float16" if _kind(device) == "gpu" else "float32"
    for size, channels in _SIZES:
        shape = (batch_size, size, size, channels)
        arrays = {name: np.full(shape, 0.5, np.float16) for name in ("data", "addend", "head")}
        arrays["data"][::2] = 1
        arrays.update(
            {
                f"bn_{name}": np.ones(channels, np.float32)
                for name in ("gamma", "beta", "moving_mean", "moving_var")
            }
        )
        data, addend = mx.sym.var("data"), mx.sym.var("addend")
        for how in ({}, {"relu": True}, {"addend": addend}):
            found = _step(batch_norm(data, "bn", channels, **how), device, arrays, dtype)
            bad = next((name for name, array in found.items() if not np.isfinite(array).all()), "")
            if bad:
                return f"{bad} is not finite for data of {' x '.join(map(str, shape))}"
    return ""


def _test(device: Any, batch_size: int = 0) -> str:
    reason = _unfit(device) or _load(device)
    try:
        return reason or self_test(device) or (batch_size and large_test(device, batch_size)) or ""
    except Exception as error:  # whatever it is, it speaks against the library
        return f"its self-test failed: {_short(error)}"


def _parse(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mxresnet.model.cudnn_bn", description=__doc__.splitlines()[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help in (
        ("build", "make the library"),
        ("test", "compare its operators with MXNet's own"),
    ):
        command = commands.add_parser(name, help=help)
        kind = command.add_mutually_exclusive_group(required=True)
        kind.add_argument(
            "--cpu", action="store_true", help="the one for tests: float32, plain C++"
        )
        if name == "build":
            kind.add_argument(
                "--gpu",
                action="store_true",
                help="the one for training: float16, channel last, cuDNN",
            )
            command.add_argument(
                "--cuda",
                action="append",
                default=[],
                metavar="DIR",
                help="where to look first for CUDA 11 and cuDNN 8: a toolkit, or what pip install --target DIR made of NVIDIA's wheels; may be repeated",
            )
        else:
            kind.add_argument("--gpu", type=int, nargs="?", const=0, metavar="N", help="on GPU N")
            command.add_argument(
                "--batch-size",
                type=int,
                default=0,
                metavar="N",
                help="ResNet-50's own sizes too, with N images",
            )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Exit status: 0 done, 1 the self-test speaks against the library, 2 a mistake."""
    options = _parse(argv)
    try:
        if options.command == "build":
            print(extension_build.build("cpu" if options.cpu else "gpu", options.cuda))
            return 0
        ctypes.CDLL(None).prctl(
            PR_SET_PDEATHSIG, signal.SIGKILL
        )  # a rank that is killed takes a hanging test along
        import mxnet as mx

        reason = _test(mx.cpu() if options.cpu else mx.gpu(options.gpu), options.batch_size)
        print(reason or "all operators agree with MXNet's own")
        return 1 if reason else 0
    except UserError as error:
        print(f"mxresnet: {error}", file=sys.stderr)
        return 2
