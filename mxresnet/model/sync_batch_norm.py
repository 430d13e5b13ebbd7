# SPDX-License-Identifier: Apache-2.0
"""Batch norm whose statistics come from a group of ranks, for MXNet builds without an operator for it.

A custom operator of MXNet's own array functions, in float32 on the device. Only the sums of each channel go through the host,
where they are added up over the group in float64: each layer waits for its device and its group three times a step.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Tuple

import mxnet as mx
import numpy as np

GROUP_BATCH_NORM = "mxresnet_group_batch_norm"

# The sum over the group, by layer; set before a network with such layers is bound. MXNet makes the operators itself, from
# text attributes, so that they cannot be handed a function.
_group_sums: Dict[str, Callable[[np.ndarray], np.ndarray]] = {}


def set_group_sum_functions(sums: Dict[str, Callable[[np.ndarray], np.ndarray]]) -> None:
    _group_sums.clear()
    _group_sums.update(sums)


class _GroupBatchNorm(mx.operator.CustomOp):
    def __init__(self, layer: str, eps: float, momentum: float, axis: int):
        super().__init__()
        self._sum = _group_sums[layer]
        self._eps, self._momentum, self._axis = eps, momentum, axis

    def _sums(self, *arrays: Any) -> np.ndarray:
        """A float64 row for each array: its sums over all but the channels."""
        return (
            mx.nd.stack(*(array.sum(axis=self._axis, exclude=True) for array in arrays))
            .asnumpy()
            .astype(np.float64)
        )

    def _spread(self, channels: Any, like: Any) -> Any:
        """Float32 values of the channels, from either side, so that they broadcast against an array on its device."""
        shape = [1] * like.ndim
        shape[self._axis] = -1
        return mx.nd.array(channels, ctx=like.context, dtype="float32").reshape(shape)

    def forward(
        self,
        is_train: bool,
        req: List[str],
        in_data: List[Any],
        out_data: List[Any],
        aux: List[Any],
    ) -> None:
        x, gamma, beta = (array.astype("float32", copy=False) for array in in_data)
        mean, inverse = aux[0], 1 / mx.nd.sqrt(aux[1] + self._eps)
        if is_train:
            *sums, self._count = self._sum(np.append(self._sums(x), x.size / gamma.size))
            mean = self._mean = np.array(sums) / self._count
        centred = x - self._spread(mean, x)
        if is_train:
            variance = self._sum(self._sums(centred * centred)[0]) / self._count
            inverse = self._inverse = 1 / np.sqrt(variance + self._eps)
            # The running variance is the unbiased one, over the whole group, as in NVIDIA's MXNet.
            for running, new in zip(aux, (mean, variance * self._count / max(self._count - 1, 1))):
                running[:] = self._momentum * running + (1 - self._momentum) * mx.nd.array(
                    new, ctx=running.context, dtype=running.dtype
                )
        scale = self._spread(gamma, x) * self._spread(inverse, x)
        y = centred * scale + self._spread(beta, x)
        self.assign(out_data[0], req[0], y.astype(in_data[0].dtype, copy=False))

    def backward(
        self,
        req: List[str],
        out_grad: List[Any],
        in_data: List[Any],
        out_data: List[Any],
        in_grad: List[Any],
        aux: List[Any],
    ) -> None:
        x, gamma, dy = (
            array.astype("float32", copy=False) for array in (*in_data[:2], out_grad[0])
        )
        inverse = self._spread(self._inverse, x)
        normalized = (x - self._spread(self._mean, x)) * inverse
        # Gradients of beta and gamma are this rank's own part: the ranks' average completes them.
        own = self._sums(dy, dy * normalized)
        beta_mean, gamma_mean = (self._spread(row, x) for row in self._sum(own) / self._count)
        dx = self._spread(gamma, x) * inverse * (dy - beta_mean - normalized * gamma_mean)
        self.assign(in_grad[0], req[0], dx.astype(in_grad[0].dtype, copy=False))
        for gradient, request, value in zip(in_grad[1:], req[1:], own[::-1]):
            self.assign(
                gradient, request, mx.nd.array(value, ctx=gradient.context, dtype=gradient.dtype)
            )


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
