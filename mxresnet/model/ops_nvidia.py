# SPDX-License-Identifier: Apache-2.0
"""Operator backends for NVIDIA's MXNet (NGC container 22.04), with its fused operators.

The reference's networks differ in where a batch norm is applied: together with the addition and
ReLU after it (FusedBnOps), from sums that the convolution returns in addition to its result
(ConvStatsOps), or in the convolution that follows (NormConvOps). The operators support only NHWC
and float16.

Sources: the networks resnet-v1b-*-fl of NVIDIA's MLPerf Training v2.0 and v2.1 submissions, and the
operators' declarations in NVIDIA's MXNet (src/operator/nn).
"""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple

import mxnet as mx
import numpy as np

from mxresnet.model.ops import Feature, PlainOps

LAYOUT = "NHWC"
MAX_STATS_KERNEL = 3  # largest kernel of the convolutions that also compute sums


class FusedBnOps(PlainOps):
    """Batch norm, the addition of the shortcut and ReLU as one operator.

    Attributes:
        required_operators: (operator, attributes...) that the build of MXNet must have.
    """

    networks: Tuple[str, ...] = ("resnet-v1b-fl", "resnet-v1b", "resnet-v1b-mod-fl")
    supported_settings = ("fuse_bn_relu", "fuse_bn_add_relu")
    required_operators: Tuple[Tuple[str, ...], ...] = (
        ("BatchNorm", "act_type"),
        ("BatchNormAddRelu",),
    )

    def relu(self, x: Feature, name: str) -> Feature:
        if not self._config.fuse_bn_relu:
            return super().relu(x, name)
        attrs = self._bn_attrs(x.bn_name)
        return Feature(mx.sym.BatchNorm(x.symbol, act_type="relu", **attrs), x.layout)

    def add_relu(self, x: Feature, shortcut: Feature, name: str) -> Feature:
        if not self._config.fuse_bn_add_relu:
            return super().add_relu(x, shortcut, name)
        addend = self._to_layout(self._apply_bn(shortcut), x.layout)
        attrs = self._bn_attrs(x.bn_name)
        return Feature(mx.sym.BatchNormAddRelu(x.symbol, addend=addend, **attrs), x.layout)


