# SPDX-License-Identifier: Apache-2.0
"""The network: names, sizes, initial weights, and the CPU backends against the plain one."""

import importlib.resources
import re

import mxnet as mx
import numpy as np
import pytest

from mxresnet.config import Config
from mxresnet.model import initializers, resnet
from mxresnet.model.loss import softmax_cross_entropy_loss
from mxresnet.model.ops import FusedCpuOps, PlainOps
from mxresnet.model.select_ops import select_ops


def symbol(classes=1000, **settings):
    config = Config(**settings)
    return resnet.build(PlainOps(config), config, classes)


def shapes(net, data):
    arguments, outputs, statistics = net.infer_shape(data=data)
    return (
        dict(zip(net.list_arguments(), arguments)),
        outputs,
        dict(zip(net.list_auxiliary_states(), statistics)),
    )


def test_parameter_names_are_those_of_the_compliance_checker():
    rules = (
        importlib.resources.files("mlperf_logging")
        / "compliance_checker"
        / "training_2.1.0"
        / "closed_resnet.yaml"
    )
    required = re.findall(r'"(\w+_(?:weight|bias|gamma|beta))"', rules.read_text())
    assert len(required) == 161 and sorted(resnet.parameter_names(50)) == sorted(required)


def test_parameter_names_are_those_of_the_symbol_in_its_order():
    assert [
        name for name in symbol().list_arguments() if name not in ("data", "softmax_label")
    ] == resnet.parameter_names(50)


@pytest.mark.parametrize("channels, parameters", [(3, 25557032), (4, 25560168)])
def test_sizes(channels, parameters):
    arguments, outputs, statistics = shapes(symbol(), (2, channels, 224, 224))
    count = sum(
        int(np.prod(shape))
        for name, shape in arguments.items()
        if name not in ("data", "softmax_label")
    )
    assert count == parameters and outputs == [(2, 1000)]
    assert (
        len(statistics) == 106
        and sum(int(np.prod(shape)) for shape in statistics.values()) == 53120
    )


def test_stride_is_in_the_3x3_convolution():
    net = symbol()
    outputs = net.get_internals()
    _, sizes, _ = outputs.infer_shape(data=(1, 3, 224, 224))
    size = {name: shape[2] for name, shape in zip(outputs.list_outputs(), sizes) if len(shape) == 4}
    assert [
        size[f"stage3_unit1_{name}_output"] for name in ("conv1", "conv2", "conv3", "conv1sc")
    ] == [28, 14, 14, 14]
    assert size["pool0_output"] == 56 and size["stage4_unit3_relu3_output"] == 7


def test_nhwc_network_has_the_reference_shapes_and_types():
    layouts = {
        "input_layout": "NHWC",
        "conv_layout": "NHWC",
        "batchnorm_layout": "NHWC",
        "pooling_layout": "NHWC",
    }
    net = symbol(dtype="float16", image_shape=(4, 224, 224), **layouts)
    assert "transpose" not in net.tojson()
    arguments, _, _ = shapes(net, (2, 224, 224, 4))
    assert arguments["conv0_weight"] == (64, 7, 7, 4) and arguments[
        "stage2_unit1_conv2_weight"
    ] == (128, 3, 3, 128)
    types, outputs, statistics = net.infer_type(data="float16")
    types = dict(zip(net.list_arguments(), types))
    halves = [name for name, kind in types.items() if kind == np.float16 and name != "data"]
    assert len(halves) == 55 and all(name.endswith(("weight", "bias")) for name in halves)
    assert (
        types["bn0_gamma"] == np.float32
        and outputs == [np.float32]
        and set(statistics) == {np.float32}
    )


