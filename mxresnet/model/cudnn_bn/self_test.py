# SPDX-License-Identifier: Apache-2.0
"""Self-test of the batch-norm operators on a device, against MXNet's own operators on the CPU.

A broken library may crash or hang the process: runtime.py runs this in a subprocess.
"""

from __future__ import annotations

from typing import Any, Dict, List, Tuple

import numpy as np

from mxresnet.model.cudnn_bn import runtime
from mxresnet.model.cudnn_bn.runtime import (
    DEFAULT_EPSILON,
    DEFAULT_MOMENTUM,
    OPERATORS,
    UnavailableError,
    batch_norm,
)

_TEST_CHANNELS = 12
# Largest allowed error, as a fraction of the largest value; float16 on a GPU, float32 on a CPU.
_TOLERANCES = {"gpu": 4e-3, "cpu": 1e-4}
_DTYPES = {"gpu": "float16", "cpu": "float32"}
# Where the ReLU's input is nearer to 0 than this, float16 may round it to the other side.
_KINK_WIDTH = 0.01
# (height and width, channels) of the first, largest and last batch norms of ResNet-50.
_RESNET50_SIZES = ((112, 64), (56, 256), (7, 2048))


def run(device: Any, batch_size: int = 0) -> None:
    """Load the operators and test them in this process.

    Args:
        device: MXNet context.
        batch_size: If not 0, also test feature maps of ResNet-50 with this number of images.

    Raises:
        UnavailableError: The library cannot be loaded or does not pass.
    """
    runtime.check_and_load(device)
    try:
        compare_with_stock_operators(device)
        if batch_size:
            check_resnet50_sizes(device, batch_size)
    except UnavailableError:
        raise
    except Exception as error:  # any exception means that the library does not work
        message = runtime.short_message(error)
        raise UnavailableError(f"its self-test failed: {message}") from error


def compare_with_stock_operators(device: Any) -> None:
    """Compare each operator, in training and in evaluation, with MXNet's own in float32.

    Raises:
        UnavailableError: An output, gradient or running statistic differs.
    """
    import mxnet as mx

    kind = runtime.device_kind(device)
    data, addend = mx.sym.var("data"), mx.sym.var("addend")
    plain = mx.sym.BatchNorm(
        data,
        name="bn",
        fix_gamma=False,
        eps=DEFAULT_EPSILON,
        momentum=DEFAULT_MOMENTUM,
        axis=3,
    )
    fusions: List[Tuple[Dict[str, Any], Any]] = [
        ({}, plain),
        ({"relu": True}, mx.sym.relu(plain)),
        ({"addend": addend}, mx.sym.relu(plain + addend)),
    ]
    for operator, (fusion, stock) in zip(OPERATORS, fusions):
        arrays = random_arrays()
        if fusion:
            _clear_gradient_near_kink(arrays, has_addend="addend" in fusion)
        for run_pass, training in ((training_step, True), (evaluation, False)):
            own = batch_norm(data, "bn", _TEST_CHANNELS, **fusion, training=training)
            found = run_pass(own, device, arrays, _DTYPES[kind])
            expected = run_pass(stock, mx.cpu(), arrays, "float32")
            if training:
                _correct_running_variance(expected, arrays)
            name = operator if training else f"{operator}_inference"
            _compare(name, found, expected, _TOLERANCES[kind])


def _compare(
    operator: str, found: Dict[str, np.ndarray], expected: Dict[str, np.ndarray], tolerance: float
) -> None:
    """Raise UnavailableError if an array differs by more than a fraction of its largest value."""
    for name, value in expected.items():
        error = np.abs(found[name].astype(np.float64) - value).max() / np.abs(value).max()
        if not error <= tolerance:  # also true if the error is not a number
            raise UnavailableError(
                f"{operator} computes {name} with an error of {error:.2g} (at most {tolerance:g})"
            )


def _clear_gradient_near_kink(arrays: Dict[str, np.ndarray], has_addend: bool) -> None:
    """Set the output's gradient to 0 where the ReLU's input is nearly 0.

    There the rounding of the input decides whether the gradient passes.
    """
    x, axes = arrays["data"].astype(np.float64), (0, 1, 2)
    normalized = (x - x.mean(axes)) / np.sqrt(x.var(axes) + DEFAULT_EPSILON)
    before_relu = normalized * arrays["bn_gamma"] + arrays["bn_beta"]
    if has_addend:
        before_relu = before_relu + arrays["addend"]
    arrays["head"][np.abs(before_relu) < _KINK_WIDTH] = 0


