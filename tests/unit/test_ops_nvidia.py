# SPDX-License-Identifier: Apache-2.0
"""The op sets for NVIDIA's MXNet against the plain graph, over a double of its operators (vendor_registry.py).

In float64, so that what differs is wrong: in float32 a rounding that flips a ReLU moves a gradient by a percent.
"""

import collections
import dataclasses
import functools
import json

import mxnet as mx
import numpy as np
import pytest
from support import fake_nvidia_ops as vendor_registry
from test_system_configs import exported

from mxresnet.config import FIELDS, NETWORKS, Config
from mxresnet.config_parser import parse
from mxresnet.model import resnet
from mxresnet.model.ops import (
    ChannelFirstOps,
    ExtensionOps,
    FusedCpuOps,
    GroupOps,
    PlainOps,
    accepts,
)
from mxresnet.model.ops_nvidia import NormAddOps, NormOps, StatsOps, VendorOps
from mxresnet.model.select_ops import (
    NOT_TRIED,
    VENDOR_OPS,
    cudnn_bn_unavailable_reason,
    select_ops,
)
from mxresnet.model.select_ops import ignored_settings as ignored_settings_of

LAYOUTS = {f"{what}_layout": "NHWC" for what in ("input", "conv", "batchnorm", "pooling")}
FUSED = dict(fuse_bn_relu=1, fuse_bn_add_relu=1)
VENDOR = dict(dtype="float16", **LAYOUTS, **FUSED)  # what the published configurations ask for
CLASSES, ROUNDING = 10, 1e-11


def ignored_settings(config, on_gpu, reason=NOT_TRIED):
    return ignored_settings_of(config, select_ops(config, on_gpu, reason), on_gpu, reason)

Result = collections.namedtuple("Result", "evaluation output gradients statistics")


class Double(Config):
    """Settings of a network in float64, which no user can ask for."""

    input_dtype = "float64"


def settings(depth, **more):
    """Depth 50 gets 2 x 2 pixels in its last stage: the variance of only 4 values loses digits when it comes from sums."""
    size = 32 if depth == 18 else 64
    return Double(num_layers=depth, batch_size=4, image_shape=(3, size, size), **more)


@functools.lru_cache(None)
def first_values(depth):
    """Parameters and running statistics, channel-first; no gamma zero, so that every parameter has a gradient."""
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
    """One evaluation and then one training step from first_values; everything channel-first."""
    there, back = (
        ((0, 2, 3, 1), (0, 3, 1, 2)) if config.conv_layout == "NHWC" else ((0, 1, 2, 3),) * 2
    )
    turned = lambda array, axes: array.transpose(axes) if array.ndim == 4 else array
    net = resnet.build(ops, config, CLASSES)
    names = net.list_arguments() + net.list_auxiliary_states()
    executor = net.simple_bind(
        mx.cpu(), data=config.batch_shape, type_dict=dict.fromkeys(names, np.float64)
    )
    arrays = {**executor.arg_dict, **executor.aux_dict}
    values = first_values(config.num_layers)
    assert set(arrays) == set(values) | {"data", "softmax_label"}
    random = np.random.RandomState(0)
    for name, value in {
        **values,
        "data": random.randn(4, *config.image_shape),
        "softmax_label": random.randint(0, CLASSES, 4),
    }.items():
        arrays[name][:] = turned(value, there)
    evaluation = executor.forward(is_train=False)[0].asnumpy()
    output = executor.forward(is_train=True)[0].asnumpy()
    executor.backward()
    mx.nd.waitall()
    gradients = {
        name: turned(executor.grad_dict[name].asnumpy(), back)
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
    """Of MXNet's own operators, channel-first: to be asked for before the double is there."""
    assert not accepts("BatchNormAddRelu")
    return step(PlainOps(settings(depth)), settings(depth))


def difference(found, wanted):
    """The largest over all parts of a step, relative to the part. Not a number is the largest of all."""
    pairs = [(found.evaluation, wanted.evaluation), (found.output, wanted.output)]
    pairs += [
        (part[name], values[name])
        for part, values in ((found[2], wanted[2]), (found[3], wanted[3]))
        for name in values
    ]
    differences = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]
    return max(np.inf if np.isnan(value) else value for value in differences)