@pytest.mark.parametrize("layouts", [{"input_layout": "NHWC"}, {"pooling_layout": "NHWC"}])
def test_any_layout_computes_the_same_network(layouts):
    """Compare mixed layouts that a CPU can run with NCHW only."""
    data = np.random.RandomState(0).randn(2, 3, 32, 32).astype("float32")
    weights = None
    results = []
    for settings in ({}, layouts):
        net = symbol(classes=10, **settings)
        values = data.transpose(0, 2, 3, 1) if settings.get("input_layout") else data
        module = mx.mod.Module(net, context=mx.cpu())
        module.bind([("data", values.shape)], [("softmax_label", (2,))])
        module.init_params(initializers.initializer(Config()))
        if weights:
            module.set_params(*weights)
        weights = module.get_params()
        module.forward(mx.io.DataBatch([mx.nd.array(values)], [mx.nd.zeros(2)]), is_train=False)
        results.append(module.get_outputs()[0].asnumpy())
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4, atol=1e-6)


def one_step(config, images, labels, weights=None):
    """Return (output, gradients, running statistics, initial weights) of one training step."""
    module = mx.mod.Module(
        resnet.build(select_ops(config, on_gpu=False), config, 10), context=mx.cpu()
    )
    module.bind([mx.io.DataDesc("data", config.batch_shape)], [("softmax_label", labels.shape)])
    mx.random.seed(2)
    module.init_params(initializers.initializer(config))
    if weights:
        module.set_params(*weights)
    weights = tuple({n: a.copy() for n, a in part.items()} for part in module.get_params())
    module.forward(mx.io.DataBatch([mx.nd.array(images)], [mx.nd.array(labels)]), is_train=True)
    module.backward()
    mx.nd.waitall()
    gradients = {
        n: g[0] for n, g in zip(module._exec_group.param_names, module._exec_group.grad_arrays)
    }
    assert all(g.dtype == np.float32 for g in gradients.values()) and all(
        a.dtype == np.float32 for a in weights[0].values()
    )
    statistics = {
        n: a[0].asnumpy()
        for n, a in zip(module._exec_group.aux_names, module._exec_group.aux_arrays)
    }
    return (
        module.get_outputs()[0].asnumpy(),
        {n: g.asnumpy() for n, g in gradients.items()},
        statistics,
        weights,
    )


BATCH = np.random.RandomState(5).randn(8, 3, 64, 64), np.random.RandomState(6).randint(0, 10, 8)
CPU = {"image_shape": (3, 64, 64), "batch_size": 8, "bn_gamma_init0": True}


def test_fused_cpu_backend_computes_the_plain_graph():
    plain, fused = Config(**CPU), Config(fuse_bn_relu=1, **CPU)
    assert (
        isinstance(select_ops(fused, on_gpu=False), FusedCpuOps)
        and type(select_ops(fused, on_gpu=True)) is PlainOps
    )
    output, gradients, statistics, weights = one_step(plain, *BATCH)
    fused_output, fused_gradients, fused_statistics, _ = one_step(fused, *BATCH, weights)
    np.testing.assert_allclose(fused_output, output, rtol=1e-5, atol=1e-6)
    assert set(fused_gradients) == set(gradients)
    for theirs, ours in ((gradients, fused_gradients), (statistics, fused_statistics)):
        for name in theirs:
            assert (
                np.linalg.norm(ours[name] - theirs[name])
                <= 1e-4 * np.linalg.norm(theirs[name]) + 1e-7
            ), name


@pytest.mark.parametrize("fused", [0, 1])
def test_bfloat16_only_rounds(fused):
    """The gradients have nearly the direction of those in float32.

    The last gammas are zero, because a deeper untrained network amplifies rounding errors.
    """
    output, gradients, statistics, weights = one_step(Config(**CPU), *BATCH)
    bf16_output, bf16_gradients, bf16_statistics, _ = one_step(
        Config(dtype="bfloat16", fuse_bn_relu=fused, **CPU), *BATCH, weights
    )
    np.testing.assert_allclose(bf16_output, output, atol=0.02)
    assert (bf16_output != output).any()
    cosines = {}
    for name, gradient in gradients.items():
        if np.linalg.norm(gradient) > 1e-6:
            cosines[name] = (
                (gradient * bf16_gradients[name]).sum()
                / np.linalg.norm(gradient)
                / np.linalg.norm(bf16_gradients[name])
            )
    assert np.median(list(cosines.values())) > 0.98 and min(cosines.values()) > 0.9, cosines
    for name, value in statistics.items():
        np.testing.assert_allclose(
            bf16_statistics[name], value, rtol=0.02, atol=0.02 * abs(value).max(), err_msg=name
        )


