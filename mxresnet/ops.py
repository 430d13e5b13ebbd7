# SPDX-License-Identifier: Apache-2.0
"""The operators a network is made of. What differs between builds of MXNet is here and nowhere else.

An op set offers conv_bn, relu, add_relu, max_pool and head on Features. conv_bn returns a feature whose batch norm may
still be unapplied: relu or add_relu, which always follow, may fuse it with what they do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, List

import mxnet as mx

from mxresnet.config import FIELDS, FORK, GPU, Config, flag_of
from mxresnet.group_bn import GROUP_BATCH_NORM

_AXES = {("NCHW", "NHWC"): (0, 2, 3, 1), ("NHWC", "NCHW"): (0, 3, 1, 2)}
_CONV_WORKSPACE_MIB = 2048


@dataclass(frozen=True)
class Feature:
    """A symbol and the layout of its four axes."""

    symbol: Any
    layout: str


class PlainOps:
    """MXNet's stock operators: the meaning that every other op set must reproduce."""

    def __init__(self, config: Config):
        self._config = config

    def _to(self, x: Feature, layout: str) -> Any:
        return x.symbol if x.layout == layout else mx.sym.transpose(x.symbol, axes=_AXES[x.layout, layout])

    def input(self, name: str) -> Feature:
        return Feature(mx.sym.var(name), self._config.input_layout)

    def conv_bn(self, x: Feature, conv: str, bn: str, filters: int, kernel: int, stride: int) -> Feature:
        """Convolution without bias, padded to keep the size at stride 1, then batch norm over the channels."""
        config = self._config
        y = mx.sym.Convolution(
            self._to(x, config.conv_layout), name=conv, num_filter=filters, kernel=(kernel, kernel),
            stride=(stride, stride), pad=(kernel // 2, kernel // 2), no_bias=True, layout=config.conv_layout,
            workspace=_CONV_WORKSPACE_MIB)
        return Feature(self._batch_norm(self._to(Feature(y, config.conv_layout), config.batchnorm_layout), bn), config.batchnorm_layout)

    def _batch_norm(self, x: Any, name: str) -> Any:
        config = self._config
        return mx.sym.BatchNorm(
            x, name=name, fix_gamma=False, eps=config.batchnorm_eps, momentum=config.batchnorm_mom,
            axis=config.batchnorm_layout.index("C"))

    def relu(self, x: Feature, name: str) -> Feature:
        return Feature(mx.sym.Activation(x.symbol, act_type="relu", name=name), x.layout)

    def add_relu(self, x: Feature, shortcut: Feature, name: str) -> Feature:
        return self.relu(Feature(x.symbol + self._to(shortcut, x.layout), x.layout), name)

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
        y = mx.sym.FullyConnected(mx.sym.Flatten(y), num_hidden=classes, name="fc1")
        if self._config.dtype != "float32":
            y = mx.sym.Cast(y, dtype="float32")
        return mx.sym.SoftmaxOutput(y, smooth_alpha=self._config.label_smoothing, name="softmax")


class GroupOps(PlainOps):
    """PlainOps whose batch norms share their statistics among a group of ranks (--bn-group)."""

    def _batch_norm(self, x: Any, name: str) -> Any:
        config = self._config
        statistics = {
            "moving_mean": mx.sym.var(f"{name}_moving_mean", init=mx.init.Zero()),
            "moving_var": mx.sym.var(f"{name}_moving_var", init=mx.init.One())}
        return mx.sym.Custom(
            data=x, **statistics, name=name, op_type=GROUP_BATCH_NORM, layer=name, eps=config.batchnorm_eps, momentum=config.batchnorm_mom,
            axis=config.batchnorm_layout.index("C"))


def op_set(config: Config) -> PlainOps:
    return GroupOps(config) if config.bn_group > 1 else PlainOps(config)


def without_effect(config: Config, on_gpu: bool) -> List[str]:
    """What was asked for and cannot be had on this build of MXNet or this device, each as half a sentence."""
    said = []
    for note, missing in ((FORK, True), (GPU, not on_gpu)):
        flags = [flag_of(name) for name, item in FIELDS.items() if item.metadata["note"] == note and getattr(config, name) != item.default]
        if flags and missing:
            said.append(f"{', '.join(flags)}: {note} only, no effect here")
    if config.network not in ("resnet-v1b", "resnet-v1b-fl"):
        said.append(f"--network {config.network}: its operators are not in this MXNet; Convolution, BatchNorm and Activation compute the same")
    return said
