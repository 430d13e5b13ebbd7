# SPDX-License-Identifier: Apache-2.0
"""The operators, attributes and types of the networks for NVIDIA's MXNet, on a fake of it."""

import collections
import os

import numpy as np
import pytest
from support import fake_nvidia_ops
from support.nvidia_settings import NVIDIA_SETTINGS

from mxresnet.config import Config
from mxresnet.config_network import NETWORKS
from mxresnet.config_parser import parse
from mxresnet.launch.system_config import load_configuration
from mxresnet.model import resnet
from mxresnet.model.ops import PlainOps, SyncBatchNormOps
from mxresnet.model.ops_nvidia import ConvStatsOps, FusedBnOps, NormConvAddReluOps, NormConvOps
from mxresnet.model.select_ops import VENDOR_OPS, ignored_settings, select_ops


def ignored_on_gpu(config):
    return ignored_settings(config, select_ops(config, on_gpu=True), on_gpu=True)


def count_calls(registry):
    return collections.Counter(operator for operator, _, _ in registry.calls)


def built(registry, ops, **more):
    """A network of a published size, and what it was composed of."""
    config = Config(batch_size=408, image_shape=(4, 224, 224), **NVIDIA_SETTINGS, **more)
    assert type(select_ops(config, on_gpu=True)) is ops
    return resnet.build(select_ops(config, on_gpu=True), config, 1000), count_calls(registry)


OPERATORS = {
    FusedBnOps: {"Convolution": 53, "BatchNorm": 1 + 32 + 4, "BatchNormAddRelu": 16},
    ConvStatsOps: {
        "Convolution": 1,
        "BatchNorm": 1,
        "NormConvolution": 16,
        "NormalizedConvolution": 36,
        "BNStatsFinalize": 52,
        "ScaleBiasAddRelu": 32 + 12 + 4,
    },
    NormConvOps: {
        "Convolution": 1,
        "BatchNorm": 1,
        "NormConvolution": 48,
        "NormalizedConvolution": 4,
        "BNStatsFinalize": 20,
        "ScaleBiasAddRelu": 12 + 4,
    },
    NormConvAddReluOps: {
        "Convolution": 1,
        "BatchNorm": 1 + 4,
        "NormConvolution": 48,
        "NormalizedConvolution": 4,
        "BatchNormAddRelu": 16,
    },
}
BACKENDS = {
    "resnet-v1b": FusedBnOps,
    "resnet-v1b-fl": FusedBnOps,
    "resnet-v1b-mod-fl": FusedBnOps,
    "resnet-v1b-normconv-fl": NormConvAddReluOps,
    "resnet-v1b-stats-fl": ConvStatsOps,
    "resnet-v1b-dbar-fl": NormConvOps,
    "resnet-v1b-dbar2-fl": NormConvOps,
    "resnet-v1b-mainloop-fl": NormConvOps,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_each_network_of_the_reference_has_its_operators(monkeypatch, name):
    registry = fake_nvidia_ops.install(monkeypatch, data_type=np.float16, stats_type=np.float32)
    _, used = built(registry, BACKENDS[name], network=name)
    assert used == {**OPERATORS[BACKENDS[name]], "FullyConnected": 1}
    lines = ignored_on_gpu(Config(network=name, **NVIDIA_SETTINGS))
    assert [text for text in lines if "resnet-v1b-dbar-fl" not in text] == []
    assert len(lines) == (name == "resnet-v1b-dbar-fl")


@pytest.mark.parametrize("ops", VENDOR_OPS)
def test_types_are_float16_and_float32_where_the_operators_want_them(monkeypatch, ops):
    registry = fake_nvidia_ops.install(monkeypatch, data_type=np.float16, stats_type=np.float32)
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
    """The attributes of the operators of resnet-v1b-stats-fl, on 8 GPUs."""
    registry = fake_nvidia_ops.install(monkeypatch, data_type=np.float16, stats_type=np.float32)
    config, _ = parse([], load_configuration("DGXA100", {"PATH": os.environ["PATH"]}))
    assert ignored_on_gpu(config) == []
    resnet.build(select_ops(config, on_gpu=True), config, 1000)
    calls = {name: (operator, a) for operator, name, a in registry.calls}
    operator, conv0 = calls["conv0"]
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
        calls["fc1"][1]["cublas_algo_verbose"] is False
        and calls["bn0"][1]["act_type"] == "relu"
        and calls["bn0"][1]["bn_group"] == 1
    )
    size = {1: 56, 2: 28, 3: 14, 4: 7}
    for operator, name, a in registry.calls:
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


def test_backends_set_cudnn_algorithms_if_mxnet_has_the_attributes(monkeypatch):
    for ops in (PlainOps, SyncBatchNormOps):
        assert (
            "cudnn"
            not in resnet.build(ops(Config(conv_algo=1)), Config(conv_algo=1), 1000).tojson()
        )
    registry = fake_nvidia_ops.install(monkeypatch)
    for ops in (PlainOps, SyncBatchNormOps):
        registry.calls.clear()
        config = Config(conv_algo=1, verbose=2)
        resnet.build(ops(config), config, 1000)
        attrs = [a for operator, _, a in registry.calls if operator == "Convolution"]
        assert len(attrs) == 53 and all(
            a["cudnn_algo_fwd"] == 1 and a["cudnn_algo_verbose"] is True for a in attrs
        )
