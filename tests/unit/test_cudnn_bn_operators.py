# SPDX-License-Identifier: Apache-2.0
"""The operators of cudnn_bn's CPU library against numpy and against MXNet's own operators."""

import re

import mxnet as mx
import numpy as np
import pytest

from mxresnet.model.cudnn_bn import runtime, self_test

pytestmark = pytest.mark.usefixtures("cpu_library")
OPERATIONS = ["plain", "relu", "add_relu"]


def reference(operation, x, z, gamma, beta, dy, mean, variance, eps, momentum):
    """Return the results of one NHWC step in float64, with the names of training_step()."""
    axes, count = (0, 1, 2), x[..., 0].size
    inverse_std = 1 / np.sqrt(x.var(axes) + eps)
    normalized = (x - x.mean(axes)) * inverse_std
    y = normalized * gamma + beta + (z if operation == "add_relu" else 0)
    dy = dy * ((y > 0) | (operation == "plain"))
    dgamma = (dy * normalized).sum(axes)
    results = {
        "output": y if operation == "plain" else np.maximum(y, 0),
        "bn_gamma": dgamma,
        "bn_beta": dy.sum(axes),
        "data": gamma * inverse_std * (dy - dy.mean(axes) - normalized * dgamma / count),
        "bn_moving_mean": momentum * mean + (1 - momentum) * x.mean(axes),
        "bn_moving_var": momentum * variance + (1 - momentum) * x.var(axes) * count / (count - 1),
    }
    if operation == "add_relu":
        results["addend"] = dy
    return results


def make_symbol(operation, channels, layout, **attributes):
    addend = mx.sym.var("addend") if operation == "add_relu" else None
    return runtime.batch_norm(
        mx.sym.var("data"),
        "bn",
        channels,
        layout=layout,
        relu=operation == "relu",
        addend=addend,
        **attributes,
    )


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (3, 5, 7, 3), (1, 9, 2, 17), (4, 3, 3, 64)])
def test_operator_equals_numpy(operation, layout, shape):
    random = np.random.RandomState(sum(shape))
    channels = shape[3]
    x, z, dy = (random.randn(*shape) * 3 + 5 for _ in range(3))
    gamma, beta, mean = (random.randn(channels) for _ in range(3))
    gamma[0], variance = 0, random.rand(channels) + 0.5
    expected = reference(operation, x, z, gamma, beta, dy, mean, variance, 1e-3, 0.7)
    axes = (0, 3, 1, 2) if layout == "NCHW" else (0, 1, 2, 3)
    arrays = {
        "data": x.transpose(axes),
        "addend": z.transpose(axes),
        "head": dy.transpose(axes),
        "bn_gamma": gamma,
        "bn_beta": beta,
        "bn_moving_mean": mean,
        "bn_moving_var": variance,
    }
    symbol = make_symbol(operation, channels, layout, eps=1e-3, momentum=0.7)
    results = self_test.training_step(symbol, mx.cpu(), arrays, "float32")
    assert set(results) == set(expected)
    for name, value in expected.items():
        value = value.transpose(axes) if value.ndim == 4 else value
        # With two values per channel the gradient is nearly 0 by cancellation.
        atol = 2e-5 * max(1, abs(value).max())
        np.testing.assert_allclose(results[name], value, rtol=1e-4, atol=atol, err_msg=name)


@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operator_for_evaluation_equals_numpy(operation, layout):
    random = np.random.RandomState(1)
    x, z = (random.randn(3, 5, 7, 4) * 3 + 5 for _ in range(2))
    gamma, beta, mean = (random.randn(4) for _ in range(3))
    variance = random.rand(4) + 0.5
    expected = gamma * (x - mean) / np.sqrt(variance + 1e-3) + beta
    if operation == "add_relu":
        expected = expected + z
    if operation != "plain":
        expected = np.maximum(expected, 0)
    axes = (0, 3, 1, 2) if layout == "NCHW" else (0, 1, 2, 3)
    arrays = {
        "data": x.transpose(axes),
        "addend": z.transpose(axes),
        "bn_gamma": gamma,
        "bn_beta": beta,
        "bn_moving_mean": mean,
        "bn_moving_var": variance,
    }
    symbol = make_symbol(operation, 4, layout, eps=1e-3, training=False)
    results = self_test.evaluation(symbol, mx.cpu(), arrays, "float32")
    np.testing.assert_allclose(results["output"], expected.transpose(axes), rtol=1e-5, atol=1e-5)
    for name in ("bn_moving_mean", "bn_moving_var"):
        np.testing.assert_array_equal(results[name], arrays[name].astype(np.float32))


def test_operator_for_evaluation_has_no_gradient():
    symbol = make_symbol("plain", 4, "NHWC", training=False)
    arrays = {name: np.ones((2, 2, 2, 4)) for name in ("data", "head")}
    for name in ("gamma", "beta", "moving_mean", "moving_var"):
        arrays[f"bn_{name}"] = np.ones(4)
    with pytest.raises(mx.MXNetError, match="the operator for evaluation has no gradient"):
        self_test.training_step(symbol, mx.cpu(), arrays, "float32")


