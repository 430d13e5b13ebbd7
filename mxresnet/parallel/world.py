# SPDX-License-Identifier: Apache-2.0
"""The ranks of a run and their collectives. The only module that imports Horovod and MPI."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import (
    TYPE_CHECKING,
    Callable,
    Dict,
    List,
    NoReturn,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
    cast,
)

import numpy as np

from mxresnet.errors import UserError
from mxresnet.parallel import listener, watchdog
from mxresnet.parallel.launched import launched_rank
from mxresnet.parallel.protocols import Horovod, NDArray

if TYPE_CHECKING:
    from mpi4py import MPI

Value = TypeVar("Value")
SumFunction = Callable[[np.ndarray], np.ndarray]
_SAME_ERROR_SECONDS = 60


class CollectiveUserError(UserError):
    """A user error raised on every rank: each exits without MPI_Abort, and rank 0 prints it."""


def catch_user_error(
    function: Callable[[], Value],
) -> Tuple[Optional[Value], Optional[UserError]]:
    """Call the function and return (result, None), or (None, error) when it raises UserError."""
    try:
        return function(), None
    except UserError as error:
        return None, error


def rank_seeds(seed: int, num_ranks: int) -> List[int]:
    """Return a seed below 2**16 for each rank, drawn from the seed of the run.

    The draw is that of NVIDIA's v2.1 MXNet benchmark and the same on every rank.
    """
    return [int(value) for value in np.random.RandomState(seed).randint(2**16, size=num_ranks)]


@dataclass(frozen=True)
class World:
    """This rank's place in the run, and the collectives. World() is one rank without MPI.

    Attributes:
        rank: number of this process, from 0 to size - 1.
        size: number of ranks in the run.
        local_rank: number of this process among those of its machine.
        local_size: number of ranks on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    _mpi: Optional[MPI.Intracomm] = field(default=None, repr=False)
    _mpi_of_machine: Optional[MPI.Comm] = field(default=None, repr=False)
    _hvd: Optional[Horovod] = field(default=None, repr=False)
    _watchdog: Optional[watchdog.Watchdog] = field(default=None, repr=False)

    def _require_mpi(self) -> MPI.Intracomm:
        if self._mpi is None:
            raise RuntimeError("several ranks need MPI: create their World with join()")
        return self._mpi

    def _require_horovod(self) -> Horovod:
        if self._hvd is None:
            raise RuntimeError("the ranks need Horovod: call start_horovod() before training")
        return self._hvd

    def communicator(self) -> Optional[MPI.Intracomm]:
        """Return a new communicator of all ranks (all must call this); None for one rank."""
        return self._mpi.Dup() if self._mpi and self.size > 1 else None

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self._mpi:
            self._mpi.Barrier()

    def broadcast(self, value: Value) -> Value:
        """Return rank 0's value, any picklable object, on every rank."""
        return self._mpi.bcast(value, root=0) if self._mpi else value

    def gather(self, value: Value) -> List[Value]:
        """Return the values of all ranks, in rank order, on rank 0; an empty list elsewhere.

        The values may be any picklable objects.
        """
        return (self._mpi.gather(value, root=0) or []) if self._mpi else [value]

    def gather_on_machine(self, value: Value) -> List[Value]:
        """Return the values of this machine's ranks, in order of local rank, on each of them."""
        return self._mpi_of_machine.allgather(value) if self._mpi_of_machine else [value]

    def sum(self, counts: Sequence[int]) -> List[int]:
        """Return the sums over the ranks, element by element, as exact integers."""
        if not self._mpi:
            return list(counts)
        return [sum(column) for column in zip(*self._mpi.allgather(list(counts)))]

    def raise_if_any_failed(self, problem: Optional[UserError]) -> None:
        """Raise on every rank when any rank has a problem, so that no rank waits for another.

        Args:
            problem: this rank's problem, or None.

        Raises:
            CollectiveUserError: any rank has a problem. The message names the ranks of a
                problem that not all of them have.
        """
        text = str(problem) if problem else None
        texts = self._mpi.allgather(text) if self._mpi else [text]
        ranks_by_text: Dict[str, List[int]] = {}
        for rank, text in enumerate(texts):
            if text:
                ranks_by_text.setdefault(text, []).append(rank)
        if ranks_by_text:
            raise CollectiveUserError(
                "; ".join(
                    text
                    if len(ranks) == self.size
                    else f"rank {', '.join(map(str, ranks))}: {text}"
                    for text, ranks in ranks_by_text.items()
                )
            )

    def run_on_all_ranks(self, function: Callable[[], Value]) -> Value:
        """Call the function and return its result when it succeeds on every rank.

        Raises:
            CollectiveUserError: on every rank, when the function raises UserError on any.
        """
        value, problem = catch_user_error(function)
        self.raise_if_any_failed(problem)
        return cast(Value, value)

    def raise_same_error(self, problem: UserError) -> NoReturn:
        """Raise an error that every rank finds by itself, at the same point of the run.

        Raises:
            CollectiveUserError: all ranks have called this.
            UserError: the others did not within a minute. The caller must end the job.
        """
        if self._mpi:
            deadline, all_called = time.monotonic() + _SAME_ERROR_SECONDS, self._mpi.Ibarrier()
            while not all_called.Test():
                if time.monotonic() > deadline:
                    raise UserError(f"rank {self.rank} alone: {problem}")
                time.sleep(0.01)
        raise CollectiveUserError(str(problem))

    def broadcast_parameters(self, parameters: Dict[str, NDArray]) -> None:
        """Overwrite the named arrays with rank 0's, in place.

        This uses MPI because Horovod 0.28.1's broadcast sometimes crashes: after it has handed a
        tensor to its background thread it logs the tensor's name, which may be freed by then
        (operations.cc, EnqueueTensorBroadcast).
        """
        if self.size == 1:
            return
        for name in sorted(parameters):
            parameters[name][:] = self._require_mpi().bcast(parameters[name].asnumpy(), root=0)

    def average(self, arrays: Sequence[NDArray], name: str, groups: int) -> None:
        """All-reduce arrays to their mean over the ranks, in place.

        This is asynchronous: MXNet's engine starts each exchange when its arrays are computed.
        Arrays that come first have priority, because the next forward pass needs them first.

        Args:
            name: prefix of the tensors' names in Horovod.
            groups: number of fused exchanges; 0: one exchange for each array.
        """
        if self.size == 1:
            return
        horovod = self._require_horovod()
        if groups == 0:
            for index, array in enumerate(arrays):
                horovod.allreduce_(array, name=f"{name}.{index}", priority=-index)
            return
        group_length = -(-len(arrays) // groups)
        for first in range(0, len(arrays), group_length):
            horovod.grouped_allreduce_(
                list(arrays[first : first + group_length]),
                name=f"{name}.{first}",
                priority=-first,
            )

    def group_sum_functions(self, group_size: int, names: Sequence[str]) -> Dict[str, SumFunction]:
        """Return for each name a function that sums a float64 array over this rank's group.

        A group is `group_size` neighbouring ranks of one machine. Each function has its own MPI
        communicator, so they may be called in any order and at the same time.

        Raises:
            UserError: the ranks of a machine cannot be divided into such groups.
        """
        if group_size == 1:
            return {name: lambda array: array for name in names}
        # Every rank must raise the same error on every machine, because Split is collective.
        sizes = self._mpi.allgather(self.local_size) if self._mpi else [self.local_size]
        wrong_sizes = [size for size in sizes if size % group_size]
        if wrong_sizes:
            raise UserError(
                f"--bn-group {group_size} does not divide the {wrong_sizes[0]} ranks of a machine: "
                f"start a multiple of {group_size} on each"
            )
        group = self._require_mpi().Split(self.rank // group_size, self.rank)
        return {name: _sum_function(group.Dup()) for name in names}

    def wait_if_secondary_failure(self, error: BaseException) -> None:
        """Wait for this process to be ended if the error means only that another rank has failed.

        That rank prints the cause and ends the job. Returns at once for other errors, and after a
        while when nothing ends this process.
        """
        if self._watchdog and "Horovod has been shut down" in str(error):
            self._watchdog.wait_for_abort()

    def end_loading(self) -> None:
        """Tell the watchdog that this rank and all others have loaded their libraries."""
        self.barrier()
        if self._watchdog:
            self._watchdog.end_loading()

    def abort(self, status: int) -> None:
        """End every rank with this exit status (MPI_Abort), because this rank cannot continue."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self._watchdog:
            self._watchdog.announce_failure()
        if self._mpi:
            self._mpi.Abort(status)

    def shutdown(self) -> None:
        """End Horovod, MPI and the watchdog together with the other ranks.

        Call this after all work on the device has finished: queued updates would be lost.
        """
        if self._hvd:
            self.barrier()
            self._hvd.shutdown()
        if self._mpi:
            from mpi4py import MPI

            # Finalize waits for the other ranks. It is called here, while the watchdog runs, and
            # not when the interpreter exits.
            MPI.Finalize()
        self.stop_watchdog()

    def stop_watchdog(self) -> None:
        """Announce that this rank ends without an error; wait until its peers have done so too."""
        if self._watchdog:
            self._watchdog.close_gracefully()


def _sum_function(communicator: MPI.Comm) -> SumFunction:
    """Return a function that sums an array over the ranks of a communicator."""

    def sum_over_group(array: np.ndarray) -> np.ndarray:
        total = np.empty_like(array)
        communicator.Allreduce(array, total)
        return total

    return sum_over_group


def join(watchdog_period_seconds: float = 0, watchdog_limit_seconds: float = 0) -> World:
    """Initialize MPI and return this process's World; start_horovod() initializes Horovod.

    Args:
        watchdog_period_seconds: time between heartbeats of the ranks; 0: no watchdog.
        watchdog_limit_seconds: the run ends when a rank does not start within this time, or
            sends no heartbeat for this time.
    """
    if launched_rank() is None:
        return World()
    if watchdog_period_seconds:
        # MPI_Init waits for ranks that do not start, and no Python code runs meanwhile. The alarm
        # then ends this process, and the launcher prints what its SIGALRM means.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(math.ceil(watchdog_limit_seconds))
    # Open MPI from PyPI looks for its files in the folder where it was built, unless mpirun or
    # OPAL_PREFIX names another.
    if os.path.exists(os.path.join(sys.prefix, "bin", "mpirun")):
        os.environ.setdefault("OPAL_PREFIX", sys.prefix)
        os.environ.setdefault("OMPI_MCA_ess_singleton_isolated", "1")
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    local = comm.Split_type(MPI.COMM_TYPE_SHARED)
    started_watchdog = None
    if watchdog_period_seconds and comm.Get_size() > 1:
        hosts = listener.choose_hosts(_addresses_of_other_machines(comm, local), os.environ)
        started_watchdog = _start_watchdog(
            comm, hosts, watchdog_period_seconds, watchdog_limit_seconds
        )
    signal.alarm(0)
    return World(
        comm.Get_rank(),
        comm.Get_size(),
        local.Get_rank(),
        local.Get_size(),
        _mpi=comm,
        _mpi_of_machine=local,
        _watchdog=started_watchdog,
    )


def _addresses_of_other_machines(comm: MPI.Comm, local: MPI.Comm) -> List[List[str]]:
    """Return the addresses of each machine but this one, on rank 0; empty lists for other ranks."""
    is_other = local.Get_rank() == 0 and comm.Get_rank() != 0
    own = list(listener.interface_addresses().values()) if is_other else []
    return comm.gather(own, root=0) or []


def _start_watchdog(
    comm: MPI.Intracomm, hosts: Sequence[str], period_seconds: float, limit_seconds: float
) -> Optional[watchdog.Watchdog]:
    """Start the watchdog on every rank and connect it to rank 0's, which listens on `hosts`.

    Returns None on ranks without a watchdog: all ranks when rank 0 cannot listen, else those that
    cannot reach rank 0. Rank 0 prints a note about them.
    """
    rank = comm.Get_rank()
    started, address = None, None
    if rank == 0:
        try:
            started = watchdog.listen(hosts, comm.Get_size(), period_seconds, limit_seconds)
            address = started.address
        except OSError as error:
            sys.stderr.write(f"note: the ranks run without a watchdog: {error}\n")
    address = comm.bcast(address, root=0)
    if address is None:
        return None
    if rank != 0:
        started = watchdog.connect(rank, address)
    unreachable = None if started else f"rank {rank} on {socket.gethostname()}"
    names = [name for name in comm.allgather(unreachable) if name]
    if rank == 0 and started:
        started.stop_listening()
    if rank == 0 and names:
        places = ", ".join(f"{host}:{port}" for host, port in address.endpoints)
        sys.stderr.write(
            f"note: {', '.join(names)} cannot reach the watchdog on {address.name} "
            f"({places}): if one of these ranks is stopped or loses its network, the run may "
            "wait without end; allow TCP connections between the machines\n"
        )
    return started


def start_horovod(world: World) -> World:
    """Initialize Horovod on the ranks of `world` and return the World that uses it.

    This imports MXNet, which takes seconds.
    """
    if not world._mpi:
        return world
    import horovod.mxnet as hvd

    hvd.init(world._mpi)
    return dataclasses.replace(world, _hvd=hvd)
