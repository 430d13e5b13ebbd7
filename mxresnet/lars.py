# SPDX-License-Identifier: Apache-2.0
"""SGD with momentum and layer-wise adaptive rates (LARS), on public MXNet kernels.

You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks" (arXiv:1708.03888). For a
tensor with weight w, gradient g (the mean over the global batch), momentum m, learning rate L of
this update and L' of the previous one:

    trust ratio  = eta * |w| / (|g| + wd * |w| + eps), or 1 when |w| or |g| is zero
    m <- mom * (L / L') * m - trust ratio * L * (g + wd * w);   w <- w + m

Tensors whose names end in gamma, beta or bias have neither trust ratio nor momentum correction
(L / L'): the reference benchmark applies the correction only to the first group of tensors that it
updates together, which is the group with trust ratios. gamma and beta have no weight decay. The
reference's three names for LARS use different kernels and differ in one result: sgdwfastlarsv2 does
not decay fc1_bias, the others do. mx.optimizer.LARS does not decay it either, and it corrects the
momentum of other tensors.
"""

from __future__ import annotations

from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import mxnet as mx
import numpy as np
from mxnet import nd

# Whether fc1_bias is decayed, by the reference's name for the optimizer.
DECAYS_BIAS = {"sgdwlars": True, "sgdwfastlars": True, "sgdwfastlarsv2": False}

# The multi-tensor kernels hold 60 tensors. They do not check the number and crash beyond it.
MAX_TENSORS_PER_CALL = 60

_FLOAT32 = np.finfo(np.float32)


def is_adapted(name: str) -> bool:
    """Return whether the parameter has a trust ratio."""
    return not name.endswith(("gamma", "beta", "bias"))


def can_be_parameter(value: float) -> bool:
    """Return whether MXNet accepts a number as a float32 parameter of an operator.

    MXNet parses it from text. It refuses infinity and what float32 cannot hold, subnormal numbers
    included.
    """
    return bool(value == 0 or _FLOAT32.tiny <= abs(value) <= _FLOAT32.max)


class Tensor(NamedTuple):
    """One parameter: NDArrays of the same shape."""

    weight: Any
    gradient: Any
    momentum: Any  # float32
    master: Optional[Any]  # float32 copy of a float16 weight; None for a float32 weight


class TensorGroup(NamedTuple):
    """Either the tensors with a trust ratio or those without."""

    positions: List[int]  # indices into the lists that update() gets
    weight_decays: List[float]
    weight_decay_array: Any  # the same on the device, float32
    adapted: bool