class ConvStatsOps(FusedBnOps):
    """Batch norm in three operators.

    The convolution also returns the sums of each channel, BNStatsFinalize computes a scale and a
    bias from them, and ScaleBiasAddRelu applies these. For the 7 x 7 convolution of the stem there
    is no operator that returns sums: it uses the operators of FusedBnOps.
    """

    networks: Tuple[str, ...] = ("resnet-v1b-stats-fl",)
    required_operators: Tuple[Tuple[str, ...], ...] = (
        *FusedBnOps.required_operators,
        ("NormConvolution",),
        ("NormalizedConvolution",),
        ("BNStatsFinalize",),
        ("ScaleBiasAddRelu",),
    )

    def conv_bn(
        self, x: Feature, conv: str, bn: str, filters: int, kernel: int, stride: int
    ) -> Feature:
        if kernel > MAX_STATS_KERNEL:
            return super().conv_bn(x, conv, bn, filters, kernel, stride)
        inputs = {"data": self._to_layout(x, LAYOUT), "weight": self._conv_weight(conv)}
        attrs = self._conv_attrs(conv, filters, kernel, stride)
        if conv.endswith("_conv1"):
            y, *sums = mx.sym.NormConvolution(**inputs, **attrs, no_norm=True)
        else:
            y, *sums = mx.sym.NormalizedConvolution(**inputs, **attrs, no_equiv_scale_bias=True)
        return Feature(y, LAYOUT, bn, tuple(sums))

    def relu(self, x: Feature, name: str) -> Feature:
        return self._scale_bias_add_relu(name, x) if x.sums else super().relu(x, name)

    def add_relu(self, x: Feature, shortcut: Feature, name: str) -> Feature:
        return self._scale_bias_add_relu(name, x, shortcut)

    def _scale_bias_add_relu(
        self, name: str, x: Feature, shortcut: Optional[Feature] = None
    ) -> Feature:
        """Return relu(x + shortcut), with pending batch norms of both applied."""
        inputs = {"dataX": x.symbol, **self._finalize_stats("x", x)}
        project = shortcut is not None and shortcut.pending_bn is not None
        if shortcut is not None:
            inputs["dataZ"] = self._to_layout(shortcut, LAYOUT)
            if project:
                inputs.update(self._finalize_stats("z", shortcut))
        y = mx.sym.ScaleBiasAddRelu(
            **inputs,
            name=name,
            dual_scale_bias=project,
            fused_add=shortcut is not None,
            act_type="relu",
            layout=LAYOUT,
            eps=self._config.batchnorm_eps,
        )
        return Feature(y[0], LAYOUT)  # y[1] is only for the operator's own backward pass

    def _finalize_stats(self, side: str, x: Feature) -> Dict[str, Any]:
        """Return the inputs of ScaleBiasAddRelu that a pending batch norm determines.

        Its forward pass uses scale and bias, its backward pass the other four.

        Args:
            side: "x" or "z", the prefix of the inputs' names.
            x: Feature with a pending batch norm and sums.
        """
        total, squares = x.sums
        (shape,) = x.symbol.infer_shape(data=self._config.batch_shape)[1]
        scale, bias, mean, inverse_std, gamma, beta = mx.sym.BNStatsFinalize(
            sum=total,
            sum_squares=squares,
            **self._stats_inputs(x.bn_name),
            name=x.bn_name,
            output_mean_var=True,
            elem_count=int(np.prod(shape[:-1])),
        )
        return {
            f"{side}_equiv_scale": scale,
            f"{side}_equiv_bias": bias,
            f"{side}_gamma": gamma,
            f"{side}_beta": beta,
            f"{side}_mean": mean,
            f"{side}_invvar": inverse_std,
        }

    def _stats_inputs(self, bn: str) -> Dict[str, Any]:
        """Return the inputs and attributes of an operator that computes a batch norm from sums.

        The variables have the names that mx.sym.BatchNorm would give them.
        """
        parameters = {kind: mx.sym.var(f"{bn}_{kind}") for kind in ("gamma", "beta")}
        attrs = self._bn_attrs(bn)
        return {
            **parameters,
            **self._running_stats(bn),
            **{key: attrs[key] for key in ("eps", "momentum", "fix_gamma")},
        }


class NormConvOps(ConvStatsOps):
    """Batch norm and ReLU fused into the next convolution; ends of units as in ConvStatsOps."""

    networks: Tuple[str, ...] = ("resnet-v1b-dbar2-fl", "resnet-v1b-mainloop-fl")

    def conv_bn(
        self, x: Feature, conv: str, bn: str, filters: int, kernel: int, stride: int
    ) -> Feature:
        if x.pending_bn is None:
            return super().conv_bn(x, conv, bn, filters, kernel, stride)
        total, squares = x.sums
        y, *sums = mx.sym.NormConvolution(
            data=x.symbol,
            in_sum=total,
            in_sum_squares=squares,
            **self._stats_inputs(x.bn_name),
            weight=self._conv_weight(conv),
            **self._conv_attrs(conv, filters, kernel, stride),
            act_type="relu",
        )
        return Feature(y, LAYOUT, bn, tuple(sums))

    def relu(self, x: Feature, name: str) -> Feature:
        return x if x.sums else super().relu(x, name)


class NormConvAddReluOps(NormConvOps):
    """NormConvOps, with the operators of FusedBnOps at the end of each residual unit."""

    networks: Tuple[str, ...] = ("resnet-v1b-normconv-fl",)

    def add_relu(self, x: Feature, shortcut: Feature, name: str) -> Feature:
        return FusedBnOps.add_relu(self, x, shortcut, name)
