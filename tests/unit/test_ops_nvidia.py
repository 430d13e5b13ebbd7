# SPDX-License-Identifier: Apache-2.0
"""The backends for NVIDIA's MXNet compute the plain graph, on a fake of its operators.

In float64, so that any difference is an error: in float32, a rounding that changes the sign before
a ReLU changes a gradient by a percent.
"""

import collections
import functools

import mxnet as mx
import numpy as np
import pytest
from support import fake_nvidia_ops
from support.nvidia_settings import FUSED, NHWC_LAYOUTS

from mxresnet.config import Config
from mxresnet.model import resnet
from mxresnet.model.ops import PlainOps, accepts
from mxresnet.model.ops_nvidia import ConvStatsOps, FusedBnOps, NormConvAddReluOps, NormConvOps
from mxresnet.model.select_ops import VENDOR_OPS

CLASSES, ROUNDING = 10, 1e-11
Result = collections.namedtuple("Result", "evaluation output gradients statistics")


class Float64Config(Config):
    """Settings of a network in float64, a type that --dtype does not have."""

    input_dtype = "float64"


def settings(depth, **more):
    """Return settings of a small network.

    Depth 50 has 2 x 2 pixels in its last stage: the variance of only 4 values, computed from sums,
    loses too many digits.
    """
    size = 32 if depth == 18 else 64
    return Float64Config(num_layers=depth, batch_size=4, image_shape=(3, size, size), **more)


@functools.lru_cache(None)
def initial_values(depth):
    """Return parameters and running statistics in NCHW.

    No gamma is zero, so that every parameter has a gradient.
    """
    config = settings(depth)
    net = resnet.build(PlainOps(config), config, CLASSES)
    random, values = np.random.RandomState(depth), {}
    shapes, _, statistics = net.infer_shape(data=config.batch_shape)
    for name, shape in [
        *zip(net.list_arguments(), shapes),
        *zip(net.list_auxiliary_states(), statistics),
    ]:
        if name.endswith(("gamma", "moving_var")):
            values[name] = random.uniform(0.5, 1.5, shape)
        elif name.endswith("weight"):
            values[name] = random.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name not in ("data", "softmax_label"):
            values[name] = random.randn(*shape) * 0.1
    return values


def step(ops, config):
    """Return the results of one evaluation and then one training step, in NCHW."""
    from_nchw, to_nchw = (
        ((0, 2, 3, 1), (0, 3, 1, 2)) if config.conv_layout == "NHWC" else ((0, 1, 2, 3),) * 2
    )

    def transposed(array, axes):
        return array.transpose(axes) if array.ndim == 4 else array

    net = resnet.build(ops, config, CLASSES)
    names = net.list_arguments() + net.list_auxiliary_states()
    executor = net.simple_bind(
        mx.cpu(), data=config.batch_shape, type_dict=dict.fromkeys(names, np.float64)
    )
    arrays = {**executor.arg_dict, **executor.aux_dict}
    values = initial_values(config.num_layers)
    assert set(arrays) == set(values) | {"data", "softmax_label"}
    random = np.random.RandomState(0)
    for name, value in {
        **values,
        "data": random.randn(4, *config.image_shape),
        "softmax_label": random.randint(0, CLASSES, 4),
    }.items():
        arrays[name][:] = transposed(value, from_nchw)
    evaluation = executor.forward(is_train=False)[0].asnumpy()
    output = executor.forward(is_train=True)[0].asnumpy()
    executor.backward()
    mx.nd.waitall()
    gradients = {
        name: transposed(executor.grad_dict[name].asnumpy(), to_nchw)
        for name in resnet.parameter_names(config.num_layers)
    }
    return Result(
        evaluation,
        output,
        gradients,
        {name: array.asnumpy() for name, array in executor.aux_dict.items()},
    )


@functools.lru_cache(None)
def plain(depth):
    """Return a step with MXNet's own operators, in NCHW. The fake must not be installed yet."""
    assert not accepts("BatchNormAddRelu")
    return step(PlainOps(settings(depth)), settings(depth))


def difference(found, expected):
    """Return the largest relative difference over all parts of a step; infinite for a NaN."""
    pairs = [(found.evaluation, expected.evaluation), (found.output, expected.output)]
    pairs += [
        (part[name], values[name])
        for part, values in ((found[2], expected[2]), (found[3], expected[3]))
        for name in values
    ]
    differences = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]
    return max(np.inf if np.isnan(value) else value for value in differences)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("ops", VENDOR_OPS)
def test_backend_computes_the_plain_graph(monkeypatch, ops, depth):
    """Compare evaluation, output, the gradients of all parameters and the running statistics."""
    expected = plain(depth)
    fake_nvidia_ops.install(monkeypatch)
    config = settings(depth, **NHWC_LAYOUTS, **FUSED)
    assert difference(step(ops(config), config), expected) < ROUNDING
    if depth == 50:
        assert len(expected.gradients) == 161 and len(expected.statistics) == 106


