# SPDX-License-Identifier: Apache-2.0
"""Exchanges between ranks for checkpoints: requests of any rank, and state of any size.

The communicators are those of mpi4py; parallel/world.py makes them.
"""

from __future__ import annotations

from typing import Any, List, Optional, Sequence, TypeVar

import numpy as np

Value = TypeVar("Value")
Communicator = Any  # mpi4py.MPI.Intracomm
_TAG = 71


class RequestExchange:
    """Sums the requests of all ranks without waiting for the slowest one in the same step.

    Each call starts an exchange and returns the result of the exchange that the previous call
    started. So all ranks get the same result in the same call, and a rank waits only for those that
    are more than one step behind it.
    """

    def __init__(self, communicator: Optional[Communicator], count: int):
        """Take a communicator of its own, or None for one rank, and the number of requests."""
        self._communicator = communicator
        self._sent, self._sums = (np.zeros(count, dtype=np.int32) for _ in range(2))
        self._pending: Any = None

    def exchange(self, requests: Sequence[bool]) -> List[bool]:
        """Return for each request whether any rank made it in its previous call."""
        if self._communicator is None:
            return list(requests)
        self.finish()
        result = [bool(total) for total in self._sums]
        self._sent[:] = requests
        self._pending = self._communicator.Iallreduce(self._sent, self._sums)
        return result

    def finish(self) -> None:
        """Wait for the exchange that is under way. All ranks must call this before MPI ends."""
        if self._pending is not None:
            self._pending.Wait()
            self._pending = None


def gather(communicator: Optional[Communicator], value: Value) -> List[Value]:
    """Return the values of all ranks on rank 0, an empty list elsewhere.

    Their sizes may add up to more than 2 GiB, the limit of one exchange of MPI.
    """
    if communicator is None:
        return [value]
    if communicator.Get_rank() != 0:
        communicator.send(value, dest=0, tag=_TAG)
        return []
    others = range(1, communicator.Get_size())
    return [value, *(communicator.recv(source=rank, tag=_TAG) for rank in others)]


def scatter(communicator: Optional[Communicator], values: Sequence[Value]) -> Value:
    """Return this rank's of the values, which rank 0 has for all ranks."""
    if communicator is None:
        return values[0]
    if communicator.Get_rank() != 0:
        return communicator.recv(source=0, tag=_TAG)
    for rank, value in enumerate(values):
        if rank > 0:
            communicator.send(value, dest=rank, tag=_TAG)
    return values[0]
