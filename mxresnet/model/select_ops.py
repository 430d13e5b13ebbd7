# SPDX-License-Identifier: Apache-2.0
"""Which op set a run gets, by looking at what this build of MXNet has, and what was asked for in vain."""

from __future__ import annotations

from typing import Any, Dict, List

import mxnet as mx

from mxresnet.config import FIELDS, FUSED, GPU, NVIDIA_MXNET, Config, flag_of
from mxresnet.model.ops import (
    CudnnBnOps,
    FusedCpuOps,
    PlainOps,
    SyncBatchNormOps,
    accepts,
    channel_first,
)
from mxresnet.model.ops_nvidia import (
    LAYOUT,
    ConvStatsOps,
    FusedBnOps,
    NormConvAddReluOps,
    NormConvOps,
)

VENDOR_OPS = (ConvStatsOps, NormConvOps, NormConvAddReluOps, FusedBnOps)
# This one projects its shortcuts by NormConvOps' operators or FusedBnOps', as their stride is.
CLOSEST = {"resnet-v1b-dbar-fl": "resnet-v1b-dbar2-fl"}
CUDNN = ("conv_algo", "force_tensor_core", "verbose")
VENDOR_WANTS = "NVIDIA's fused operators want a GPU, --dtype float16, --conv-layout and --batchnorm-layout NHWC, --bn-group 1"


NOT_TRIED = "this project's batch norms were not tried"


def _channels_last(config: Config, on_gpu: bool) -> bool:
    """Whether it asks for batch norms whose stock operator cannot be relied on: it describes channel-last data to cuDNN as
    N * H * W images of one pixel, which cuDNN refuses from some number on (at 112 x 112 from a batch of 71).
    """
    return on_gpu and config.bn_group == 1 and config.batchnorm_layout == LAYOUT


def cudnn_bn_unavailable_reason(config: Config, device: Any) -> str:
    """Why our own batch norms cannot be used, or nothing; half a sentence. Where they are of use, this tries them, which
    takes seconds. Ranks may differ: let them agree.
    """
    on_gpu = device.device_type == "gpu"
    if not _channels_last(config, on_gpu) or isinstance(select_ops(config, on_gpu), FusedBnOps):
        return NOT_TRIED
    if config.dtype != "float16" or config.conv_layout != LAYOUT:
        return "this project's batch norms want --dtype float16 and --conv-layout NHWC"
    return CudnnBnOps.unavailable_reason(device, config.batch_size) or ""


def select_ops(config: Config, on_gpu: bool, problem: str = NOT_TRIED) -> PlainOps:
    """The fastest op set that this build of MXNet has for what is asked; problem is cudnn_bn_unavailable_reason()'s answer."""
    if config.bn_group > 1:
        # NVIDIA's batch norms exchange statistics through buffers that its processes open in each other's GPUs; that can only be
        # written where it can be run.
        return SyncBatchNormOps(config)
    if (
        on_gpu
        and config.dtype == "float16"
        and config.conv_layout == config.batchnorm_layout == LAYOUT
    ):
        network = CLOSEST.get(config.network, config.network)
        for ops in VENDOR_OPS:
            if (network in ops.networks or ops is FusedBnOps) and all(
                accepts(*need) for need in ops.required_operators
            ):
                return ops(config)
    if _channels_last(config, on_gpu):
        if not problem:
            return CudnnBnOps(config)
        return PlainOps(channel_first(config))
    fused = (
        config.fuse_bn_relu
        and not on_gpu
        and config.batchnorm_layout == "NCHW"
        and hasattr(mx.sym.contrib, "BatchNormWithReLU")
    )
    return FusedCpuOps(config) if fused else PlainOps(config)


def _ignored_reason(name: str, ops: PlainOps, on_gpu: bool) -> str:
    """Why a setting has no effect, or nothing."""
    note = FIELDS[name].metadata["note"]
    if note == GPU:
        return "" if on_gpu else f"{GPU} only"
    if name in ops.supported_settings or (
        note not in (NVIDIA_MXNET, FUSED) and name != "fuse_bn_relu"
    ):
        return ""
    if name in CUDNN and accepts("Convolution", "cudnn_algo_fwd"):
        return "" if on_gpu else f"{GPU} only"
    if not accepts("BatchNormAddRelu"):
        if name not in CudnnBnOps.supported_settings:
            return f"{NVIDIA_MXNET} only"
        return (
            "not together with --bn-group" if isinstance(ops, SyncBatchNormOps) else f"{FUSED} only"
        )
    return VENDOR_WANTS if name.startswith("fuse") else "not done by this program"


def ignored_settings(config: Config, on_gpu: bool, problem: str = NOT_TRIED) -> List[str]:
    """What was asked for and cannot be had on this build of MXNet or this device, each as half a sentence."""
    ops = select_ops(config, on_gpu, problem)
    flags: Dict[str, List[str]] = {}
    for name, item in FIELDS.items():
        if getattr(config, name) != item.default:
            flags.setdefault(_ignored_reason(name, ops, on_gpu), []).append(flag_of(name))
    said = [f"{', '.join(names)}: {why}, no effect here" for why, names in flags.items() if why]
    if _channels_last(config, on_gpu) and type(ops) is PlainOps:
        said.append(
            f"--batchnorm-layout {LAYOUT}: {problem}; MXNet's own operators are used in NCHW, which computes the same, slower"
        )
    if config.network not in ops.networks:
        said.append(
            f"--network {config.network}: its operators are not here (this MXNet, this device or these settings); those of "
            f"{ops.networks[0]} compute the same"
            + " and share all statistics, not only some as there"
            * (config.bn_group > 1)
        )
    if config.bn_group > 1 and on_gpu:
        said.append(
            f"--bn-group {config.bn_group}: every batch norm adds up its statistics through the hosts, which is slow"
        )
    return said