@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("ops", VENDOR_OPS)
def test_an_op_set_computes_the_plain_graph(monkeypatch, ops, depth):
    """Evaluation, output, every parameter's gradient, running statistics; parameters under the same names."""
    wanted = plain(depth)
    vendor_registry.install(monkeypatch)
    config = settings(depth, **LAYOUTS, **FUSED)
    assert difference(step(ops(config), config), wanted) < ROUNDING
    if depth == 50:
        assert len(wanted.gradients) == 161 and len(wanted.statistics) == 106


@pytest.mark.parametrize("fused", [dict(fuse_bn_relu=1), dict(fuse_bn_add_relu=1), {}])
@pytest.mark.parametrize("ops", [VendorOps, NormAddOps])
def test_each_fusion_by_itself_computes_the_plain_graph(monkeypatch, ops, fused):
    wanted = plain(18)
    registry = vendor_registry.install(monkeypatch)
    config = settings(18, **LAYOUTS, **fused)
    assert difference(step(ops(config), config), wanted) < ROUNDING
    used = composed(registry)
    assert used["BatchNormAddRelu"] == (8 if "fuse_bn_add_relu" in fused else 0)
    assert any(
        a["act_type"] for operator, _, a in registry.composed if operator == "BatchNorm"
    ) == ("fuse_bn_relu" in fused)


