# SPDX-License-Identifier: Apache-2.0
"""Batch norm whose statistics come from a group of ranks, for MXNet builds without an operator for it.

A custom operator: means, variances and their gradients' sums are added up over the group through the host, in float64.
Correct on any device, and slow: each layer waits for its group four times a step.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Tuple

import mxnet as mx
import numpy as np

GROUP_BATCH_NORM = "mxresnet_group_batch_norm"

# The sum over the group, by layer; set before a network with such layers is bound. MXNet makes the operators itself, from
# text attributes, so that they cannot be handed a function.
_group_sums: Dict[str, Callable[[np.ndarray], np.ndarray]] = {}


def set_group_sums(sums: Dict[str, Callable[[np.ndarray], np.ndarray]]) -> None:
    _group_sums.clear()
    _group_sums.update(sums)


class _GroupBatchNorm(mx.operator.CustomOp):
    def __init__(self, layer: str, eps: float, momentum: float, axis: int):
        super().__init__()
        self._sum = _group_sums[layer]
        self._eps, self._momentum, self._axis = eps, momentum, axis

    def _host(self, array: Any) -> np.ndarray:
        """Channels in rows, float64."""
        return np.moveaxis(array.asnumpy().astype(np.float64), self._axis, 0).reshape(array.shape[self._axis], -1)

    def _device(self, rows: np.ndarray, like: Any) -> Any:
        shape = list(like.shape)
        channels = shape.pop(self._axis)
        return mx.nd.array(np.moveaxis(rows.reshape([channels, *shape]), 0, self._axis), ctx=like.context, dtype=like.dtype)

    def forward(self, is_train: bool, req: List[str], in_data: List[Any], out_data: List[Any], aux: List[Any]) -> None:
        data, gamma, beta = in_data
        x = self._host(data)
        if is_train:
            self._count = self._sum(np.array([float(x.shape[1])]))[0]
            mean = self._sum(x.sum(axis=1)) / self._count
            variance = self._sum(((x - mean[:, None]) ** 2).sum(axis=1)) / self._count
            self._mean, self._inverse = mean, 1 / np.sqrt(variance + self._eps)
            # The running variance is the unbiased one, over the whole group, as in NVIDIA's MXNet.
            for running, new in zip(aux, (mean, variance * self._count / max(self._count - 1, 1))):
                running[:] = self._momentum * running + (1 - self._momentum) * mx.nd.array(new, ctx=running.context, dtype=running.dtype)
            inverse = self._inverse
        else:
            mean, inverse = aux[0].asnumpy(), 1 / np.sqrt(aux[1].asnumpy().astype(np.float64) + self._eps)
        scale = gamma.asnumpy() * inverse
        y = x * scale[:, None] + (beta.asnumpy() - mean * scale)[:, None]
        self.assign(out_data[0], req[0], self._device(y, data))

    def backward(
            self, req: List[str], out_grad: List[Any], in_data: List[Any], out_data: List[Any], in_grad: List[Any],
            aux: List[Any]) -> None:
        data, gamma, _ = in_data
        dy = self._host(out_grad[0])
        normalized = (self._host(data) - self._mean[:, None]) * self._inverse[:, None]
        # Gradients of gamma and beta are this rank's own part: the ranks' average completes them.
        beta_gradient, gamma_gradient = dy.sum(axis=1), (dy * normalized).sum(axis=1)
        sums = self._sum(np.stack([beta_gradient, gamma_gradient])) / self._count
        scale = gamma.asnumpy() * self._inverse
        dx = scale[:, None] * (dy - sums[0][:, None] - normalized * sums[1][:, None])
        self.assign(in_grad[0], req[0], self._device(dx, data))
        for gradient, request, value in zip(in_grad[1:], req[1:], (gamma_gradient, beta_gradient)):
            self.assign(gradient, request, mx.nd.array(value, ctx=gradient.context, dtype=gradient.dtype))


@mx.operator.register(GROUP_BATCH_NORM)
class _GroupBatchNormProperties(mx.operator.CustomOpProp):
    """Attributes arrive as text."""

    def __init__(self, layer: str, eps: str, momentum: str, axis: str):
        super().__init__(need_top_grad=True)
        self._attributes = layer, float(eps), float(momentum), int(axis)

    def list_arguments(self) -> List[str]:
        return ["data", "gamma", "beta"]

    def list_auxiliary_states(self) -> List[str]:
        return ["moving_mean", "moving_var"]

    def infer_shape(self, in_shape: List[List[int]]) -> Tuple[list, list, list]:
        channels = [in_shape[0][self._attributes[3]]]
        return [in_shape[0], channels, channels], [in_shape[0]], [channels, channels]

    def infer_type(self, in_type: List[Any]) -> Tuple[list, list, list]:
        return [in_type[0], np.float32, np.float32], [in_type[0]], [np.float32, np.float32]

    def create_operator(self, ctx: Any, in_shapes: list, in_dtypes: list) -> _GroupBatchNorm:
        return _GroupBatchNorm(*self._attributes)