def test_names_order_and_initializers_equal_those_of_stock_batch_norm():
    data = mx.sym.var("data")
    own = runtime.batch_norm(data, "bn", 8)
    stock = mx.sym.BatchNorm(data, name="bn", fix_gamma=False)
    assert own.list_arguments() == stock.list_arguments()
    assert own.list_auxiliary_states() == stock.list_auxiliary_states()
    assert len(own.list_outputs()) == 1
    for name in stock.list_arguments() + stock.list_auxiliary_states():
        initializers = [s.attr_dict().get(name, {}).get("__init__") for s in (own, stock)]
        assert initializers[0] == initializers[1], name


class StockBatchNorm:
    @staticmethod
    def batch_norm(x, name, channels, relu=False, addend=None):
        y = mx.sym.BatchNorm(x, name=name, fix_gamma=False, eps=1e-5, momentum=0.9)
        y = y if addend is None else y + addend
        return mx.sym.relu(y) if relu else y


class OwnBatchNorm:
    @staticmethod
    def batch_norm(x, name, channels, relu=False, addend=None):
        return runtime.batch_norm(x, name, channels, layout="NCHW", relu=relu, addend=addend)


class OwnChannelLastBatchNorm:
    @staticmethod
    def batch_norm(x, name, channels, relu=False, addend=None):
        if addend is not None:
            addend = mx.sym.transpose(addend, axes=(0, 2, 3, 1))
        x = mx.sym.transpose(x, axes=(0, 2, 3, 1))
        y = runtime.batch_norm(x, name, channels, relu=relu, addend=addend)
        return mx.sym.transpose(y, axes=(0, 3, 1, 2))


