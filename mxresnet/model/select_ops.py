# SPDX-License-Identifier: Apache-2.0
"""Select the operator backend that this build of MXNet can run; list the settings it ignores."""

from __future__ import annotations

from typing import Any, Dict, List, MutableMapping, Optional, Type

import mxnet as mx

from mxresnet.config import FIELDS, Config, flag_of
from mxresnet.config_field import FUSED, GPU, NVIDIA_MXNET
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
from mxresnet.model.resnet import layer_names
from mxresnet.model.sync_batch_norm import SUMS_PER_STEP

# Backends of NVIDIA's MXNet. The last one can run any of the reference's networks.
VENDOR_OPS = (ConvStatsOps, NormConvOps, NormConvAddReluOps, FusedBnOps)
# The reference's dbar network projects its shortcuts with NormConvOps' or FusedBnOps' operators,
# depending on the stride.
CLOSEST_NETWORK = {"resnet-v1b-dbar-fl": "resnet-v1b-dbar2-fl"}
CUDNN_SETTINGS = ("conv_algo", "force_tensor_core", "verbose")
VENDOR_REQUIREMENTS = (
    "NVIDIA's fused operators need a GPU, --dtype float16, --conv-layout and --batchnorm-layout "
    "NHWC, --bn-group 1"
)
CUDA_GRAPHS = "MXNET_ENABLE_CUDA_GRAPHS"
NOT_TRIED = "this project's batch norms were not tried"


def _needs_channel_last_batch_norm(config: Config, on_gpu: bool) -> bool:
    """Return whether the settings need a batch norm whose stock operator is unreliable.

    MXNet's BatchNorm describes channel-last data to cuDNN as N * H * W images of one pixel. cuDNN
    refuses too many of them (112 x 112 pixels: from a batch of 71 on).
    """
    return on_gpu and config.bn_group == 1 and config.batchnorm_layout == LAYOUT


def _select_nvidia_ops(config: Config, on_gpu: bool) -> Optional[Type[FusedBnOps]]:
    """Return the backend of VENDOR_OPS for config.network; None without the operators it needs."""
    layouts = (config.conv_layout, config.batchnorm_layout)
    usable = on_gpu and config.bn_group == 1 and config.dtype == "float16"
    if not usable or layouts != (LAYOUT, LAYOUT):
        return None
    network = CLOSEST_NETWORK.get(config.network, config.network)
    for ops in VENDOR_OPS:
        wanted = network in ops.networks or ops is FusedBnOps
        if wanted and all(accepts(*need) for need in ops.required_operators):
            return ops
    return None


def cudnn_bn_unavailable_reason(config: Config, device: Any) -> Optional[str]:
    """Return why this project's batch norms cannot be used on the device; None when they can.

    Where the settings need them, this runs their self-test, which takes seconds. The result may
    differ between ranks; the caller must pass the same one to select_ops() on every rank.
    """
    on_gpu = device.device_type == "gpu"
    if not _needs_channel_last_batch_norm(config, on_gpu) or _select_nvidia_ops(config, on_gpu):
        return NOT_TRIED
    if config.dtype != "float16" or config.conv_layout != LAYOUT:
        return "this project's batch norms need --dtype float16 and --conv-layout NHWC"
    return CudnnBnOps.unavailable_reason(device, config.batch_size)


def select_ops(
    config: Config, on_gpu: bool, cudnn_bn_reason: Optional[str] = NOT_TRIED
) -> PlainOps:
    """Return the fastest operator backend that this build of MXNet has for the settings.

    Args:
        config: the run's settings.
        on_gpu: whether the network runs on a GPU.
        cudnn_bn_reason: result of cudnn_bn_unavailable_reason(), the same on every rank.
    """
    if config.bn_group > 1:
        # NVIDIA's operators can exchange statistics through CUDA IPC buffers. This project does not
        # use that: it could not be tested without GPUs.
        return SyncBatchNormOps(config)
    nvidia_ops = _select_nvidia_ops(config, on_gpu)
    if nvidia_ops:
        return nvidia_ops(config)
    if _needs_channel_last_batch_norm(config, on_gpu):
        if cudnn_bn_reason is None:
            return CudnnBnOps(config)
        return PlainOps(channel_first(config))
    fused = (
        config.fuse_bn_relu
        and not on_gpu
        and config.batchnorm_layout == "NCHW"
        and hasattr(mx.sym.contrib, "BatchNormWithReLU")
    )
    return FusedCpuOps(config) if fused else PlainOps(config)


