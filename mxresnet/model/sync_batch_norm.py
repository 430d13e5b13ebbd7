# SPDX-License-Identifier: Apache-2.0
"""Batch norm with statistics of a group of ranks, as a custom operator for any build of MXNet.

It computes in float32 on the device, with MXNet's array functions. Only the sums of each channel
are copied to the host, where they are added over the group in float64: each layer waits for its
device and its group three times per step.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Tuple

import mxnet as mx
import numpy as np

OP_TYPE = "mxresnet_group_batch_norm"  # of mx.sym.Custom
# What a layer does in a training step: sums over the group, each of which waits for the device, and
# arrays of one value per channel that are copied from the host to the device.
SUMS_PER_STEP, COPIES_TO_DEVICE_PER_STEP = 3, 10
GroupSum = Callable[[np.ndarray], np.ndarray]

# Layer: its sum function. MXNet creates the operators itself, from text attributes, so a function
# cannot be passed to their constructor.
_group_sums: Dict[str, GroupSum] = {}


def set_group_sum_functions(sums: Dict[str, GroupSum]) -> None:
    """Set the function of each layer that sums an array over the group of ranks.

    Call this before binding a network with such layers.
    """
    _group_sums.clear()
    _group_sums.update(sums)


class _SyncBatchNorm(mx.operator.CustomOp):
    """The operator of one layer: y = (x - mean) / sqrt(variance + eps) * gamma + beta.

    Source of the gradients: Ioffe and Szegedy, "Batch Normalization" (2015), section 3.
    """

    def __init__(self, layer: str, eps: float, momentum: float, axis: int):
        super().__init__()
        self._group_sum = _group_sums[layer]
        self._eps, self._momentum, self._axis = eps, momentum, axis

    def _channel_sums(self, *arrays: Any) -> np.ndarray:
        """Return the sums over all axes but the channels, float64, of shape (arrays, channels)."""
        sums = [array.sum(axis=self._axis, exclude=True) for array in arrays]
        return mx.nd.stack(*sums).asnumpy().astype(np.float64)

    def _broadcastable(self, channels: Any, like: Any) -> Any:
        """Return one value per channel as a float32 array that broadcasts against another array.

        Args:
            channels: A numpy or MXNet array.
            like: The array to broadcast against; the result is on its device.
        """
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
        mean, inverse_std = aux[0], 1 / mx.nd.sqrt(aux[1] + self._eps)
        if is_train:
            local_sums = np.append(self._channel_sums(x), x.size / gamma.size)
            *sums, self._count = self._group_sum(local_sums)
            mean = self._mean = np.array(sums) / self._count
        centred = x - self._broadcastable(mean, x)
        if is_train:
            variance = self._group_sum(self._channel_sums(centred * centred)[0]) / self._count
            inverse_std = self._inverse_std = 1 / np.sqrt(variance + self._eps)
            # The running variance is the unbiased one of the whole group, as in NVIDIA's MXNet.
            unbiased = variance * self._count / max(self._count - 1, 1)
            for running, new in zip(aux, (mean, unbiased)):
                running[:] = self._momentum * running + (1 - self._momentum) * mx.nd.array(
                    new, ctx=running.context, dtype=running.dtype
                )
        scale = self._broadcastable(gamma, x) * self._broadcastable(inverse_std, x)
        y = centred * scale + self._broadcastable(beta, x)
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
        inverse_std = self._broadcastable(self._inverse_std, x)
        normalized = (x - self._broadcastable(self._mean, x)) * inverse_std
        # The gradients of beta and gamma are summed over this rank's images only: World.average()
        # later averages them over the ranks, as it does all gradients.
        local_sums = self._channel_sums(dy, dy * normalized)
        beta_mean, gamma_mean = (
            self._broadcastable(row, x) for row in self._group_sum(local_sums) / self._count
        )
        scale = self._broadcastable(gamma, x) * inverse_std
        dx = scale * (dy - beta_mean - normalized * gamma_mean)
        self.assign(in_grad[0], req[0], dx.astype(in_grad[0].dtype, copy=False))
        for gradient, request, value in zip(in_grad[1:], req[1:], local_sums[::-1]):
            value = mx.nd.array(value, ctx=gradient.context, dtype=gradient.dtype)
            self.assign(gradient, request, value)


@mx.operator.register(OP_TYPE)
class _SyncBatchNormProperties(mx.operator.CustomOpProp):
    """Inputs, outputs, shapes and types of the operator. MXNet passes attributes as text."""

    def __init__(self, layer: str, eps: str, momentum: str, axis: str):
        super().__init__(need_top_grad=True)
        self._layer = layer
        self._eps, self._momentum, self._axis = float(eps), float(momentum), int(axis)

    def list_arguments(self) -> List[str]:
        return ["data", "gamma", "beta"]

    def list_auxiliary_states(self) -> List[str]:
        return ["moving_mean", "moving_var"]

    def infer_shape(self, in_shape: List[List[int]]) -> Tuple[list, list, list]:
        channels = [in_shape[0][self._axis]]
        return [in_shape[0], channels, channels], [in_shape[0]], [channels, channels]

    def infer_type(self, in_type: List[Any]) -> Tuple[list, list, list]:
        return [in_type[0], np.float32, np.float32], [in_type[0]], [np.float32, np.float32]

    def create_operator(self, ctx: Any, in_shapes: list, in_dtypes: list) -> _SyncBatchNorm:
        return _SyncBatchNorm(self._layer, self._eps, self._momentum, self._axis)
