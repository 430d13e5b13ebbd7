# SPDX-License-Identifier: Apache-2.0
"""Which op set a run gets, by looking at what this build of MXNet has, and what was asked for in vain."""

from __future__ import annotations

from typing import List

import mxnet as mx

from mxresnet.config import FIELDS, FORK, GPU, Config, flag_of
from mxresnet.ops import FusedCpuOps, GroupOps, PlainOps


def op_set(config: Config, on_gpu: bool) -> PlainOps:
    """The fastest op set that this build of MXNet has for what is asked."""
    if config.bn_group > 1:
        return GroupOps(config)
    fused = config.fuse_bn_relu and not on_gpu and config.batchnorm_layout == "NCHW" and hasattr(mx.sym.contrib, "BatchNormWithReLU")
    return FusedCpuOps(config) if fused else PlainOps(config)


def without_effect(config: Config, on_gpu: bool) -> List[str]:
    """What was asked for and cannot be had on this build of MXNet or this device, each as half a sentence."""
    said = []
    ops = op_set(config, on_gpu)
    for note, missing in ((FORK, True), (GPU, not on_gpu)):
        names = [name for name, item in FIELDS.items() if item.metadata["note"] == note and getattr(config, name) != item.default]
        if note == FORK and config.fuse_bn_relu:
            names.insert(0, "fuse_bn_relu")
        flags = [flag_of(name) for name in names if name not in ops.honours]
        if flags and missing:
            said.append(f"{', '.join(flags)}: {note} only, no effect here")
    if config.network not in ops.networks:
        said.append(f"--network {config.network}: its operators are not in this MXNet; Convolution, BatchNorm and Activation compute the same")
    return said