@pytest.mark.parametrize("zero_gamma", [False, True])
def test_initial_weights(zero_gamma):
    mx.random.seed(1)
    config = Config(image_shape=(4, 32, 32), bn_gamma_init0=zero_gamma)
    module = mx.mod.Module(resnet.build(PlainOps(config), config, 1000), context=mx.cpu())
    module.bind([("data", (1, 4, 32, 32))], [("softmax_label", (1,))])
    module.init_params(initializers.initializer(config))
    arguments, statistics = module.get_params()
    for name, array in arguments.items():
        value = array.asnumpy()
        if name.endswith(("beta", "bias")):
            assert not value.any(), name
        elif name.endswith("gamma"):
            assert (value == (0 if zero_gamma and name.endswith("bn3_gamma") else 1)).all(), name
        else:
            fan_in = np.prod(value.shape[1:])
            sigma = 0.01 if name == "fc1_weight" and not zero_gamma else np.sqrt(2 / fan_in)
            assert value.std() == pytest.approx(sigma, rel=0.03), name
            assert abs(value.mean()) < 5 * sigma / np.sqrt(value.size), name
    for name, array in statistics.items():
        assert (array.asnumpy() == (1 if name.endswith("var") else 0)).all()


def test_loss_gradient_with_label_smoothing():
    """The gradient is softmax minus target; the target is alpha / (K - 1) off the label."""
    logits = np.random.RandomState(0).randn(3, 5)
    data = mx.sym.var("data")
    net = softmax_cross_entropy_loss(data, label_smoothing=0.1)
    executor = net.simple_bind(mx.cpu(), data=(3, 5))
    executor.forward(is_train=True, data=mx.nd.array(logits), softmax_label=mx.nd.array([0, 4, 2]))
    executor.backward()
    softmax = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    target = np.full((3, 5), 0.1 / 4)
    target[[0, 1, 2], [0, 4, 2]] = 0.9
    np.testing.assert_allclose(executor.grad_dict["data"].asnumpy(), softmax - target, atol=1e-6)


@pytest.mark.parametrize(
    "depth, parameters",
    [(18, 11692072), (34, 21799720), (50, 25557032), (101, 44549160), (152, 60192808)],
)
def test_sizes_of_all_depths(depth, parameters):
    """The counts are torchvision's.

    Networks of basic units have one projection more, in the first stage, by the reference's rule.
    """
    arguments, _, _ = shapes(symbol(num_layers=depth), (1, 3, 224, 224))
    extra = 64 * 64 + 2 * 64 if depth < 50 else 0
    names = [name for name in arguments if name not in ("data", "softmax_label")]
    assert (
        sum(int(np.prod(arguments[name])) for name in names)
        in (parameters, parameters - 2440 + 64 * 64)
        or extra
    )
    assert names == resnet.parameter_names(depth)


@pytest.mark.parametrize(
    "depth, convolutions",
    [(18, 16), (34, 32), (50, 48), (101, 99), (152, 150), (200, 198), (269, 267)],
)
def test_depth_counts_the_layers_with_weights_but_projections(depth, convolutions):
    names = [
        name
        for name in resnet.parameter_names(depth)
        if name.endswith("_weight") and "sc" not in name
    ]
    assert len(names) == convolutions + 2
    (outputs,) = symbol(num_layers=depth).infer_shape(data=(1, 3, 224, 224))[1]
    assert outputs == (1, 1000)