def disable_cuda_graphs(
    ops: PlainOps, on_gpu: bool, environ: MutableMapping[str, str]
) -> Optional[str]:
    """Turn MXNET_ENABLE_CUDA_GRAPHS off where it only costs time; return a note if it was on.

    MXNet reads the variable when it binds a network. Public MXNet 1.9.1 leaves external operators
    out of its graphs, so that each graph has a few operators only, and it captures a graph again
    whenever the address of a temporary array has changed (src/executor/cuda_graphs.h).

    Args:
        ops: the backend that select_ops() returned.
        on_gpu: whether the network runs on a GPU.
        environ: the variables of this process, os.environ; it may change.
    """
    if not on_gpu or isinstance(ops, FusedBnOps) or environ.get(CUDA_GRAPHS) in (None, "", "0"):
        return None
    environ[CUDA_GRAPHS] = "0"
    return f"{CUDA_GRAPHS}: off, because public MXNet gains nothing from it"


def _ignored_reason(name: str, ops: PlainOps, on_gpu: bool) -> Optional[str]:
    """Return why a setting has no effect; None when it has one."""
    requires = FIELDS[name].metadata["requires"]
    gpu_only = None if on_gpu else f"{GPU} only"
    if requires == GPU:
        return gpu_only
    needs_backend = requires in (NVIDIA_MXNET, FUSED) or name == "fuse_bn_relu"
    if name in ops.supported_settings or not needs_backend:
        return None
    if name in CUDNN_SETTINGS and accepts("Convolution", "cudnn_algo_fwd"):
        return gpu_only
    if not accepts("BatchNormAddRelu"):
        if name not in CudnnBnOps.supported_settings:
            return f"{NVIDIA_MXNET} only"
        if isinstance(ops, SyncBatchNormOps):
            return "not together with --bn-group"
        return f"{FUSED} only"
    return VENDOR_REQUIREMENTS if name.startswith("fuse") else "not implemented by this program"


def ignored_settings(
    config: Config, ops: PlainOps, on_gpu: bool, cudnn_bn_reason: Optional[str] = NOT_TRIED
) -> List[str]:
    """Return one line for each group of settings that has no effect with this backend and device.

    Args:
        config: the run's settings.
        ops: the backend that select_ops() returned for them.
        on_gpu: whether the network runs on a GPU.
        cudnn_bn_reason: result of cudnn_bn_unavailable_reason(), the same on every rank.
    """
    flags: Dict[str, List[str]] = {}
    for name, item in FIELDS.items():
        if getattr(config, name) != item.default:
            reason = _ignored_reason(name, ops, on_gpu)
            if reason:
                flags.setdefault(reason, []).append(flag_of(name))
    lines = [f"{', '.join(names)}: {why}, no effect here" for why, names in flags.items()]
    if _needs_channel_last_batch_norm(config, on_gpu) and type(ops) is PlainOps:
        lines.append(
            f"--batchnorm-layout {LAYOUT}: {cudnn_bn_reason}; MXNet's own operators are used in "
            "NCHW, which compute the same result more slowly"
        )
    if config.network not in ops.networks:
        shared = " and share all statistics, not only some as there" if config.bn_group > 1 else ""
        lines.append(
            f"--network {config.network}: its operators are not available (this MXNet, this device "
            f"or these settings); those of {ops.networks[0]} compute the same{shared}"
        )
    if config.bn_group > 1 and on_gpu:
        layers = len(layer_names(config.num_layers))
        lines.append(
            f"--bn-group {config.bn_group}: functional only, not for measurements: every batch "
            f"norm sums its statistics through the hosts, {layers * SUMS_PER_STEP} times a step, "
            "and waits for the GPU each time (docs/launching.md)"
        )
    return lines
