# SPDX-License-Identifier: Apache-2.0
"""Op sets of the fused operators that only NVIDIA's MXNet has (NGC container 22.04).

Its networks differ in when a batch norm is evaluated: with the ReLU after it (VendorOps), from sums that the convolution
hands out beside its result (StatsOps), or by the convolution that follows (NormOps). The operators know one layout and one
type: channels last, float16. Sources: the networks resnet-v1b-*-fl of NVIDIA's MLPerf Training v2.0 and v2.1 submissions,
and the operators' declarations in NVIDIA's MXNet (src/operator/nn).
"""

from __future__ import annotations

from typing import Any, Dict, Optional, Tuple

import mxnet as mx
import numpy as np

from mxresnet.model.ops import Feature, PlainOps

LAYOUT = "NHWC"
LARGEST_KERNEL = 3  # of the convolutions with sums


class VendorOps(PlainOps):
    """Batch norm, the addition of the shortcut and the ReLU as one operator."""

    networks = ("resnet-v1b-fl", "resnet-v1b", "resnet-v1b-mod-fl")
    supported_settings = ("fuse_bn_relu", "fuse_bn_add_relu")
    needs: Tuple[Tuple[str, ...], ...] = (
        ("BatchNorm", "act_type"),
        ("BatchNormAddRelu",),
    )  # operator, attributes

    def relu(self, x: Feature, name: str) -> Feature:
        if not self._config.fuse_bn_relu:
            return super().relu(x, name)
        return Feature(
            mx.sym.BatchNorm(x.symbol, act_type="relu", **self._norm_attributes(x.norm)), x.layout
        )

    def add_relu(self, x: Feature, shortcut: Feature, name: str) -> Feature:
        if not self._config.fuse_bn_add_relu:
            return super().add_relu(x, shortcut, name)
        addend = self._to(self._normed(shortcut), x.layout)
        return Feature(
            mx.sym.BatchNormAddRelu(x.symbol, addend=addend, **self._norm_attributes(x.norm)),
            x.layout,
        )


class StatsOps(VendorOps):
    """Convolutions hand out sums, BNStatsFinalize makes a scale and a bias of them, ScaleBiasAddRelu applies these.

    The stem's 7 x 7 convolution has no such operator: it is VendorOps'.
    """

    networks = ("resnet-v1b-stats-fl",)
    needs = VendorOps.needs + (
        ("NormConvolution",),
        ("NormalizedConvolution",),
        ("BNStatsFinalize",),
        ("ScaleBiasAddRelu",),
    )

    def conv_bn(
        self, x: Feature, conv: str, bn: str, filters: int, kernel: int, stride: int
    ) -> Feature:
        if kernel > LARGEST_KERNEL:
            return super().conv_bn(x, conv, bn, filters, kernel, stride)
        inputs = {"data": self._to(x, LAYOUT), "weight": self._weight(conv)}
        window = self._window(conv, filters, kernel, stride)
        if conv.endswith("_conv1"):
            y, *sums = mx.sym.NormConvolution(**inputs, **window, no_norm=True)
        else:
            y, *sums = mx.sym.NormalizedConvolution(**inputs, **window, no_equiv_scale_bias=True)
        return Feature(y, LAYOUT, bn, tuple(sums))

    def relu(self, x: Feature, name: str) -> Feature:
        return self._applied(name, x) if x.sums else super().relu(x, name)

    def add_relu(self, x: Feature, shortcut: Feature, name: str) -> Feature:
        return self._applied(name, x, shortcut)

    def _applied(self, name: str, x: Feature, shortcut: Optional[Feature] = None) -> Feature:
        """ReLU of the normalized feature, plus the shortcut, normalized where that is still to do."""
        inputs = {"dataX": x.symbol, **self._finalized("x", x)}
        project = shortcut is not None and bool(shortcut.norm)
        if shortcut is not None:
            inputs["dataZ"] = self._to(shortcut, LAYOUT)
        if project:
            inputs.update(self._finalized("z", shortcut))
        y = mx.sym.ScaleBiasAddRelu(
            **inputs,
            name=name,
            dual_scale_bias=project,
            fused_add=shortcut is not None,
            act_type="relu",
            layout=LAYOUT,
            eps=self._config.batchnorm_eps,
        )
        return Feature(y[0], LAYOUT)  # the other output is its own notes for the backward pass

    def _finalized(self, which: str, x: Feature) -> Dict[str, Any]:
        """The inputs of ScaleBiasAddRelu that come of a batch norm. Forward uses scale and bias, backward the others."""
        total, squares = x.sums
        (shape,) = x.symbol.infer_shape(data=self._config.batch_shape)[1]
        scale, bias, mean, inverse, gamma, beta = mx.sym.BNStatsFinalize(
            sum=total,
            sum_squares=squares,
            **self._moments(x.norm),
            name=x.norm,
            output_mean_var=True,
            elem_count=int(np.prod(shape[:-1])),
        )
        return {
            f"{which}_equiv_scale": scale,
            f"{which}_equiv_bias": bias,
            f"{which}_gamma": gamma,
            f"{which}_beta": beta,
            f"{which}_mean": mean,
            f"{which}_invvar": inverse,
        }

    def _moments(self, norm: str) -> Dict[str, Any]:
        """What an operator that evaluates a batch norm from sums wants of it, under the batch norm's own names."""
        parameters = {kind: mx.sym.var(f"{norm}_{kind}") for kind in ("gamma", "beta")}
        attributes = self._norm_attributes(norm)
        return {
            **parameters,
            **self._statistics(norm),
            **{key: attributes[key] for key in ("eps", "momentum", "fix_gamma")},
        }


class NormOps(StatsOps):
    """The convolution after it evaluates a batch norm and its ReLU; the last one of a unit as in StatsOps."""

    networks = ("resnet-v1b-dbar2-fl", "resnet-v1b-mainloop-fl")

    def conv_bn(
        self, x: Feature, conv: str, bn: str, filters: int, kernel: int, stride: int
    ) -> Feature:
        if not x.norm:
            return super().conv_bn(x, conv, bn, filters, kernel, stride)
        total, squares = x.sums
        y, *sums = mx.sym.NormConvolution(
            data=x.symbol,
            in_sum=total,
            in_sum_squares=squares,
            **self._moments(x.norm),
            weight=self._weight(conv),
            **self._window(conv, filters, kernel, stride),
            act_type="relu",
        )
        return Feature(y, LAYOUT, bn, tuple(sums))

    def relu(self, x: Feature, name: str) -> Feature:
        return x if x.sums else super().relu(x, name)


class NormAddOps(NormOps):
    """NormOps whose units end as VendorOps' do."""

    networks = ("resnet-v1b-normconv-fl",)

    def add_relu(self, x: Feature, shortcut: Feature, name: str) -> Feature:
        return VendorOps.add_relu(self, x, shortcut, name)