class Lars(mx.optimizer.Optimizer):
    """SGD with momentum and LARS, as an MXNet optimizer.

    lr_scheduler must return a rate for any update number, 0 included. float16 weights get float32
    master weights.
    """

    def __init__(
        self, momentum: float, eta: float, eps: float, decay_bias: bool = True, **kwargs: Any
    ):
        self._undecayed = ("gamma", "beta") if decay_bias else ("gamma", "beta", "bias")
        super().__init__(multi_precision=True, **kwargs)
        self.momentum, self.eta, self.eps = momentum, eta, eps
        # Makes MXNet pass all tensors of a type in one update() call: one kernel then computes all
        # trust ratios.
        self.aggregate_num = 1 << 20
        self._groups: Dict[Tuple[int, ...], List[TensorGroup]] = {}
        # Sums of squares of gradients in the last update, for gradient_check.py: indices of
        # parameters, and their sums as an array on the device.
        self.gradient_sums: List[Tuple[List[int], Any]] = []
        self._update_of_sums = -1

    def set_wd_mult(self, args_wd_mult: Dict[str, float]) -> None:
        """Set the factors of the weight decay by parameter name: 0 where it does not apply."""
        self.wd_mult = {
            name: 0.0 for name in self.idx2name.values() if name.endswith(self._undecayed)
        }
        self.wd_mult.update(args_wd_mult)

    def create_state(self, index: int, weight: Any) -> Any:
        """Return the initial momentum, float32."""
        return nd.zeros(weight.shape, weight.context, dtype="float32")

    def create_state_multi_precision(self, index: int, weight: Any) -> Tuple[Any, Optional[Any]]:
        """Return the initial momentum and the master weight (None for a float32 weight)."""
        master = None if _is_float32(weight) else weight.astype("float32")
        return self.create_state(index, weight), master

    def update(self, index: Any, weight: Any, grad: Any, state: Any) -> None:
        self.update_multi_precision(index, weight, grad, state)

    def update_multi_precision(self, index: Any, weight: Any, grad: Any, state: Any) -> None:
        """Update one tensor, or lists of tensors of one type, in place."""
        if not isinstance(index, (tuple, list)):
            index, weight, grad, state = [index], [weight], [grad], [state]
        self._update_count(index)
        if self.num_update != self._update_of_sums:
            self.gradient_sums, self._update_of_sums = [], self.num_update
        rate = self.lr_scheduler(self.num_update)
        previous_rate = self.lr_scheduler(self.num_update - 1)
        correction = rate / previous_rate if previous_rate > 0 else 1.0
        for group in self._tensor_groups(tuple(index), weight[0].context):
            tensors = [Tensor(weight[p], grad[p], *state[p]) for p in group.positions]
            decays = group.weight_decay_array
            rates = nd.full((len(tensors),), rate, ctx=decays.context)
            if group.adapted:
                sums = sums_of_squares([t.gradient for t in tensors])
                self.gradient_sums.append(([index[p] for p in group.positions], sums))
                rates = self._multiply_by_trust_ratios(rates, tensors, sums, decays)
            momentum = self.momentum * (correction if group.adapted else 1.0)
            on_cpu = decays.context.device_type == "cpu"
            one_by_one = group.adapted and on_cpu and tensors[0].master is None
            host_rates = rates.asnumpy() if one_by_one else None
            if host_rates is not None and all(map(can_be_parameter, host_rates)):
                self._step_one_by_one(tensors, host_rates, group.weight_decays, momentum)
            else:
                self._step(tensors, rates, decays, momentum)

    def _tensor_groups(self, index: Tuple[int, ...], ctx: Any) -> List[TensorGroup]:
        """Return the non-empty groups of the parameters with these indices.

        The result is cached: on a CPU, making a small array from host memory waits for all queued
        work.
        """
        if index not in self._groups:
            all_decays = self._get_wds(index)
            self._groups[index] = []
            for adapted in (True, False):
                positions = [
                    p for p, i in enumerate(index) if is_adapted(self.idx2name[i]) == adapted
                ]
                if positions:
                    decays = [all_decays[p] for p in positions]
                    array = nd.array(decays, ctx=ctx, dtype="float32")
                    self._groups[index].append(TensorGroup(positions, decays, array, adapted))
        return self._groups[index]

    def _multiply_by_trust_ratios(
        self, rates: Any, tensors: List[Tensor], gradient_sums: Any, decays: Any
    ) -> Any:
        """Return each tensor's rate times its trust ratio, float32 (tensors,)."""
        return nd.multi_lars(
            rates,
            sums_of_squares([t.weight for t in tensors]),
            gradient_sums,
            decays,
            eta=self.eta,
            eps=self.eps,
            rescale_grad=self.rescale_grad,
        )

    def _step_one_by_one(
        self, tensors: List[Tensor], rates: Any, decays: Sequence[float], momentum: float
    ) -> None:
        """Take the same step as _step(), with one kernel call per tensor and rates on the host.

        On a CPU this kernel takes two thirds of the time of the kernel that reads rates from an
        array. Copying the rates to the host waits for the gradients, which costs no time on a CPU:
        the step needs them anyway.
        """
        for tensor, rate, decay in zip(tensors, rates, decays):
            nd.sgd_mom_update(
                tensor.weight,
                tensor.gradient,
                tensor.momentum,
                out=tensor.weight,
                lr=float(rate),
                wd=decay,
                momentum=momentum,
                rescale_grad=self.rescale_grad,
            )

    def _step(self, tensors: List[Tensor], rates: Any, decays: Any, momentum: float) -> None:
        """Take a momentum step with one rate for each tensor, in place."""
        mixed = tensors[0].master is not None
        kernel = (
            nd.preloaded_multi_mp_sgd_mom_update if mixed else nd.preloaded_multi_sgd_mom_update
        )
        for first in range(0, len(tensors), MAX_TENSORS_PER_CALL):
            part = tensors[first : first + MAX_TENSORS_PER_CALL]
            # weight, gradient, momentum (, master) of each tensor, one after the other
            flat = [array for tensor in part for array in tensor[: 4 if mixed else 3]]
            kernel(
                *flat,
                rates[first : first + len(part)],
                decays[first : first + len(part)],
                out=[tensor.weight for tensor in part],
                num_weights=len(part),
                momentum=momentum,
                rescale_grad=self.rescale_grad,
            )


def _is_float32(array: Any) -> bool:
    return np.dtype(array.dtype) == np.float32  # an NDArray's dtype is a class, never equal to text


def sums_of_squares(arrays: Sequence[Any]) -> Any:
    """Return the sum of squares of each array, float32 (arrays,)."""
    if arrays[0].context.device_type == "cpu" and _is_float32(arrays[0]):
        # On a CPU, multi_sum_sq accumulates in float32 one by one (0.1 % low on 2 million
        # elements) and takes three times as long.
        flat_arrays = [array.reshape((-1,)) for array in arrays]
        return nd.concat(*[nd.dot(flat, flat) for flat in flat_arrays], dim=0)
    return nd.multi_sum_sq(*arrays, num_arrays=len(arrays))
