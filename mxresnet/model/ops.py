# SPDX-License-Identifier: Apache-2.0
"""The operators a network is made of, on any build of MXNet. vendor_ops.py has those of NVIDIA's, op_sets.py chooses.

An op set offers input, conv_bn, relu, add_relu, max_pool and head on Features. conv_bn returns a feature whose batch norm
is still to do: relu or add_relu, which always follow, may fuse it with what they do.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, Dict, Tuple

import mxnet as mx
import numpy as np

from mxresnet.config import Config
from mxresnet.model.cudnn_bn import runtime
from mxresnet.model.sync_batch_norm import GROUP_BATCH_NORM

_AXES = {("NCHW", "NHWC"): (0, 2, 3, 1), ("NHWC", "NCHW"): (0, 3, 1, 2)}
_CONV_WORKSPACE_MIB = 2048
_BFLOAT16 = np.dtype([("bfloat16", np.uint16)])  # MXNet's way to say it


@dataclass(frozen=True)
class Feature:
    """A symbol, the layout of its four axes, the name of the batch norm that it still lacks, if any, and what the
    convolution has already found out for it: sum and sum of squares over all but the channels; how many of these there are.
    """

    symbol: Any
    layout: str
    norm: str = ""
    sums: Tuple[Any, ...] = ()
    channels: int = 0


def channel_first(config: Config) -> Config:
    """The same network with all that is between its input and its output in NCHW."""
    return dataclasses.replace(
        config, conv_layout="NCHW", batchnorm_layout="NCHW", pooling_layout="NCHW"
    )


def accepts(operator: str, *attributes: str) -> bool:
    """Whether this build of MXNet has the operator, with these attributes: an unknown one is an error when it is used."""
    found = getattr(mx.sym, operator, None)
    return found is not None and set(attributes) <= set(inspect.signature(found).parameters)


class PlainOps:
    """MXNet's stock operators: the meaning that every other op set must reproduce."""

    networks: Tuple[str, ...] = (
        "resnet-v1b",
        "resnet-v1b-fl",
    )  # of the reference: whose operators these are
    supported_settings: Tuple[
        str, ...
    ] = ()  # settings that mean nothing to the stock operators, and something to these

    def __init__(self, config: Config):
        self._config = config

    def for_evaluation(self) -> PlainOps:
        """The op set of the network that is evaluated: another one where these operators can only train."""
        return self

    def _to(self, x: Feature, layout: str) -> Any:
        return (
            x.symbol
            if x.layout == layout
            else mx.sym.transpose(x.symbol, axes=_AXES[x.layout, layout])
        )

    def _low(self, x: Any) -> Any:
        """To bfloat16, where that is asked for. Arguments, gradients and optimizer stay in float32: the master weights."""
        return mx.sym.amp_cast(x, dtype=_BFLOAT16) if self._config.dtype == "bfloat16" else x

    def input(self, name: str) -> Feature:
        return Feature(
            self._low(mx.sym.var(name, dtype=self._config.input_dtype)), self._config.input_layout
        )

    def conv_bn(
        self, x: Feature, conv: str, bn: str, filters: int, kernel: int, stride: int
    ) -> Feature:
        """Convolution without bias, padded to keep the size at stride 1, then batch norm over the channels."""
        config = self._config
        y = mx.sym.Convolution(
            self._to(x, config.conv_layout),
            self._weight(conv),
            **self._window(conv, filters, kernel, stride),
            no_bias=True,
            workspace=_CONV_WORKSPACE_MIB,
            **self._cudnn(),
        )
        layout = config.batchnorm_layout
        return Feature(
            self._to(Feature(y, config.conv_layout), layout), layout, bn, channels=filters
        )

    def _weight(self, conv: str) -> Any:
        return self._low(mx.sym.var(f"{conv}_weight", dtype=self._config.input_dtype))

    def _window(self, conv: str, filters: int, kernel: int, stride: int) -> Dict[str, Any]:
        return {
            "name": conv,
            "num_filter": filters,
            "kernel": (kernel, kernel),
            "stride": (stride, stride),
            "pad": (kernel // 2, kernel // 2),
            "layout": self._config.conv_layout,
        }

    def _cudnn(self) -> Dict[str, Any]:
        """What NVIDIA's MXNet lets one say of cuDNN's algorithms, where this is it."""
        algo = self._config.conv_algo
        said = {
            "cudnn_algo_verbose": bool(self._config.verbose),
            "cudnn_tensor_core_only": bool(self._config.force_tensor_core),
            "cudnn_algo_fwd": algo,
            "cudnn_algo_bwd_data": algo,
            "cudnn_algo_bwd_filter": algo,
        }
        return said if accepts("Convolution", *said) else {}

    def _norm_attributes(self, name: str) -> Dict[str, Any]:
        config = self._config
        return {
            "name": name,
            "fix_gamma": False,
            "eps": config.batchnorm_eps,
            "momentum": config.batchnorm_mom,
            "axis": config.batchnorm_layout.index("C"),
        }

    def _statistics(self, norm: str) -> Dict[str, Any]:
        """The running ones, with their first values, for operators that do not bring them."""
        first = {"moving_mean": mx.init.Zero(), "moving_var": mx.init.One()}
        return {kind: mx.sym.var(f"{norm}_{kind}", init=value) for kind, value in first.items()}

    def _normed(self, x: Feature) -> Feature:
        return (
            Feature(mx.sym.BatchNorm(x.symbol, **self._norm_attributes(x.norm)), x.layout)
            if x.norm
            else x
        )

    def relu(self, x: Feature, name: str) -> Feature:
        x = self._normed(x)
        return Feature(mx.sym.Activation(x.symbol, act_type="relu", name=name), x.layout)

    def add_relu(self, x: Feature, shortcut: Feature, name: str) -> Feature:
        """The shortcut is a feature that lacks its batch norm or one that lacks nothing."""
        x = self._normed(x)
        y = x.symbol + self._to(self._normed(shortcut), x.layout)
        return Feature(mx.sym.Activation(y, act_type="relu", name=name), x.layout)

    def max_pool(self, x: Feature, name: str) -> Feature:
        """3 x 3 maximum at stride 2."""
        layout = self._config.pooling_layout
        y = mx.sym.Pooling(
            self._to(x, layout),
            kernel=(3, 3),
            stride=(2, 2),
            pad=(1, 1),
            pool_type="max",
            layout=layout,
            name=name,
        )
        return Feature(y, layout)

    def head(self, x: Feature, classes: int) -> Any:
        """Global average pool, fully connected layer, softmax with (smoothed) cross-entropy gradient in float32."""
        layout = self._config.pooling_layout
        y = mx.sym.Pooling(
            self._to(x, layout),
            kernel=(7, 7),
            global_pool=True,
            pool_type="avg",
            layout=layout,
            name="pool1",
        )
        y = mx.sym.Flatten(y)
        if self._config.dtype == "bfloat16":
            y = mx.sym.amp_cast(y, dtype="float32")
        verbose = {"cublas_algo_verbose": bool(self._config.verbose)}
        y = mx.sym.FullyConnected(
            y,
            num_hidden=classes,
            name="fc1",
            **(verbose if accepts("FullyConnected", *verbose) else {}),
        )
        if self._config.dtype == "float16":
            y = mx.sym.Cast(y, dtype="float32")
        return mx.sym.SoftmaxOutput(y, smooth_alpha=self._config.label_smoothing, name="softmax")


class FusedCpuOps(PlainOps):
    """Batch norm and the ReLU after it as oneDNN's one operator (--fuse-bn-relu on a CPU): one pass over memory less."""

    supported_settings = ("fuse_bn_relu",)

    def relu(self, x: Feature, name: str) -> Feature:
        return Feature(
            mx.sym.contrib.BatchNormWithReLU(x.symbol, **self._norm_attributes(x.norm)), x.layout
        )


class ExtensionOps(PlainOps):
    """Our own batch norms, for channel-last float16 on a GPU, with the ReLU and the addition before it in the same operator.

    They update the running statistics whenever they run, so that an evaluation needs others.
    """

    supported_settings = ("fuse_bn_relu", "fuse_bn_add_relu")

    def for_evaluation(self) -> PlainOps:
        return ChannelFirstOps(self._config)

    def _ours(self, x: Feature, **fused: Any) -> Feature:
        config = self._config
        y = runtime.batch_norm(
            x.symbol,
            x.norm,
            x.channels,
            config.batchnorm_eps,
            config.batchnorm_mom,
            config.batchnorm_layout,
            **fused,
        )
        return Feature(y, x.layout)

    def _normed(self, x: Feature) -> Feature:
        return self._ours(x) if x.norm else x

    def relu(self, x: Feature, name: str) -> Feature:
        return self._ours(x, relu=True) if self._config.fuse_bn_relu else super().relu(x, name)

    def add_relu(self, x: Feature, shortcut: Feature, name: str) -> Feature:
        if not self._config.fuse_bn_add_relu:
            return super().add_relu(x, shortcut, name)
        return self._ours(x, addend=self._to(self._normed(shortcut), x.layout))


class ChannelFirstOps(PlainOps):
    """PlainOps in NCHW on the parameters of a network whose convolutions are in NHWC.

    For its evaluation: MXNet's batch norm of channel-last data with given statistics uses one thread of the GPU a channel, and
    cuDNN may refuse what it is told of them (a batch of N * H * W images of one pixel).
    """

    def __init__(self, config: Config):
        super().__init__(channel_first(config))
        self._turned = config.conv_layout == "NHWC"

    def _weight(self, conv: str) -> Any:
        weight = super()._weight(conv)
        return mx.sym.transpose(weight, axes=_AXES["NHWC", "NCHW"]) if self._turned else weight


class GroupOps(PlainOps):
    """PlainOps whose batch norms share their statistics among a group of ranks (--bn-group)."""

    def _normed(self, x: Feature) -> Feature:
        if not x.norm:
            return x
        config = self._config
        y = mx.sym.Custom(
            data=x.symbol,
            **self._statistics(x.norm),
            name=x.norm,
            op_type=GROUP_BATCH_NORM,
            layer=x.norm,
            eps=config.batchnorm_eps,
            momentum=config.batchnorm_mom,
            axis=config.batchnorm_layout.index("C"),
        )
        return Feature(y, x.layout)