def _correct_running_variance(
    expected: Dict[str, np.ndarray], arrays: Dict[str, np.ndarray]
) -> None:
    """Replace the biased variance, which MXNet's BatchNorm keeps on a CPU, by the unbiased one."""
    count = arrays["data"].size / _TEST_CHANNELS
    kept = DEFAULT_MOMENTUM * arrays["bn_moving_var"]
    expected["bn_moving_var"] = kept + (expected["bn_moving_var"] - kept) * count / (count - 1)


def check_resnet50_sizes(device: Any, batch_size: int) -> None:
    """Run each operator, in training and in evaluation, on feature maps of ResNet-50.

    Raises:
        UnavailableError: A result is not finite.
    """
    import mxnet as mx

    dtype = _DTYPES[runtime.device_kind(device)]
    data, addend = mx.sym.var("data"), mx.sym.var("addend")
    for size, channels in _RESNET50_SIZES:
        shape = (batch_size, size, size, channels)
        arrays = {name: np.full(shape, 0.5, np.float16) for name in ("data", "addend", "head")}
        arrays["data"][::2] = 1
        for name in ("gamma", "beta", "moving_mean", "moving_var"):
            arrays[f"bn_{name}"] = np.ones(channels, np.float32)
        for fusion in ({}, {"relu": True}, {"addend": addend}):
            results = {
                **training_step(batch_norm(data, "bn", channels, **fusion), device, arrays, dtype),
                "output of evaluation": evaluation(
                    batch_norm(data, "bn", channels, **fusion, training=False),
                    device,
                    arrays,
                    dtype,
                )["output"],
            }
            for name, array in results.items():
                if not np.isfinite(array).all():
                    sizes = " x ".join(map(str, shape))
                    raise UnavailableError(f"{name} is not finite for data of {sizes}")


def training_step(
    symbol: Any, device: Any, arrays: Dict[str, np.ndarray], dtype: str
) -> Dict[str, np.ndarray]:
    """Run one forward and one backward pass of a batch norm.

    Args:
        symbol: Symbol of a batch norm named bn, with the inputs data and perhaps addend.
        device: MXNet context.
        arrays: Values of the inputs, parameters and running statistics, by variable name, and of
            the gradient of the output ("head").
        dtype: Type of the inputs.

    Returns:
        The output ("output"), the gradients and the new running statistics, by variable name.
    """
    import mxnet as mx

    executor = _bind(symbol, device, arrays, dtype, grad_req="write")
    executor.forward(is_train=True)
    executor.backward([mx.nd.array(arrays["head"], ctx=device, dtype=dtype)])
    mx.nd.waitall()
    results = {"output": executor.outputs[0], **executor.grad_dict, **executor.aux_dict}
    return {name: array.asnumpy() for name, array in results.items()}


def evaluation(
    symbol: Any, device: Any, arrays: Dict[str, np.ndarray], dtype: str
) -> Dict[str, np.ndarray]:
    """Run one forward pass of a batch norm with its running statistics.

    The arguments are those of training_step().

    Returns:
        The output ("output") and the running statistics, which must not change, by variable name.
    """
    import mxnet as mx

    executor = _bind(symbol, device, arrays, dtype, grad_req="null")
    executor.forward(is_train=False)
    mx.nd.waitall()
    results = {"output": executor.outputs[0], **executor.aux_dict}
    return {name: array.asnumpy() for name, array in results.items()}


def _bind(
    symbol: Any, device: Any, arrays: Dict[str, np.ndarray], dtype: str, grad_req: str
) -> Any:
    """Return the executor of a symbol, with the values of its variables set."""
    inputs = [name for name in symbol.list_arguments() if name in ("data", "addend")]
    executor = symbol.simple_bind(
        device,
        grad_req=grad_req,
        type_dict=dict.fromkeys(inputs, dtype),
        **{name: arrays[name].shape for name in inputs},
    )
    for name, array in [*executor.arg_dict.items(), *executor.aux_dict.items()]:
        array[:] = arrays[name]
    return executor


def random_arrays() -> Dict[str, np.ndarray]:
    """Return small arrays of odd sizes for training_step(), with values exact in float16."""
    random = np.random.RandomState(7)
    shape, channels = (3, 5, 7, _TEST_CHANNELS), _TEST_CHANNELS
    arrays = {name: random.randn(*shape) for name in ("data", "addend", "head")}
    arrays["data"] = arrays["data"] * 2 + random.randn(channels)
    arrays.update(bn_gamma=random.rand(channels) + 0.5, bn_beta=random.randn(channels))
    arrays.update(bn_moving_mean=random.randn(channels), bn_moving_var=random.rand(channels) + 0.5)
    return {name: array.astype(np.float16).astype(np.float32) for name, array in arrays.items()}
