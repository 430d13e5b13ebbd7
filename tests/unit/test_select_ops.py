# SPDX-License-Identifier: Apache-2.0
"""The selection of the operator backend, and the report of settings without effect."""

import dataclasses
import json

import mxnet as mx
import pytest
from support import fake_nvidia_ops
from support.nvidia_settings import FUSED, NVIDIA_SETTINGS

from mxresnet.config import FIELDS, Config
from mxresnet.model import resnet
from mxresnet.model import select_ops as selection
from mxresnet.model.ops import (
    CudnnBnOps,
    FusedCpuOps,
    PlainOps,
    SyncBatchNormOps,
)
from mxresnet.model.ops_nvidia import FusedBnOps
from mxresnet.model.select_ops import (
    CUDA_GRAPHS,
    NOT_TRIED,
    cudnn_bn_unavailable_reason,
    disable_cuda_graphs,
    select_ops,
)


def ignored_settings(config, on_gpu, reason=NOT_TRIED):
    ops = select_ops(config, on_gpu, reason)
    return selection.ignored_settings(config, ops, on_gpu, reason)


@pytest.mark.parametrize(
    "missing, left",
    [
        ("BatchNormAddRelu", PlainOps),
        ("BatchNorm", PlainOps),
        ("BNStatsFinalize", FusedBnOps),
        ("ScaleBiasAddRelu", FusedBnOps),
        ("NormConvolution", FusedBnOps),
        ("NormalizedConvolution", FusedBnOps),
    ],
)
def test_build_without_an_operator_falls_back_and_reports_it(monkeypatch, missing, left):
    fake_nvidia_ops.install(monkeypatch, without=[missing])
    config = Config(network="resnet-v1b-stats-fl", **NVIDIA_SETTINGS)
    assert type(select_ops(config, on_gpu=True)) is left
    lines = ignored_settings(config, on_gpu=True)
    assert (
        "--network resnet-v1b-stats-fl: its operators are not available" in lines[-1]
        and left.networks[0] in lines[-1]
    )
    plain = left is PlainOps  # in NCHW
    assert (lines[0].startswith("--fuse-bn-relu, --fuse-bn-add-relu: ")) == plain and len(
        lines
    ) == 1 + 2 * plain
    assert (
        any(
            "this project's batch norms were not tried; MXNet's own operators are used in NCHW"
            in text
            for text in lines
        )
        == plain
    )


@pytest.mark.parametrize(
    "change, on_gpu, left",
    [
        ({"dtype": "float32"}, True, PlainOps),
        ({"conv_layout": "NCHW"}, True, PlainOps),
        ({"batchnorm_layout": "NCHW"}, True, PlainOps),
        ({"bn_group": 2}, True, SyncBatchNormOps),
        ({}, False, PlainOps),
        ({"batchnorm_layout": "NCHW"}, False, FusedCpuOps),
    ],
)
def test_settings_that_the_operators_do_not_support(monkeypatch, change, on_gpu, left):
    """NVIDIA's batch norms fail with other types and layouts; on a CPU one omits the addition."""
    fake_nvidia_ops.install(monkeypatch)
    config = Config(**{**NVIDIA_SETTINGS, **change})
    assert type(select_ops(config, on_gpu)) is left
    lines = " ".join(ignored_settings(config, on_gpu))
    assert "--fuse-bn-add-relu: NVIDIA's fused operators need a GPU, --dtype float16" in lines
    note = (
        "--bn-group 2: functional only, not for measurements: every batch norm sums its "
        "statistics through the hosts, 159 times a step"
    )
    assert (note in lines) == ("bn_group" in change)


def test_bn_group_shares_all_statistics():
    """Its resnet-v1b-stats-fl shares the statistics of bn0 only."""
    for group in (1, 2):
        (lines,) = ignored_settings(
            Config(network="resnet-v1b-stats-fl", bn_group=group), on_gpu=False
        )
        assert lines.endswith(
            "those of resnet-v1b compute the same"
            + " and share all statistics, not only some as there" * (group - 1)
        )


def test_public_mxnet_does_not_fuse_batch_norms_of_a_group():
    lines = ignored_settings(Config(bn_group=2, **FUSED), on_gpu=False)
    assert lines == [
        "--fuse-bn-relu, --fuse-bn-add-relu: not together with --bn-group, no effect here"
    ]


def test_settings_of_nvidias_mxnet_are_reported_elsewhere(monkeypatch):
    config = Config(
        conv_algo=1,
        force_tensor_core=1,
        verbose=1,
        e2e_cuda_graphs=1,
        dali_hw_decoder_load=0.5,
        **FUSED,
    )
    fused = (
        "--fuse-bn-add-relu: NVIDIA's MXNet or this project's batch norms on a GPU only, "
        "no effect here"
    )
    nvidia = (
        "--conv-algo, --force-tensor-core, --verbose, --e2e-cuda-graphs: NVIDIA's MXNet only, "
        "no effect here"
    )
    assert ignored_settings(config, on_gpu=False) == [
        fused,
        nvidia,
        "--dali-hw-decoder-load: GPU only, no effect here",
    ]
    assert ignored_settings(config, on_gpu=True) == ["--fuse-bn-relu, " + fused, nvidia]
    fake_nvidia_ops.install(monkeypatch)
    there = Config(**{**{name: getattr(config, name) for name in FIELDS}, **NVIDIA_SETTINGS})
    assert ignored_settings(there, on_gpu=True) == [
        "--e2e-cuda-graphs: not implemented by this program, no effect here"
    ]
    assert (
        "--conv-algo, --force-tensor-core, --verbose, --dali-hw-decoder-load: GPU only, "
        "no effect here" in ignored_settings(there, False)
    )


def test_nhwc_batch_norms_of_public_mxnet_on_a_gpu():
    """CudnnBnOps if it can be used, else stock operators in NCHW: cuDNN may refuse them in NHWC."""
    config = Config(**{**NVIDIA_SETTINGS, "network": "resnet-v1b-fl"})
    assert (
        type(select_ops(config, True, None)) is CudnnBnOps
        and ignored_settings(config, True, None) == []
    )
    assert type(select_ops(config, True, None).for_evaluation()) is CudnnBnOps
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


def test_cuda_graphs_are_for_nvidias_operators_only():
    environ = {CUDA_GRAPHS: "1"}
    assert disable_cuda_graphs(CudnnBnOps(Config()), False, environ) is None
    assert disable_cuda_graphs(FusedBnOps(Config()), True, environ) is None
    assert environ == {CUDA_GRAPHS: "1"}
    note = disable_cuda_graphs(CudnnBnOps(Config()), True, environ)
    assert note.startswith("MXNET_ENABLE_CUDA_GRAPHS: off") and environ == {CUDA_GRAPHS: "0"}
    assert disable_cuda_graphs(CudnnBnOps(Config()), True, environ) is None
