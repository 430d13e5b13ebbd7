# SPDX-License-Identifier: Apache-2.0
"""Find gradients that are not finite, on the device and without waiting for it.

The sum of squares of a gradient is finite if and only if all its elements are (and its norm is
below 1.8e19, beyond which training has diverged too). LARS computes most of these sums anyway. A
loss that is not finite makes gradients that are not.
"""

from __future__ import annotations

import collections
from typing import Any, Deque, Dict, List, Optional, Sequence, Set, Tuple

import numpy as np
from mxnet import nd

from mxresnet.lars import MAX_TENSORS_PER_CALL, sums_of_squares

# On a CPU, sums_of_squares() is fast for large arrays, and multi_sum_sq() for many small ones.
_LARGE_ELEMENTS = 1 << 15

# Positions of gradients, and their sums of squares as an array on the device.
KnownSums = Sequence[Tuple[List[int], Any]]


class GradientCheck:
    """Keeps a float32 number of each gradient until the device has computed it."""

    def __init__(self, names: Sequence[str]):
        """Take the parameters' names, in the order of the network."""
        self._names = list(names)
        # Oldest step first: the gradients' positions, and their sums.
        self._pending: Deque[Tuple[List[int], Any]] = collections.deque()
        self._groups: Dict[Tuple[int, ...], List[Tuple[bool, List[int]]]] = {}

    def clear(self) -> None:
        """Forget all steps."""
        self._pending.clear()

    def add(self, gradients: Sequence[Any], known: KnownSums = ()) -> None:
        """Queue the check of a step.

        Args:
            gradients: NDArrays, in the order of the names.
            known: sums of some of them, which are not computed again.
        """
        order = [position for positions, _ in known for position in positions]
        key = tuple(order)
        if key not in self._groups:
            self._groups[key] = _groups(gradients, set(order))
        sums = [array for _, array in known]
        for is_large, positions in self._groups[key]:
            arrays = [gradients[position] for position in positions]
            if is_large:
                sums.append(sums_of_squares(arrays))
            else:
                sums.append(nd.multi_sum_sq(*arrays, num_arrays=len(arrays)))
            order += positions
        self._pending.append((order, nd.concat(*sums, dim=0)))

    def find(self, max_pending: int) -> Optional[Tuple[str, int]]:
        """Return the first gradient that is not finite: its parameter, and how many steps ago.

        The parameter is the first one in the order of the network; 0 steps ago is the last step.

        Args:
            max_pending: number of last steps that are left for later calls, because waiting for
                them would wait for the device.
        """
        while len(self._pending) > max_pending:
            steps_ago = len(self._pending) - 1
            order, array = self._pending.popleft()
            wrong = np.flatnonzero(~np.isfinite(array.asnumpy()))
            if len(wrong):
                return self._names[min(order[index] for index in wrong)], steps_ago
        return None


def _groups(gradients: Sequence[Any], known: Set[int]) -> List[Tuple[bool, List[int]]]:
    """Divide positions that are not known into groups for one call: (whether large, positions)."""
    large: List[int] = []
    others: Dict[str, List[int]] = {}
    for position, gradient in enumerate(gradients):
        if position in known:
            continue
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
