# SPDX-License-Identifier: Apache-2.0
"""Find gradients that are not finite, on the device and without waiting for it.

The sum of squares of a gradient is finite if and only if all its elements are (and its norm is
below 1.8e19, beyond which training has diverged too). A loss that is not finite makes gradients
that are not.
"""

from __future__ import annotations

import collections
from typing import Any, Deque, Dict, List, Optional, Sequence, Tuple

import numpy as np
from mxnet import nd

from mxresnet.lars import MAX_TENSORS_PER_CALL

# On a CPU, dot() takes a third of the time of multi_sum_sq() on large arrays, and is slower on
# small ones.
_LARGE_ELEMENTS = 1 << 15


class GradientCheck:
    """Keeps a float32 number of each gradient until the device has computed it."""

    def __init__(self, names: Sequence[str]):
        """Take the parameters' names, in the order of the network."""
        self._names = list(names)
        self._pending: Deque[Any] = collections.deque()  # oldest step first
        self._groups: Optional[List[Tuple[bool, List[int]]]] = None

    def clear(self) -> None:
        """Forget all steps."""
        self._pending.clear()

    def add(self, gradients: Sequence[Any]) -> None:
        """Queue the check of a step's gradients: NDArrays, in the order of the names."""
        if self._groups is None:
            self._groups = _groups(gradients)
        sums = []
        for one_by_one, positions in self._groups:
            arrays = [gradients[position] for position in positions]
            if one_by_one:
                sums += [nd.dot(flat, flat) for flat in (a.reshape((-1,)) for a in arrays)]
            else:
                sums.append(nd.multi_sum_sq(*arrays, num_arrays=len(arrays)))
        self._pending.append(nd.concat(*sums, dim=0))

    def find(self, max_pending: int) -> Optional[Tuple[str, int]]:
        """Return the first gradient that is not finite: its parameter, and how many steps ago.

        The parameter is the first one in the order of the network; 0 steps ago is the last step.

        Args:
            max_pending: number of last steps that are left for later calls, because waiting for
                them would wait for the device.
        """
        while len(self._pending) > max_pending:
            steps_ago = len(self._pending) - 1
            sums = self._pending.popleft().asnumpy()
            if not np.isfinite(sums).all():
                order = [position for _, group in self._groups or () for position in group]
                first = min(order[index] for index in np.flatnonzero(~np.isfinite(sums)))
                return self._names[first], steps_ago
        return None


def _groups(gradients: Sequence[Any]) -> List[Tuple[bool, List[int]]]:
    """Divide positions into groups for one call of an operator: (whether for dot(), positions)."""
    large: List[int] = []
    others: Dict[str, List[int]] = {}
    for position, gradient in enumerate(gradients):
        dtype = np.dtype(gradient.dtype).name
        on_cpu = gradient.context.device_type == "cpu"
        if on_cpu and dtype == "float32" and gradient.size > _LARGE_ELEMENTS:
            large.append(position)
        else:
            others.setdefault(dtype, []).append(position)
    groups = [(True, large)] if large else []
    for positions in others.values():
        for first in range(0, len(positions), MAX_TENSORS_PER_CALL):
            groups.append((False, positions[first : first + MAX_TENSORS_PER_CALL]))
    return groups
