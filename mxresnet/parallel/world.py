# SPDX-License-Identifier: Apache-2.0
"""The ranks of a run and what they do together. The only place that knows Horovod and MPI."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, TypeVar

import numpy as np

from mxresnet.errors import UserError
from mxresnet.parallel import watchdog

Value = TypeVar("Value")
# Where launchers say which rank this process is, before MPI is up: Open MPI, PMIx (srun), Slurm.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")


def launched_rank() -> Optional[int]:
    """This process's rank as its launcher tells it, or None outside a launcher."""
    for name in _RANK_VARIABLES:
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return None


def catch_user_error(what: Callable[[], Value]) -> Tuple[Optional[Value], Optional[UserError]]:
    """Return (result, None) or (None, the user's mistake), so that the ranks can agree on it."""
    try:
        return what(), None
    except UserError as error:
        return None, error


class CollectiveUserError(UserError):
    """A mistake that every rank knows of: all leave by themselves and rank 0 says why."""


def rank_seeds(seed: int, ranks: int) -> List[int]:
    """A seed below 2**16 for each rank, drawn from the run's seed the same way on every rank, as the reference does."""
    return [int(value) for value in np.random.RandomState(seed).randint(2**16, size=ranks)]


@dataclass(frozen=True)
class World:
    """This rank's place in the run, and the collectives. World() is a run of one rank that needs no MPI."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    _mpi: Any = field(default=None, repr=False)  # an mpi4py communicator; None for one rank
    _hvd: Any = field(default=None, repr=False)
    _watchdog: Optional[watchdog.Watchdog] = field(default=None, repr=False)

    def barrier(self) -> None:
        if self._mpi:
            self._mpi.Barrier()

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value (any picklable object) on every rank."""
        return self._mpi.bcast(value, root=0) if self._mpi else value

    def gather(self, value: Any) -> List[Any]:
        """Return every rank's value (any picklable object) in their order on rank 0, an empty list elsewhere."""
        return (self._mpi.gather(value, root=0) or []) if self._mpi else [value]

    def sum(self, counts: Sequence[int]) -> List[int]:
        """Add integers up over the ranks, exactly."""
        if not self._mpi:
            return list(counts)
        return [sum(column) for column in zip(*self._mpi.allgather(list(counts)))]

    def raise_if_any_failed(self, problem: Optional[UserError]) -> None:
        """Raise CollectiveUserError on every rank when any rank has a problem, so that none waits for one that left."""
        problems = (
            self._mpi.allgather(problem and str(problem))
            if self._mpi
            else [problem and str(problem)]
        )
        ranks_of: Dict[str, List[int]] = {}
        for rank, text in enumerate(problems):
            if text:
                ranks_of.setdefault(text, []).append(rank)
        if ranks_of:
            raise CollectiveUserError(
                "; ".join(
                    text
                    if len(ranks) == self.size
                    else f"rank {', '.join(map(str, ranks))}: {text}"
                    for text, ranks in ranks_of.items()
                )
            )

    def run_on_all_ranks(self, what: Callable[[], Value]) -> Value:
        """Return what() when every rank could do it. Raises CollectiveUserError on every rank when it raises UserError on any."""
        value, problem = catch_user_error(what)
        self.raise_if_any_failed(problem)
        return value

    def broadcast_parameters(self, parameters: Dict[str, Any]) -> None:
        """Overwrite the named NDArrays with rank 0's, in place.

        Not with Horovod's broadcast, which now and then crashes: 0.28.1 logs a tensor's name after it has handed the tensor
        over, when the name may be gone (operations.cc, EnqueueTensorBroadcast).
        """
        if self.size > 1:
            for name in sorted(parameters):
                parameters[name][:] = self._mpi.bcast(parameters[name].asnumpy(), root=0)

    def average(self, arrays: Sequence[Any], name: str, groups: int) -> None:
        """All-reduce NDArrays to their mean in place, in `groups` fused groups (0: each by itself).

        Asynchronous: MXNet's engine starts each group as soon as its arrays are computed. Arrays that come first get
        priority: the next forward pass needs them first.
        """
        if self.size == 1:
            return
        if groups == 0:
            for index, array in enumerate(arrays):
                self._hvd.allreduce_(array, name=f"{name}.{index}", priority=-index)
            return
        length = -(-len(arrays) // groups)
        for first in range(0, len(arrays), length):
            self._hvd.grouped_allreduce_(
                list(arrays[first : first + length]), name=f"{name}.{first}", priority=-first
            )

    def group_sum_functions(
        self, ranks: int, names: Sequence[str]
    ) -> Dict[str, Callable[[np.ndarray], np.ndarray]]:
        """For each name a function that adds a float64 array up over this rank's group of neighbouring ranks.

        Each has a communicator of its own: the functions may be called in any order and at the same time. Raises
        UserError when the ranks of a machine cannot be divided into such groups.
        """
        if ranks == 1:
            return {name: lambda array: array for name in names}
        # All ranks must know, whichever machine it is: what follows is done together.
        sizes = self._mpi.allgather(self.local_size) if self._mpi else [self.local_size]
        wrong = [size for size in sizes if size % ranks]
        if wrong:
            raise UserError(
                f"--bn-group {ranks} does not divide the {wrong[0]} ranks of a machine: start a multiple of {ranks} on each"
            )
        group = self._mpi.Split(self.rank // ranks, self.rank)

        def over(communicator: Any) -> Callable[[np.ndarray], np.ndarray]:
            def add(array: np.ndarray) -> np.ndarray:
                total = np.empty_like(array)
                communicator.Allreduce(array, total)
                return total

            return add

        return {name: over(group.Dup()) for name in names}

    def wait_if_secondary_failure(self, error: BaseException) -> None:
        """Let others say why a rank ended, and end this one, when its error is no more than that. Returns when nobody does."""
        if self._watchdog and "Horovod has been shut down" in str(error):
            self._watchdog.wait_to_be_ended()

    def abort(self, status: int) -> None:
        """End every rank at once with this exit status; called when this one cannot go on."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._watchdog:
            self._watchdog.told()
        if self._mpi:
            self._mpi.Abort(status)

    def leave(self) -> None:
        """Leave the run in step with the other ranks, and MPI. All device work must be done (else updates are lost)."""
        if self._hvd:
            self._mpi.Barrier()
            self._hvd.shutdown()
        if self._mpi:
            from mpi4py import MPI

            # It waits for the other ranks: while the watchdog is there, not when the interpreter ends.
            MPI.Finalize()
        self.stop_watchdog()

    def stop_watchdog(self) -> None:
        """Tell the other ranks that this one ends on purpose; what is left may take its time."""
        if self._watchdog:
            self._watchdog.leave()


def _start_watchdog(comm: Any, period: float, limit: float) -> Optional[watchdog.Watchdog]:
    """Connect every rank's watchdog to rank 0's; without one, and with a note, where the network does not let them."""
    rank, dog, address = comm.Get_rank(), None, None
    if rank == 0:
        try:
            dog = watchdog.listen(comm.Get_size(), period, limit)
            address = dog.address
        except OSError as error:
            sys.stderr.write(f"note: no watchdog over the ranks: {error}\n")
    address = comm.bcast(address, root=0)
    if address is None:
        return None
    if rank:
        dog = watchdog.connect(rank, address)
    missing = [
        name
        for name in comm.allgather("" if dog else f"rank {rank} on {socket.gethostname()}")
        if name
    ]
    if rank == 0 and missing:
        sys.stderr.write(
            f"note: the watchdog on {address.name}, port {address.port}, is not reached by {', '.join(missing)}: "
            "if one of them is stopped or cut off the network, the run may wait for ever\n"
        )
    return dog


def join(period: float = 0, limit: float = 0) -> World:
    """Initialise MPI; return this process's World, whose Horovod still has to be started with start_horovod().

    With a period (seconds) ranks send each other signs of life and the run ends when one is silent for `limit` seconds.
    """
    if launched_rank() is None:
        return World()
    if period:
        # Until then nothing tells of a rank that does not come, and MPI waits without letting Python run. The launcher
        # says what it means that a rank was ended by SIGALRM.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(limit))
    # The index's Open MPI looks for itself where it was built, unless mpirun or this tells it otherwise.
    if os.path.exists(os.path.join(sys.prefix, "bin", "mpirun")):
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)
        os.environ.setdefault("OMPI_MCA_ess_singleton_isolated", "1")
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    dog = _start_watchdog(comm, period, limit) if period and comm.Get_size() > 1 else None
    signal.alarm(0)
    return World(
        comm.Get_rank(),
        comm.Get_size(),
        local.Get_rank(),
        local.Get_size(),
        _mpi=comm,
        _watchdog=dog,
    )


def start_horovod(world: World) -> World:
    """Initialise Horovod on the ranks of `world`; imports MXNet, which takes seconds."""
    if not world._mpi:
        return world
    import horovod.mxnet as hvd

    hvd.init(world._mpi)
    return dataclasses.replace(world, _hvd=hvd)