WIRES = [
    (StatsOps, "ScaleBiasAddRelu", *wires)
    for wires in [
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
WIRES += [
    (StatsOps, "BNStatsFinalize", *wires)
    for wires in [("sum", "sum_squares"), ("gamma", "beta"), ("moving_mean", "moving_var")]
]
WIRES += [
    (NormOps, "NormConvolution", *wires)
    for wires in [("in_sum", "in_sum_squares"), ("gamma", "beta"), ("moving_mean", "moving_var")]
]
WIRES += [(VendorOps, "BatchNormAddRelu", "data", "addend")]


@pytest.mark.parametrize(
    "ops, operator, one, other", WIRES, ids=lambda value: getattr(value, "__name__", value)
)
def test_two_wires_crossed_once_are_noticed(monkeypatch, ops, operator, one, other):
    """The double can tell: that much the comparisons above mean. Wires of one operator in one place of the graph."""
    wanted, crossed = plain(18), []
    vendor_registry.install(monkeypatch)
    straight = getattr(mx.sym, operator)

    def compose(*data, **given):
        given.update(zip(("data",), data))
        if one in given and other in given and not crossed:
            crossed.append(given["name"])
            given[one], given[other] = given[other], given[one]
        return straight(**given)

    monkeypatch.setattr(mx.sym, operator, compose)
    config = settings(18, **LAYOUTS, **FUSED)
    assert difference(step(ops(config), config), wanted) > 1e-3 and len(crossed) == 1


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
def test_an_attribute_wrong_once_is_noticed(monkeypatch, operator, attribute, wrong):
    wanted, changed = plain(18), []
    vendor_registry.install(monkeypatch)
    right = getattr(mx.sym, operator)

    def compose(**given):
        if given[attribute] != wrong and not changed:
            changed.append(given["name"])
            given[attribute] = wrong
        return right(**given)

    monkeypatch.setattr(mx.sym, operator, compose)
    config = settings(18, **LAYOUTS, **FUSED)
    try:
        found = difference(step(StatsOps(config), config), wanted)
    except (mx.base.MXNetError, RuntimeError):  # shapes do not fit
        found = np.inf
    assert found > 1e-6 and len(changed) == 1


def composed(registry):
    return collections.Counter(operator for operator, _, _ in registry.composed)


def built(registry, ops, **more):
    """A network of a published size, and what it was composed of."""
    config = Config(batch_size=408, image_shape=(4, 224, 224), **VENDOR, **more)
    assert type(select_ops(config, on_gpu=True)) is ops
    return resnet.build(select_ops(config, on_gpu=True), config, 1000), composed(registry)


OPERATORS = {
    VendorOps: {"Convolution": 53, "BatchNorm": 1 + 32 + 4, "BatchNormAddRelu": 16},
    StatsOps: {
        "Convolution": 1,
        "BatchNorm": 1,
        "NormConvolution": 16,
        "NormalizedConvolution": 36,
        "BNStatsFinalize": 52,
        "ScaleBiasAddRelu": 32 + 12 + 4,
    },
    NormOps: {
        "Convolution": 1,
        "BatchNorm": 1,
        "NormConvolution": 48,
        "NormalizedConvolution": 4,
        "BNStatsFinalize": 20,
        "ScaleBiasAddRelu": 12 + 4,
    },
    NormAddOps: {
        "Convolution": 1,
        "BatchNorm": 1 + 4,
        "NormConvolution": 48,
        "NormalizedConvolution": 4,
        "BatchNormAddRelu": 16,
    },
}
OP_SETS = {
    "resnet-v1b": VendorOps,
    "resnet-v1b-fl": VendorOps,
    "resnet-v1b-mod-fl": VendorOps,
    "resnet-v1b-normconv-fl": NormAddOps,
    "resnet-v1b-stats-fl": StatsOps,
    "resnet-v1b-dbar-fl": NormOps,
    "resnet-v1b-dbar2-fl": NormOps,
    "resnet-v1b-mainloop-fl": NormOps,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_of_the_reference_has_its_operators(monkeypatch, name):
    registry = vendor_registry.install(monkeypatch, kinds=(np.float16, np.float32))
    _, used = built(registry, OP_SETS[name], network=name)
    assert used == {**OPERATORS[OP_SETS[name]], "FullyConnected": 1}
    said = ignored_settings(Config(network=name, **VENDOR), on_gpu=True)
    assert [text for text in said if "resnet-v1b-dbar-fl" not in text] == []
    assert len(said) == (name == "resnet-v1b-dbar-fl")


@pytest.mark.parametrize("ops", VENDOR_OPS)
def test_types_are_float16_and_float32_where_the_operators_want_them(monkeypatch, ops):
    registry = vendor_registry.install(monkeypatch, kinds=(np.float16, np.float32))
    net, _ = built(registry, ops, network=ops.networks[0])
    types, outputs, statistics = net.infer_type(data="float16")
    types = dict(zip(net.list_arguments(), types))
    halves = {name for name, kind in types.items() if kind == np.float16 and name != "data"}
    assert len(halves) == 55 and all(name.endswith(("weight", "bias")) for name in halves)
    assert (
        outputs == [np.float32]
        and set(statistics) == {np.float32}
        and types["stage2_unit1_bn2_gamma"] == np.float32
    )
    shapes = dict(zip(net.list_arguments(), net.infer_shape(data=(408, 224, 224, 4))[0]))
    assert shapes["conv0_weight"] == (64, 7, 7, 4) and shapes["stage2_unit1_conv2_weight"] == (
        128,
        3,
        3,
        128,
    )


def test_the_published_configuration_of_one_machine(monkeypatch):
    """resnet-v1b-stats-fl on 8 GPUs: what its operators are told."""
    registry = vendor_registry.install(monkeypatch, kinds=(np.float16, np.float32))
    config, _ = parse([], exported("DGXA100"))
    assert ignored_settings(config, on_gpu=True) == []
    resnet.build(select_ops(config, on_gpu=True), config, 1000)
    told = {name: (operator, a) for operator, name, a in registry.composed}
    operator, conv0 = told["conv0"]
    algorithms = {
        key: conv0[key]
        for key in conv0
        if key.startswith("cudnn_algo") and not key.endswith("prec")
    }
    assert (
        operator == "Convolution"
        and conv0["cudnn_tensor_core_only"] is True
        and conv0["no_bias"]
        and conv0["workspace"] == 2048
    )
    assert algorithms == {
        "cudnn_algo_verbose": False,
        "cudnn_algo_fwd": 1,
        "cudnn_algo_bwd_data": 1,
        "cudnn_algo_bwd_filter": 1,
    }
    assert (
        told["fc1"][1]["cublas_algo_verbose"] is False
        and told["bn0"][1]["act_type"] == "relu"
        and told["bn0"][1]["bn_group"] == 1
    )
    size = {1: 56, 2: 28, 3: 14, 4: 7}
    for operator, name, a in registry.composed:
        if operator == "BNStatsFinalize":
            before_the_stride = name[-3:] == "bn1" and "unit1_" in name and name[5] != "1"
            assert (
                a["elem_count"] == 408 * (size[int(name[5])] * (2 if before_the_stride else 1)) ** 2
            ), name
            assert (a["eps"], a["momentum"], a["fix_gamma"], a["output_mean_var"]) == (
                1e-5,
                0.9,
                False,
                True,
            )
        if operator in ("NormConvolution", "NormalizedConvolution"):
            assert (
                a["layout"] == "NHWC"
                and (operator == "NormConvolution") == name.endswith("conv1")
                and a["act_type"] is None
            )
        if operator == "ScaleBiasAddRelu":
            last, first_unit = name.endswith("relu3"), "unit1_" in name
            assert (a["fused_add"], a["dual_scale_bias"], a["fused_relu"], a["act_type"]) == (
                last,
                last and first_unit,
                True,
                "relu",
            )


@pytest.mark.parametrize(
    "missing, left",
    [
        ("BatchNormAddRelu", PlainOps),
        ("BatchNorm", PlainOps),
        ("BNStatsFinalize", VendorOps),
        ("ScaleBiasAddRelu", VendorOps),
        ("NormConvolution", VendorOps),
        ("NormalizedConvolution", VendorOps),
    ],
)
def test_a_build_that_lacks_an_operator_gets_what_it_has_and_says_so(monkeypatch, missing, left):
    vendor_registry.install(monkeypatch, without=[missing])
    config = Config(network="resnet-v1b-stats-fl", **VENDOR)
    assert type(select_ops(config, on_gpu=True)) is left
    said = ignored_settings(config, on_gpu=True)
    assert (
        "--network resnet-v1b-stats-fl: its operators are not available" in said[-1]
        and left.networks[0] in said[-1]
    )
    plain = left is PlainOps  # in NCHW
    assert (said[0].startswith("--fuse-bn-relu, --fuse-bn-add-relu: ")) == plain and len(
        said
    ) == 1 + 2 * plain
    assert (
        any(
            "this project's batch norms were not tried; MXNet's own operators are used in NCHW"
            in text
            for text in said
        )
        == plain
    )


@pytest.mark.parametrize(
    "change, on_gpu, left",
    [
        (dict(dtype="float32"), True, PlainOps),
        (dict(conv_layout="NCHW"), True, PlainOps),
        (dict(batchnorm_layout="NCHW"), True, PlainOps),
        (dict(bn_group=2), True, GroupOps),
        ({}, False, PlainOps),
        (dict(batchnorm_layout="NCHW"), False, FusedCpuOps),
    ],
)
def test_settings_that_the_operators_cannot_take(monkeypatch, change, on_gpu, left):
    """In NVIDIA's MXNet its batch norms stop a run at other types and layouts; on a CPU one of them skips the addition."""
    vendor_registry.install(monkeypatch)
    config = Config(**{**VENDOR, **change})
    assert type(select_ops(config, on_gpu)) is left
    said = " ".join(ignored_settings(config, on_gpu))
    assert "--fuse-bn-add-relu: NVIDIA's fused operators need a GPU, --dtype float16" in said
    assert ("--bn-group 2: every batch norm" in said) == ("bn_group" in change)


def test_groups_in_a_network_that_shares_less_in_the_reference():
    """Its resnet-v1b-stats-fl shares the statistics of bn0 only."""
    for group in (1, 2):
        (said,) = ignored_settings(
            Config(network="resnet-v1b-stats-fl", bn_group=group), on_gpu=False
        )
        assert said.endswith(
            "those of resnet-v1b compute the same"
            + " and share all statistics, not only some as there" * (group - 1)
        )


def test_public_mxnet_fuses_nothing_into_the_batch_norms_of_a_group():
    said = ignored_settings(Config(bn_group=2, **FUSED), on_gpu=False)
    assert said == [
        "--fuse-bn-relu, --fuse-bn-add-relu: not together with --bn-group, no effect here"
    ]


def test_what_only_nvidias_mxnet_honours_is_said_elsewhere_and_not_there(monkeypatch):
    config = Config(
        conv_algo=1,
        force_tensor_core=1,
        verbose=1,
        e2e_cuda_graphs=1,
        dali_hw_decoder_load=0.5,
        **FUSED,
    )
    fused = "--fuse-bn-add-relu: NVIDIA's MXNet or this project's batch norms on a GPU only, no effect here"
    everything = "--conv-algo, --force-tensor-core, --verbose, --e2e-cuda-graphs: NVIDIA's MXNet only, no effect here"
    assert ignored_settings(config, on_gpu=False) == [
        fused,
        everything,
        "--dali-hw-decoder-load: GPU only, no effect here",
    ]
    assert ignored_settings(config, on_gpu=True) == ["--fuse-bn-relu, " + fused, everything]
    vendor_registry.install(monkeypatch)
    there = Config(**{**{name: getattr(config, name) for name in FIELDS}, **VENDOR})
    assert ignored_settings(there, on_gpu=True) == [
        "--e2e-cuda-graphs: not implemented by this program, no effect here"
    ]
    assert (
        "--conv-algo, --force-tensor-core, --verbose, --dali-hw-decoder-load: GPU only, no effect here"
        in ignored_settings(there, False)
    )


def test_channel_last_batch_norms_of_public_mxnet_on_a_gpu():
    """Ours where they can be used; else stock operators, whose channel-last one cuDNN may refuse, in the other layout."""
    config = Config(**{**VENDOR, "network": "resnet-v1b-fl"})
    assert (
        type(select_ops(config, True, None)) is ExtensionOps
        and ignored_settings(config, True, None) == []
    )
    assert type(select_ops(config, True, None).for_evaluation()) is ChannelFirstOps
    ops = select_ops(config, True, "libcudnn.so.8 is missing")
    assert type(ops) is PlainOps and ops.for_evaluation() is ops
    assert any(
        "libcudnn.so.8 is missing; MXNet's own operators are used in NCHW" in text
        for text in ignored_settings(config, True, "libcudnn.so.8 is missing")
    )
    symbol = resnet.build(ops, config, 1000)
    nodes = json.loads(symbol.tojson())["nodes"]
    assert {n["attrs"]["layout"] for n in nodes if n["op"] in ("Convolution", "Pooling")} == {
        "NCHW"
    }
    assert {n["attrs"]["axis"] for n in nodes if n["op"] == "BatchNorm"} == {"1"}
    assert sum(n["op"] == "transpose" for n in nodes) == 1, "the input comes channel last"
    symbol.infer_shape(data=config.batch_shape)
    assert (
        cudnn_bn_unavailable_reason(config, mx.cpu())
        == NOT_TRIED
        == cudnn_bn_unavailable_reason(dataclasses.replace(config, bn_group=2), mx.gpu(0))
    )
    assert "need --dtype float16" in cudnn_bn_unavailable_reason(
        dataclasses.replace(config, dtype="float32"), mx.gpu(0)
    )


def test_a_channel_last_network_is_evaluated_channel_first_with_the_same_parameters():
    layouts = dict.fromkeys(
        ("input_layout", "conv_layout", "batchnorm_layout", "pooling_layout"), "NHWC"
    )
    common = dict(image_shape=(4, 32, 32), resize=32, batch_size=4, num_layers=18)
    last, first = Config(**common, **layouts), Config(**common)
    evaluated, plain = (
        resnet.build(ops, config, 10).simple_bind(
            mx.cpu(), grad_req="null", data=config.batch_shape
        )
        for ops, config in ((ChannelFirstOps(last), last), (PlainOps(first), first))
    )
    assert evaluated.arg_dict["conv0_weight"].shape == (64, 7, 7, 4) and plain.arg_dict[
        "conv0_weight"
    ].shape == (64, 4, 7, 7)
    random = np.random.RandomState(0)
    for name, array in [*evaluated.arg_dict.items(), *evaluated.aux_dict.items()]:
        values = random.rand(*array.shape) * 0.1 + (name.endswith("var"))
        array[:] = values
        there = plain.arg_dict.get(name, plain.aux_dict.get(name))
        there[:] = values.transpose(0, 3, 1, 2) if values.ndim == 4 else values
    images = random.randn(*first.batch_shape)
    evaluated.arg_dict["data"][:], plain.arg_dict["data"][:] = images.transpose(0, 2, 3, 1), images
    for executor in (evaluated, plain):
        executor.forward(is_train=False)
    np.testing.assert_allclose(
        evaluated.outputs[0].asnumpy(), plain.outputs[0].asnumpy(), rtol=1e-4, atol=1e-6
    )
    assert np.ptp(plain.outputs[0].asnumpy()) > 1e-3


def test_every_op_set_names_cudnns_algorithms_where_they_can_be_named(monkeypatch):
    for ops in (PlainOps, GroupOps):
        assert (
            "cudnn"
            not in resnet.build(ops(Config(conv_algo=1)), Config(conv_algo=1), 1000).tojson()
        )
    registry = vendor_registry.install(monkeypatch)
    for ops in (PlainOps, GroupOps):
        registry.composed.clear()
        config = Config(conv_algo=1, verbose=2)
        resnet.build(ops(config), config, 1000)
        told = [a for operator, _, a in registry.composed if operator == "Convolution"]
        assert len(told) == 53 and all(
            a["cudnn_algo_fwd"] == 1 and a["cudnn_algo_verbose"] is True for a in told
        )


def test_the_double_refuses_what_mxnet_refuses(monkeypatch):
    vendor_registry.install(monkeypatch)
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
            "switch",
        ),
    ]:
        with pytest.raises(mx.base.MXNetError, match=complaint):
            compose()
