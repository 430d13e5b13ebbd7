# SPDX-License-Identifier: Apache-2.0
"""The operators a network is made of. What differs between builds of MXNet is here and nowhere else.

An op set offers input, conv_bn, relu, add_relu, max_pool and head on Features. conv_bn returns a feature whose batch norm
may still be to do: relu or add_relu, which always follow, may fuse it with what they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, List

import mxnet as mx
import numpy as np

from mxresnet.config import FIELDS, FORK, GPU, Config, flag_of
from mxresnet.group_bn import GROUP_BATCH_NORM

_AXES = {("NCHW", "NHWC"): (0, 2, 3, 1), ("NHWC", "NCHW"): (0, 3, 1, 2)}
_CONV_WORKSPACE_MIB = 2048
_BFLOAT16 = np.dtype([("bfloat16", np.uint16)])  # MXNet's way to say it


@dataclass(frozen=True)
class Feature:
    """A symbol, the layout of its four axes, and the name of the batch norm that it still lacks, if any."""

    symbol: Any
    layout: str
    norm: str = ""


class PlainOps:
    """MXNet's stock operators: the meaning that every other op set must reproduce."""

    def __init__(self, config: Config):
        self._config = config

    def _to(self, x: Feature, layout: str) -> Any:
        return x.symbol if x.layout == layout else mx.sym.transpose(x.symbol, axes=_AXES[x.layout, layout])

    def _low(self, x: Any) -> Any:
        """To bfloat16, where that is asked for. Arguments, gradients and optimizer stay in float32: the master weights."""
        return mx.sym.amp_cast(x, dtype=_BFLOAT16) if self._config.dtype == "bfloat16" else x

    def input(self, name: str) -> Feature:
        return Feature(self._low(mx.sym.var(name, dtype=self._config.input_dtype)), self._config.input_layout)

    def conv_bn(self, x: Feature, conv: str, bn: str, filters: int, kernel: int, stride: int) -> Feature:
        """Convolution without bias, padded to keep the size at stride 1, then batch norm over the channels."""
        config = self._config
        weight = self._low(mx.sym.var(f"{conv}_weight", dtype=config.input_dtype))
        y = mx.sym.Convolution(
            self._to(x, config.conv_layout), weight, name=conv, num_filter=filters, kernel=(kernel, kernel),
            stride=(stride, stride), pad=(kernel // 2, kernel // 2), no_bias=True, layout=config.conv_layout,
            workspace=_CONV_WORKSPACE_MIB)
        return self._normed(Feature(self._to(Feature(y, config.conv_layout), config.batchnorm_layout), config.batchnorm_layout, bn))

    def _norm_attributes(self, name: str) -> dict:
        config = self._config
        return {
            "name": name, "fix_gamma": False, "eps": config.batchnorm_eps, "momentum": config.batchnorm_mom,
            "axis": config.batchnorm_layout.index("C")}

    def _normed(self, x: Feature) -> Feature:
        return Feature(mx.sym.BatchNorm(x.symbol, **self._norm_attributes(x.norm)), x.layout) if x.norm else x

    def relu(self, x: Feature, name: str) -> Feature:
        return Feature(mx.sym.Activation(x.symbol, act_type="relu", name=name), x.layout)

    def add_relu(self, x: Feature, shortcut: Feature, name: str) -> Feature:
        return PlainOps.relu(self, Feature(x.symbol + self._to(shortcut, x.layout), x.layout), name)

    def max_pool(self, x: Feature, name: str) -> Feature:
        """3 x 3 maximum at stride 2."""
        layout = self._config.pooling_layout
        y = mx.sym.Pooling(
            self._to(x, layout), kernel=(3, 3), stride=(2, 2), pad=(1, 1), pool_type="max", layout=layout, name=name)
        return Feature(y, layout)

    def head(self, x: Feature, classes: int) -> Any:
        """Global average pool, fully connected layer, softmax with (smoothed) cross-entropy gradient in float32."""
        layout = self._config.pooling_layout
        y = mx.sym.Pooling(
            self._to(x, layout), kernel=(7, 7), global_pool=True, pool_type="avg", layout=layout, name="pool1")
        y = mx.sym.Flatten(y)
        if self._config.dtype == "bfloat16":
            y = mx.sym.amp_cast(y, dtype="float32")
        y = mx.sym.FullyConnected(y, num_hidden=classes, name="fc1")
        if self._config.dtype == "float16":
            y = mx.sym.Cast(y, dtype="float32")
        return mx.sym.SoftmaxOutput(y, smooth_alpha=self._config.label_smoothing, name="softmax")


class FusedCpuOps(PlainOps):
    """Batch norm and the ReLU after it as oneDNN's one operator (--fuse-bn-relu on a CPU): one pass over memory less."""

    def _normed(self, x: Feature) -> Feature:
        return x  # left to relu and add_relu

    def relu(self, x: Feature, name: str) -> Feature:
        return Feature(mx.sym.contrib.BatchNormWithReLU(x.symbol, **self._norm_attributes(x.norm)), x.layout)

    def add_relu(self, x: Feature, shortcut: Feature, name: str) -> Feature:
        return super().add_relu(super()._normed(x), super()._normed(shortcut), name)


class GroupOps(PlainOps):
    """PlainOps whose batch norms share their statistics among a group of ranks (--bn-group)."""

    def _normed(self, x: Feature) -> Feature:
        config = self._config
        statistics = {
            "moving_mean": mx.sym.var(f"{x.norm}_moving_mean", init=mx.init.Zero()),
            "moving_var": mx.sym.var(f"{x.norm}_moving_var", init=mx.init.One())}
        y = mx.sym.Custom(
            data=x.symbol, **statistics, name=x.norm, op_type=GROUP_BATCH_NORM, layer=x.norm, eps=config.batchnorm_eps,
            momentum=config.batchnorm_mom, axis=config.batchnorm_layout.index("C"))
        return Feature(y, x.layout)


def op_set(config: Config, on_gpu: bool) -> PlainOps:
    """The fastest op set that this build of MXNet has for what is asked."""
    if config.bn_group > 1:
        return GroupOps(config)
    fused = config.fuse_bn_relu and not on_gpu and config.batchnorm_layout == "NCHW" and hasattr(mx.sym.contrib, "BatchNormWithReLU")
    return FusedCpuOps(config) if fused else PlainOps(config)


def without_effect(config: Config, on_gpu: bool) -> List[str]:
    """What was asked for and cannot be had on this build of MXNet or this device, each as half a sentence."""
    said = []
    for note, missing in ((FORK, True), (GPU, not on_gpu)):
        flags = [flag_of(name) for name, item in FIELDS.items() if item.metadata["note"] == note and getattr(config, name) != item.default]
        if note == FORK and config.fuse_bn_relu and not isinstance(op_set(config, on_gpu), FusedCpuOps):
            flags.insert(0, "--fuse-bn-relu")
        if flags and missing:
            said.append(f"{', '.join(flags)}: {note} only, no effect here")
    if config.network not in ("resnet-v1b", "resnet-v1b-fl"):
        said.append(f"--network {config.network}: its operators are not in this MXNet; Convolution, BatchNorm and Activation compute the same")
    return said
