# SPDX-License-Identifier: Apache-2.0
"""The parts of MXNet and of Horovod that parallel/world.py uses; neither has type information."""

from __future__ import annotations

from typing import List, Protocol

import numpy as np


class NDArray(Protocol):
    """The part of mxnet.nd.NDArray that collectives use; MXNet is imported after Horovod's MPI."""

    def asnumpy(self) -> np.ndarray:
        """Return a copy on the host."""

    def __setitem__(self, key: slice, value: np.ndarray) -> None:
        """Overwrite elements in place."""


class Horovod(Protocol):
    """The part of horovod.mxnet that collectives use."""

    def allreduce_(self, tensor: NDArray, *, name: str, priority: int) -> None:
        """Start to average an array over the ranks, in place."""

    def grouped_allreduce_(self, tensors: List[NDArray], *, name: str, priority: int) -> None:
        """Start to average several arrays over the ranks in one exchange, in place."""

    def shutdown(self) -> None:
        """End Horovod on all ranks."""