@pytest.mark.parametrize("fused", [{"fuse_bn_relu": 1}, {"fuse_bn_add_relu": 1}, {}])
@pytest.mark.parametrize("ops", [FusedBnOps, NormConvAddReluOps])
def test_each_fusion_by_itself_computes_the_plain_graph(monkeypatch, ops, fused):
    expected = plain(18)
    registry = fake_nvidia_ops.install(monkeypatch)
    config = settings(18, **NHWC_LAYOUTS, **fused)
    assert difference(step(ops(config), config), expected) < ROUNDING
    used = collections.Counter(operator for operator, _, _ in registry.calls)
    assert used["BatchNormAddRelu"] == (8 if "fuse_bn_add_relu" in fused else 0)
    assert any(a["act_type"] for operator, _, a in registry.calls if operator == "BatchNorm") == (
        "fuse_bn_relu" in fused
    )


INPUT_PAIRS = [
    (ConvStatsOps, "ScaleBiasAddRelu", *pair)
    for pair in [
        ("x_mean", "z_mean"),
        ("x_invvar", "z_invvar"),
        ("x_gamma", "z_gamma"),
        ("x_equiv_scale", "z_equiv_scale"),
        ("dataX", "dataZ"),
        ("x_equiv_scale", "x_equiv_bias"),
        ("x_gamma", "x_beta"),
        ("x_mean", "x_invvar"),
        ("z_mean", "z_beta"),
    ]
]
INPUT_PAIRS += [
    (ConvStatsOps, "BNStatsFinalize", *pair)
    for pair in [("sum", "sum_squares"), ("gamma", "beta"), ("moving_mean", "moving_var")]
]
INPUT_PAIRS += [
    (NormConvOps, "NormConvolution", *pair)
    for pair in [("in_sum", "in_sum_squares"), ("gamma", "beta"), ("moving_mean", "moving_var")]
]
INPUT_PAIRS += [(FusedBnOps, "BatchNormAddRelu", "data", "addend")]


@pytest.mark.parametrize(
    "ops, operator, one, other", INPUT_PAIRS, ids=lambda value: getattr(value, "__name__", value)
)
def test_two_exchanged_inputs_are_detected(monkeypatch, ops, operator, one, other):
    """The fake computes other numbers when two inputs of one operator are exchanged once.

    So the comparisons above detect such an error.
    """
    expected, exchanged = plain(18), []
    fake_nvidia_ops.install(monkeypatch)
    original = getattr(mx.sym, operator)

    def compose(*data, **given):
        given.update(zip(("data",), data))
        if one in given and other in given and not exchanged:
            exchanged.append(given["name"])
            given[one], given[other] = given[other], given[one]
        return original(**given)

    monkeypatch.setattr(mx.sym, operator, compose)
    config = settings(18, **NHWC_LAYOUTS, **FUSED)
    assert difference(step(ops(config), config), expected) > 1e-3 and len(exchanged) == 1


@pytest.mark.parametrize(
    "operator, attribute, wrong",
    [
        ("BNStatsFinalize", "elem_count", 4 * 8 * 8 + 1),
        ("BNStatsFinalize", "eps", 1e-3),
        ("BNStatsFinalize", "momentum", 0.5),
        ("ScaleBiasAddRelu", "act_type", None),
        ("NormalizedConvolution", "stride", (1, 1)),
    ],
)
def test_a_wrong_attribute_is_detected(monkeypatch, operator, attribute, wrong):
    expected, changed = plain(18), []
    fake_nvidia_ops.install(monkeypatch)
    right = getattr(mx.sym, operator)

    def compose(**given):
        if given[attribute] != wrong and not changed:
            changed.append(given["name"])
            given[attribute] = wrong
        return right(**given)

    monkeypatch.setattr(mx.sym, operator, compose)
    config = settings(18, **NHWC_LAYOUTS, **FUSED)
    try:
        found = difference(step(ConvStatsOps(config), config), expected)
    except (mx.base.MXNetError, RuntimeError):  # shapes do not fit
        found = np.inf
    assert found > 1e-6 and len(changed) == 1


def test_the_fake_rejects_what_mxnet_rejects(monkeypatch):
    fake_nvidia_ops.install(monkeypatch)
    x, sums = (
        mx.sym.var("x"),
        mx.sym.NormConvolution(
            mx.sym.var("x"), kernel=(1, 1), num_filter=4, no_norm=True, layout="NHWC", name="c"
        ),
    )
    for compose, complaint in [
        (lambda: mx.sym.BatchNorm(x, name="b", act_typ="relu"), "Cannot find argument 'act_typ'"),
        (lambda: mx.sym.BatchNorm(x, name="b", addend=x), "candidates"),
        (
            lambda: mx.sym.BNStatsFinalize(
                sum=sums[1], sum_squares=sums[2], name="b", output_mean_var=True
            ),
            "elem_count",
        ),
        (
            lambda: mx.sym.BNStatsFinalize(
                sum=sums, sum_squares=sums[2], name="b", elem_count=4, output_mean_var=True
            ),
            "tuple",
        ),
        (
            lambda: mx.sym.BNStatsFinalize(
                sum=sums[1], sum_squares=sums[2], name="b", elem_count=4
            ),
            "output_mean_var",
        ),
        (
            lambda: mx.sym.NormConvolution(
                x, name="c", kernel=(7, 7), num_filter=4, no_norm=True, layout="NHWC"
            ),
            "kernel",
        ),
        (
            lambda: mx.sym.Convolution(
                x, name="c", kernel=(1, 1), num_filter=4, cudnn_tensor_core_only=2
            ),
            "must be a bool",
        ),
    ]:
        with pytest.raises(mx.base.MXNetError, match=complaint):
            compose()
