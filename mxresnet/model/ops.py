# SPDX-License-Identifier: Apache-2.0
"""Operator backends for any build of MXNet: the layers that a network is made of.

A backend has the methods input, conv_bn, relu, add_relu, max_pool and head. They exchange Features;
input takes a name, and head returns the symbol of the network. conv_bn returns a feature with a
pending batch norm: relu or add_relu always follows and may fuse the batch norm with its own work.
ops_nvidia.py has the backends that need NVIDIA's MXNet; select_ops.py selects the backend of a run.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

import mxnet as mx
import numpy as np

from mxresnet.config import Config
from mxresnet.model import sync_batch_norm
from mxresnet.model.loss import softmax_cross_entropy_loss

cudnn_bn: Any  # the module, or None
try:
    from mxresnet.model.cudnn_bn import runtime as cudnn_bn
except ModuleNotFoundError as error:
    # cudnn_bn is optional: without its folder MXNet's own operators are used.
    if not (error.name or "").startswith("mxresnet.model.cudnn_bn"):
        raise
    cudnn_bn = None

_AXES = {("NCHW", "NHWC"): (0, 2, 3, 1), ("NHWC", "NCHW"): (0, 3, 1, 2)}
_CONV_WORKSPACE_MIB = 2048
_BFLOAT16 = np.dtype([("bfloat16", np.uint16)])  # how MXNet represents the type in numpy


@dataclass(frozen=True)
class Feature:
    """A feature map of the network.

    Attributes:
        symbol: MXNet symbol of an array with four axes.
        layout: Order of the axes: NCHW or NHWC.
        pending_bn: Name of the batch norm that has yet to be applied, or None.
        sums: For a pending batch norm, where the convolution computed them: per channel, the sum
            and the sum of squares.
        channels: Number of channels, where a batch norm is pending.
    """

    symbol: Any
    layout: str
    pending_bn: Optional[str] = None
    sums: Tuple[Any, ...] = ()
    channels: int = 0

    @property
    def bn_name(self) -> str:
        """Return the name of the pending batch norm.

        Raises:
            ValueError: No batch norm is pending.
        """
        if self.pending_bn is None:
            raise ValueError(f"no batch norm of {self.symbol} is pending")
        return self.pending_bn


def channel_first(config: Config) -> Config:
    """Return the configuration with every layer in NCHW; the input keeps its layout."""
    return dataclasses.replace(
        config, conv_layout="NCHW", batchnorm_layout="NCHW", pooling_layout="NCHW"
    )


def accepts(operator: str, *attributes: str) -> bool:
    """Return whether this build of MXNet has the operator with all of the attributes."""
    function = getattr(mx.sym, operator, None)
    if function is None:
        return False
    return set(attributes) <= set(inspect.signature(function).parameters)


class PlainOps:
    """MXNet's stock operators. Every other backend must compute the same function.

    Attributes:
        networks: The reference's names of the networks that use these operators.
        supported_settings: Settings that have an effect here and none on the stock operators.
    """

    networks: Tuple[str, ...] = ("resnet-v1b", "resnet-v1b-fl")
    supported_settings: Tuple[str, ...] = ()

    def __init__(self, config: Config):
        self._config = config

    @property
    def has_channel_last_weights(self) -> bool:
        """Whether the weights of convolutions are (O, H, W, I), not (O, I, H, W)."""
        return self._config.conv_layout == "NHWC"

    def for_evaluation(self) -> PlainOps:
        """Return the backend of the evaluation network: self, unless it can only train."""
        return self

    def input(self, name: str) -> Feature:
        """Return the input of the network."""
        config = self._config
        symbol = mx.sym.var(name, dtype=config.input_dtype)
        return Feature(self._cast_bf16(symbol), config.input_layout)

    def conv_bn(
        self, x: Feature, conv: str, bn: str, filters: int, kernel: int, stride: int
    ) -> Feature:
        """Return a convolution of x, without bias, with a pending batch norm over its channels.

        Args:
            x: Input.
            conv: Name of the convolution.
            bn: Name of the batch norm.
            filters: Number of output channels.
            kernel: Height and width of the kernel. Padding keeps the size at stride 1.
            stride: Stride along both axes.
        """
        config = self._config
        y = mx.sym.Convolution(
            self._to_layout(x, config.conv_layout),
            self._conv_weight(conv),
            **self._conv_attrs(conv, filters, kernel, stride),
            no_bias=True,
            workspace=_CONV_WORKSPACE_MIB,
            **self._cudnn_conv_attrs(),
        )
        layout = config.batchnorm_layout
        y = self._to_layout(Feature(y, config.conv_layout), layout)
        return Feature(y, layout, bn, channels=filters)

    def relu(self, x: Feature, name: str) -> Feature:
        """Return relu(x), with the pending batch norm of x applied."""
        x = self._apply_bn(x)
        return Feature(mx.sym.Activation(x.symbol, act_type="relu", name=name), x.layout)

    def add_relu(self, x: Feature, shortcut: Feature, name: str) -> Feature:
        """Return relu(x + shortcut), with pending batch norms of both applied."""
        x = self._apply_bn(x)
        y = x.symbol + self._to_layout(self._apply_bn(shortcut), x.layout)
        return Feature(mx.sym.Activation(y, act_type="relu", name=name), x.layout)

    def max_pool(self, x: Feature, name: str) -> Feature:
        """Return the maximum over windows of 3 x 3 at stride 2."""
        layout = self._config.pooling_layout
        y = mx.sym.Pooling(
            self._to_layout(x, layout),
            kernel=(3, 3),
            stride=(2, 2),
            pad=(1, 1),
            pool_type="max",
            layout=layout,
            name=name,
        )
        return Feature(y, layout)

    def head(self, x: Feature, num_classes: int) -> Any:
        """Return global average pooling, the fully connected layer and the loss, as a symbol."""
        layout = self._config.pooling_layout
        y = mx.sym.Pooling(
            self._to_layout(x, layout),
            kernel=(7, 7),
            global_pool=True,
            pool_type="avg",
            layout=layout,
            name="pool1",
        )
        y = mx.sym.Flatten(y)
        if self._config.dtype == "bfloat16":
            y = mx.sym.amp_cast(y, dtype="float32")
        cublas_attrs = {"cublas_algo_verbose": bool(self._config.verbose)}
        y = mx.sym.FullyConnected(
            y,
            num_hidden=num_classes,
            name="fc1",
            **(cublas_attrs if accepts("FullyConnected", *cublas_attrs) else {}),
        )
        if self._config.dtype == "float16":
            y = mx.sym.Cast(y, dtype="float32")
        return softmax_cross_entropy_loss(y, self._config.label_smoothing)

    def _to_layout(self, x: Feature, layout: str) -> Any:
        if x.layout == layout:
            return x.symbol
        return mx.sym.transpose(x.symbol, axes=_AXES[x.layout, layout])

    def _cast_bf16(self, symbol: Any) -> Any:
        """Return the symbol as bfloat16 if --dtype is bfloat16.

        Parameters, gradients and the optimizer stay in float32: the parameters are the master
        weights.
        """
        if self._config.dtype != "bfloat16":
            return symbol
        return mx.sym.amp_cast(symbol, dtype=_BFLOAT16)

    def _conv_weight(self, conv: str) -> Any:
        return self._cast_bf16(mx.sym.var(f"{conv}_weight", dtype=self._config.input_dtype))

    def _conv_attrs(self, conv: str, filters: int, kernel: int, stride: int) -> Dict[str, Any]:
        """Return the attributes that all of MXNet's convolution operators have."""
        return {
            "name": conv,
            "num_filter": filters,
            "kernel": (kernel, kernel),
            "stride": (stride, stride),
            "pad": (kernel // 2, kernel // 2),
            "layout": self._config.conv_layout,
        }

    def _cudnn_conv_attrs(self) -> Dict[str, Any]:
        """Return the attributes that select cuDNN's algorithms: only NVIDIA's MXNet has them."""
        algo = self._config.conv_algo
        attrs = {
            "cudnn_algo_verbose": bool(self._config.verbose),
            "cudnn_tensor_core_only": bool(self._config.force_tensor_core),
            "cudnn_algo_fwd": algo,
            "cudnn_algo_bwd_data": algo,
            "cudnn_algo_bwd_filter": algo,
        }
        return attrs if accepts("Convolution", *attrs) else {}

    def _bn_attrs(self, bn: str) -> Dict[str, Any]:
        config = self._config
        return {
            "name": bn,
            "fix_gamma": False,
            "eps": config.batchnorm_eps,
            "momentum": config.batchnorm_mom,
            "axis": config.batchnorm_layout.index("C"),
        }

    def _running_stats(self, bn: str) -> Dict[str, Any]:
        """Return variables of the running statistics, for operators that do not create them."""
        initializers = {"moving_mean": mx.init.Zero(), "moving_var": mx.init.One()}
        return {kind: mx.sym.var(f"{bn}_{kind}", init=init) for kind, init in initializers.items()}

    def _apply_bn(self, x: Feature) -> Feature:
        """Return x with its batch norm applied if one is pending."""
        if x.pending_bn is None:
            return x
        return Feature(mx.sym.BatchNorm(x.symbol, **self._bn_attrs(x.pending_bn)), x.layout)


class FusedCpuOps(PlainOps):
    """Batch norm and ReLU as one oneDNN operator (--fuse-bn-relu on a CPU).

    It saves one pass over the feature map.
    """

    supported_settings = ("fuse_bn_relu",)

    def relu(self, x: Feature, name: str) -> Feature:
        attrs = self._bn_attrs(x.bn_name)
        return Feature(mx.sym.contrib.BatchNormWithReLU(x.symbol, **attrs), x.layout)


class CudnnBnOps(PlainOps):
    """The batch norms of cudnn_bn, for NHWC float16 on a GPU, fused with addition and ReLU.

    The operators for training update the running statistics in every forward pass. The evaluation
    network therefore has the ones for evaluation.
    """

    supported_settings = ("fuse_bn_relu", "fuse_bn_add_relu")

    @staticmethod
    def unavailable_reason(device: Any, batch_size: int) -> Optional[str]:
        """Return why this backend cannot be used on a device, or None if it can.

        This takes seconds and loads the operators; see cudnn_bn.runtime.unavailable_reason().
        """
        if cudnn_bn is None:
            return "mxresnet/model/cudnn_bn is not installed"
        return cudnn_bn.unavailable_reason(device, batch_size)

    def __init__(self, config: Config, training: bool = True):
        super().__init__(config)
        self._training = training

    def for_evaluation(self) -> PlainOps:
        return CudnnBnOps(self._config, training=False)

    def relu(self, x: Feature, name: str) -> Feature:
        if not self._config.fuse_bn_relu:
            return super().relu(x, name)
        return self._cudnn_batch_norm(x, relu=True)

    def add_relu(self, x: Feature, shortcut: Feature, name: str) -> Feature:
        if not self._config.fuse_bn_add_relu:
            return super().add_relu(x, shortcut, name)
        addend = self._to_layout(self._apply_bn(shortcut), x.layout)
        return self._cudnn_batch_norm(x, addend=addend)

    def _apply_bn(self, x: Feature) -> Feature:
        return x if x.pending_bn is None else self._cudnn_batch_norm(x)

    def _cudnn_batch_norm(self, x: Feature, relu: bool = False, addend: Any = None) -> Feature:
        config = self._config
        y = cudnn_bn.batch_norm(
            x.symbol,
            x.bn_name,
            x.channels,
            config.batchnorm_eps,
            config.batchnorm_mom,
            config.batchnorm_layout,
            relu=relu,
            addend=addend,
            training=self._training,
        )
        return Feature(y, x.layout)


class SyncBatchNormOps(PlainOps):
    """PlainOps whose batch norms share their statistics within a group of ranks (--bn-group)."""

    def _apply_bn(self, x: Feature) -> Feature:
        if x.pending_bn is None:
            return x
        config = self._config
        y = mx.sym.Custom(
            data=x.symbol,
            **self._running_stats(x.pending_bn),
            name=x.pending_bn,
            op_type=sync_batch_norm.OP_TYPE,
            layer=x.pending_bn,
            eps=config.batchnorm_eps,
            momentum=config.batchnorm_mom,
            axis=config.batchnorm_layout.index("C"),
        )
        return Feature(y, x.layout)