def convolution(x, name, filters, kernel):
    return mx.sym.Convolution(
        x,
        name=name,
        num_filter=filters,
        kernel=(kernel, kernel),
        pad=(kernel // 2, kernel // 2),
        no_bias=True,
    )


def residual_network(ops):
    """Return a stem and two residual units, which use the operators in every possible way.

    The first unit has a projection and the second has none.
    """
    x = convolution(mx.sym.var("data"), "conv0", 8, 3)
    x = ops.batch_norm(x, "bn0", 8, relu=True)
    for unit in (1, 2):
        y = convolution(x, f"u{unit}_conv1", 4, 3)
        y = ops.batch_norm(y, f"u{unit}_bn1", 4, relu=True)
        y = convolution(y, f"u{unit}_conv2", 12, 1)
        if unit == 1:
            x = ops.batch_norm(convolution(x, "u1_conv1sc", 12, 1), "u1_bnsc", 12)
        x = ops.batch_norm(y, f"u{unit}_bn2", 12, relu=True, addend=x)
    x = mx.sym.Pooling(x, global_pool=True, pool_type="avg", kernel=(1, 1))
    x = mx.sym.FullyConnected(x, num_hidden=5, name="fc1")
    return mx.sym.SoftmaxOutput(x, name="softmax")


def train_step(ops, weights=None):
    """Return (output, gradients, statistics, initial values) of one step through Module."""
    random = np.random.RandomState(3)
    module = mx.mod.Module(residual_network(ops), context=mx.cpu())
    module.bind([("data", (6, 3, 9, 11))], [("softmax_label", (6,))])
    mx.random.seed(1)
    module.init_params(mx.init.Xavier())
    initial = {n: array.asnumpy() for part in module.get_params() for n, array in part.items()}
    if weights:
        module.set_params(
            *({n: mx.nd.array(weights[n]) for n in part} for part in module.get_params())
        )
    images, labels = mx.nd.array(random.randn(6, 3, 9, 11)), mx.nd.array(random.randint(0, 5, 6))
    module.forward(mx.io.DataBatch([images], [labels]), is_train=True)
    module.backward()
    mx.nd.waitall()
    group = module._exec_group
    gradients = {n: arrays[0].asnumpy() for n, arrays in zip(group.param_names, group.grad_arrays)}
    statistics = {n: arrays[0].asnumpy() for n, arrays in zip(group.aux_names, group.aux_arrays)}
    return module.get_outputs()[0].asnumpy(), gradients, statistics, initial


@pytest.mark.parametrize("ops", [OwnBatchNorm, OwnChannelLastBatchNorm])
def test_residual_network_equals_that_of_stock_operators(ops):
    output, gradients, statistics, initial = train_step(StockBatchNorm)
    own_output, own_gradients, own_statistics, own_initial = train_step(ops, initial)
    own_net, stock_net = residual_network(ops), residual_network(StockBatchNorm)
    assert own_net.list_arguments() == stock_net.list_arguments()
    assert own_net.list_auxiliary_states() == stock_net.list_auxiliary_states()
    assert set(own_gradients) == set(gradients) and len(gradients) == 20
    for name, value in own_initial.items():
        if not name.endswith("weight"):  # weights are random
            np.testing.assert_array_equal(value, initial[name], err_msg=name)
    np.testing.assert_allclose(own_output, output, rtol=1e-4, atol=1e-6)
    count = 6 * 9 * 11
    for name, value in statistics.items():
        if name.endswith("var"):  # MXNet's BatchNorm keeps the biased variance on a CPU
            value = 0.9 + (value - 0.9) * count / (count - 1)
        np.testing.assert_allclose(own_statistics[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    for name, value in gradients.items():
        error = np.linalg.norm(own_gradients[name] - value)
        assert error <= 1e-4 * np.linalg.norm(value) + 1e-6, name


def test_a_step_fills_no_zeros():
    """As gradients of outputs that nothing uses, these would cost memory and time."""
    executor = residual_network(OwnBatchNorm).simple_bind(mx.cpu(), data=(6, 3, 9, 11))
    operators = re.findall(r"Op:(\w+)", executor.debug_str())
    assert operators.count("_backward_mxresnet_batch_norm_add_relu") == 2
    assert not [name for name in operators if "zero" in name]


def test_second_step_continues_from_the_running_statistics():
    symbol = make_symbol("relu", 4, "NHWC")
    x = np.random.RandomState(0).randn(5, 3, 2, 4) + 2
    executor = symbol.simple_bind(mx.cpu(), data=x.shape)
    executor.aux_dict["bn_moving_var"][:] = 1
    for _ in range(2):
        executor.forward(is_train=True, data=mx.nd.array(x))
    mx.nd.waitall()
    mean, variance = (executor.aux_dict[f"bn_moving_{kind}"].asnumpy() for kind in ("mean", "var"))
    np.testing.assert_allclose(mean, 0.19 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(variance, 0.81 + 0.19 * x.var((0, 1, 2), ddof=1), rtol=1e-5)


def test_nan_is_propagated():
    arrays = {name: np.ones((2, 2, 2, 4)) for name in ("data", "head")}
    for name in ("gamma", "beta", "moving_mean", "moving_var"):
        arrays[f"bn_{name}"] = np.ones(4)
    arrays["data"][0, 0, 0, 1] = np.nan
    symbol = make_symbol("relu", 4, "NHWC")
    output = self_test.training_step(symbol, mx.cpu(), arrays, "float32")["output"]
    assert np.isnan(output[..., 1]).all() and not np.isnan(output[..., [0, 2, 3]]).any()


def call_operator(data, num_parameters, **attributes):
    return mx.nd.mxresnet_batch_norm(data, *[mx.nd.ones(3)] * num_parameters, **attributes)


MXNETS_OWN_MESSAGE = "expects 5 inputs, but got 4"
MISTAKES = [
    (
        lambda: make_symbol("plain", 8, "NHWC").infer_shape(data=(2, 3, 4, 9)),
        r"must have shape \(9\), one of them has \(8\)",
    ),
    (
        lambda: make_symbol("plain", 4, "NCHW").infer_shape(data=(2, 3, 4, 4)),
        r"must have shape \(3\), one of them has \(4\)",
    ),
    (
        lambda: make_symbol("plain", 4, "NHWC").infer_shape(data=(2, 3, 4)),
        r"data has shape \(2, 3, 4\), and 4 axes are needed",
    ),
    (lambda: make_symbol("plain", 4, "NHWC").infer_shape(), "the shape of data is not known"),
    (
        lambda: make_symbol("plain", 4, "NHWC").infer_shape(data=(1, 1, 1, 4)),
        "a channel has one value only",
    ),
    (
        lambda: make_symbol("add_relu", 4, "NHWC").infer_shape(
            data=(2, 3, 4, 4), addend=(2, 3, 4, 1)
        ),
        r"addend has shape \(2, 3, 4, 1\), data \(2, 3, 4, 4\)",
    ),
    (
        lambda: make_symbol("plain", 4, "NHWC").infer_type(data="float16"),
        "data must be float32 in the cpu build",
    ),
    (
        lambda: make_symbol("plain", 4, "NHWC").infer_type(data="float32", bn_gamma="float16"),
        "gamma, beta, moving_mean and moving_var must be float32",
    ),
    (
        lambda: make_symbol("plain", 4, "NHWC", eps=0),
        "attribute eps=0 is not valid: eps must be above 0",
    ),
    (lambda: make_symbol("plain", 4, "NHWC", momentum="much"), "attribute momentum=much"),
    (lambda: make_symbol("plain", 4, "CHWN"), "attribute layout=CHWN"),
    (lambda: call_operator(mx.nd.ones((2, 2, 2, 3)), 4, axis=1), "attribute axis=1"),
    (
        lambda: call_operator(mx.nd.ones((2, 2, 2, 3)).tostype("row_sparse"), 4),
        "sparse arrays are not supported",
    ),
    (lambda: call_operator(mx.nd.ones((2, 2, 2, 3)), 3), MXNETS_OWN_MESSAGE),
]


@pytest.mark.parametrize("mistake, message", MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistake_raises_an_error_of_one_line(mistake, message):
    with pytest.raises(mx.MXNetError) as error:
        mistake()
    short = runtime.short_message(error.value)
    assert re.search(message, short), short
    if message != MXNETS_OWN_MESSAGE:
        assert "\n" not in short and "/" not in short.partition("mxresnet_")[0]
