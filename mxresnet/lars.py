# SPDX-License-Identifier: Apache-2.0
"""SGD with momentum and layer-wise adaptive rates (LARS), on public MXNet kernels.

You, Gitman, Ginsburg, "Large Batch Training of Convolutional Networks" (arXiv:1708.03888). For a tensor with weight w,
gradient g (already averaged over the global batch), momentum m, scheduled rate L of this update and L' of the last one:

    trust ratio  = eta * |w| / (|g| + wd * |w| + eps), or 1 when |w| or |g| is zero
    m <- mom * (L / L') * m - trust ratio * L * (g + wd * w);   w <- w + m

Names ending in gamma, beta or bias have no trust ratio and no momentum correction (L / L'): in the reference the
correction reaches only the first group of tensors that is updated together, which is exactly the adapted ones. gamma
and beta are not decayed. The reference's three names for LARS differ in the kernels they use and in one thing that can be
seen: "sgdwfastlarsv2" does not decay fc1_bias, the others do. mx.optimizer.LARS does not either, and corrects another set.
"""

from __future__ import annotations

from typing import Any, Dict, List, Sequence, Tuple

import mxnet as mx
import numpy as np
from mxnet import nd

# Whether fc1_bias is decayed, by the reference's name for the optimizer.
DECAYS_BIAS = {"sgdwlars": True, "sgdwfastlars": True, "sgdwfastlarsv2": False}

# The multi-tensor kernels hold 60 tensors, do not check it, and crash beyond.
MAX_TENSORS_PER_CALL = 60


def is_adapted(name: str) -> bool:
    """Whether a parameter gets a trust ratio."""
    return not name.endswith(("gamma", "beta", "bias"))


class Lars(mx.optimizer.Optimizer):
    """Use with an lr_scheduler that answers any update number; float16 weights get float32 master weights."""

    def __init__(
        self, momentum: float, eta: float, eps: float, decay_bias: bool = True, **kwargs: Any
    ):
        self._undecayed = ("gamma", "beta") if decay_bias else ("gamma", "beta", "bias")
        super().__init__(multi_precision=True, **kwargs)
        self.momentum, self.eta, self.eps = momentum, eta, eps
        # Every tensor of a type in one update() call: the trust ratios are then one kernel, not one for each chunk.
        self.aggregate_num = 1 << 20
        self._splits: Dict[Tuple[int, ...], List[tuple]] = {}

    def set_wd_mult(self, args_wd_mult: dict) -> None:
        self.wd_mult = {
            name: 0.0 for name in self.idx2name.values() if name.endswith(self._undecayed)
        }
        self.wd_mult.update(args_wd_mult)

    def create_state(self, index: int, weight: Any) -> Any:
        return nd.zeros(weight.shape, weight.context, dtype="float32")

    def create_state_multi_precision(self, index: int, weight: Any) -> Any:
        """(momentum, master weights or None), both float32."""
        master = None if _is_float32(weight) else weight.astype("float32")
        return self.create_state(index, weight), master

    def update(self, index: Any, weight: Any, grad: Any, state: Any) -> None:
        self.update_multi_precision(index, weight, grad, state)

    def update_multi_precision(self, index: Any, weight: Any, grad: Any, state: Any) -> None:
        if not isinstance(index, (tuple, list)):
            index, weight, grad, state = [index], [weight], [grad], [state]
        self._update_count(index)
        rate = self.lr_scheduler(self.num_update)
        last_rate = self.lr_scheduler(self.num_update - 1)
        correction = rate / last_rate if last_rate > 0 else 1.0
        for positions, wds, decays, adapted in self._split(tuple(index), weight[0].context):
            tensors = [(weight[p], grad[p], *state[p]) for p in positions]
            rates = nd.full((len(tensors),), rate, ctx=decays.context)
            if adapted:
                rates = nd.multi_lars(
                    rates,
                    _squares([t[0] for t in tensors]),
                    _squares([t[1] for t in tensors]),
                    decays,
                    eta=self.eta,
                    eps=self.eps,
                    rescale_grad=self.rescale_grad,
                )
            momentum = self.momentum * (correction if adapted else 1.0)
            if adapted and decays.context.device_type == "cpu" and tensors[0][3] is None:
                self._apply_one_by_one(tensors, rates.asnumpy(), wds, momentum)
            else:
                self._apply(tensors, rates, decays, momentum)

    def _split(self, index: Tuple[int, ...], ctx: Any) -> List[tuple]:
        """(positions, their weight decays on the host and on the device, adapted?) of the tensors with and without a trust ratio, where there are any.

        Remembered: making a small array from the host waits for everything queued on a CPU.
        """
        if index not in self._splits:
            all_wds = self._get_wds(index)
            self._splits[index] = []
            for adapted in (True, False):
                positions = [
                    p for p, i in enumerate(index) if is_adapted(self.idx2name[i]) == adapted
                ]
                if positions:
                    wds = [all_wds[p] for p in positions]
                    self._splits[index].append(
                        (positions, wds, nd.array(wds, ctx=ctx, dtype="float32"), adapted)
                    )
        return self._splits[index]

    def _apply_one_by_one(
        self, tensors: List[tuple], rates: Any, wds: Sequence[float], momentum: float
    ) -> None:
        """As _apply, with rates on the host. On a CPU this kernel takes two thirds of the time of the one that reads them
        from an array, and there is nothing to do meanwhile: by then all gradients are there.
        """
        for (weight, gradient, state, _), rate, wd in zip(tensors, rates, wds):
            nd.sgd_mom_update(
                weight,
                gradient,
                state,
                out=weight,
                lr=float(rate),
                wd=wd,
                momentum=momentum,
                rescale_grad=self.rescale_grad,
            )

    def _apply(self, tensors: List[tuple], rates: Any, decays: Any, momentum: float) -> None:
        """Momentum step with a rate for each tensor; weights, momenta and master weights are updated in place."""
        mixed = tensors[0][3] is not None
        kernel = (
            nd.preloaded_multi_mp_sgd_mom_update if mixed else nd.preloaded_multi_sgd_mom_update
        )
        for first in range(0, len(tensors), MAX_TENSORS_PER_CALL):
            part = tensors[first : first + MAX_TENSORS_PER_CALL]
            flat = [array for t in part for array in t[: 4 if mixed else 3]]
            kernel(
                *flat,
                rates[first : first + len(part)],
                decays[first : first + len(part)],
                out=[t[0] for t in part],
                num_weights=len(part),
                momentum=momentum,
                rescale_grad=self.rescale_grad,
            )


def _is_float32(array: Any) -> bool:
    return np.dtype(array.dtype) == np.float32  # MXNet answers with a class, which equals no text


def _squares(arrays: Sequence[Any]) -> Any:
    """Sum of squares of each array, float32."""
    if arrays[0].context.device_type == "cpu" and _is_float32(arrays[0]):
        # multi_sum_sq on CPU adds up naively (0.1 % low on 2 million elements) and takes three times as long.
        return nd.concat(
            *[nd.dot(flat, flat) for flat in (array.reshape((-1,)) for array in arrays)], dim=0
        )
    return nd.multi_sum_sq(*arrays, num_arrays=len(arrays))
