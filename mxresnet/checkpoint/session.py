# SPDX-License-Identifier: Apache-2.0
"""The checkpoints of one rank's run: resume from one, decide when to write one, write it.

Rank 0 reads and writes all files: the folder needs no shared file system. The others send it their
own state, and get it back when the run is resumed. Every rank learns in the same step that a
checkpoint is due: rank 0 requests one when the time has come, any rank when it gets SIGTERM, and
the requests are exchanged in each step (parallel/exchange.py).
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import signal
import time
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Protocol, cast

from mxresnet.checkpoint import choice, log_file, state, store
from mxresnet.checkpoint.fingerprint import Fingerprint, effective_settings
from mxresnet.checkpoint.manifest import DamagedError, Manifest, Position
from mxresnet.checkpoint.state import InputState, NetworkState, OwnState, RankState
from mxresnet.checkpoint.writer import BackgroundWriter
from mxresnet.config import Config
from mxresnet.errors import Interrupted, UserError
from mxresnet.mllog import RunLog
from mxresnet.parallel.exchange import RequestExchange, gather, scatter
from mxresnet.parallel.world import World
from mxresnet.progress import Progress

# SIGUSR2 is the launchers' request: mpirun passes it on, but kills a second after a SIGTERM.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class Trainer(Protocol):
    """The part of mxresnet.trainer.Trainer that checkpoints use."""

    @property
    def has_channel_last_weights(self) -> bool: ...

    def symbol_json(self) -> str: ...

    def network_state(self) -> NetworkState: ...

    def own_state(self) -> OwnState: ...

    def wait(self) -> None: ...

    def restore(self, network: NetworkState, own: OwnState) -> None: ...


@dataclass(frozen=True)
class Resumed:
    """What every rank knows about the checkpoint that the run continues from."""

    manifest: Manifest
    rank: RankState
    log_continues: bool


class Session:
    """The checkpoints of a run on this rank; without a folder it writes none.

    Attributes:
        resumed: where the run continues; None for a new run.
        notes: lines for the progress output.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        fingerprint: Optional[Fingerprint],
        chosen: Optional[choice.Choice],
    ):
        self._config, self._world, self._choice = config, world, chosen
        self._fingerprint = fingerprint
        self.resumed: Optional[Resumed] = None
        self.notes: List[str] = chosen.notes if chosen else []
        self._communicator = world.communicator() if self.is_on else None
        self._requests = RequestExchange(self._communicator, count=2)
        self._is_due = self._is_stopping = self._got_signal = self._has_just_saved = False
        self._writer = BackgroundWriter() if chosen else None
        self._best: Optional[float] = None
        self._newest = chosen.checkpoint if chosen else None
        self._last_time = time.monotonic()
        self._log: Optional[RunLog] = None
        self._progress: Optional[Progress] = None
        self._symbol: Optional[str] = None
        self._records: List[Dict[str, Any]] = []  # of the checkpoints that are being written
        self._run = store.RunDescription("", {}, world.size, "", 0.0)
        if self.is_on:
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)

    @property
    def is_on(self) -> bool:
        """Whether the run writes checkpoints."""
        return self._fingerprint is not None

    def _on_signal(self, number: int, _frame: Any) -> None:
        """Note the request to stop; a second SIGTERM ends the process at once."""
        self._got_signal = True
        if number == signal.SIGTERM:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def load(self) -> None:
        """Give every rank its state of the checkpoint, if the run continues from one."""
        chosen, world = self._choice, self._world
        manifest = world.broadcast(chosen.manifest if chosen else None)
        if manifest is None:
            return

        def read() -> List[RankState]:
            if chosen is None or chosen.checkpoint is None:
                return []
            try:
                return [state.read_rank(chosen.checkpoint, rank) for rank in range(world.size)]
            except DamagedError as error:
                raise UserError(f"checkpoint {chosen.checkpoint} cannot be used: {error}") from None

        ranks = world.run_on_all_ranks(read)
        continues = chosen is not None and self._continue_log(manifest)
        continues = world.broadcast(continues)
        self.resumed = Resumed(manifest, scatter(self._communicator, ranks), continues)
        self._best = manifest.best_accuracy

    def _continue_log(self, manifest: Manifest) -> bool:
        """Prepare the log file of the earlier process; return False if it is not there."""
        path, position = self._config.log_file, manifest.log
        if not path or position is None or not log_file.is_continuable(path, position):
            return False
        try:
            log_file.mark_lost_lines(path, position)
        except OSError as error:
            raise UserError(f"--log-file {path} cannot be written ({error.strerror})") from None
        return True

    def mark_replaced_log(self) -> None:
        """Make text of earlier events in the log that is not continued: it gets a new header.

        Raises:
            UserError: the log cannot be written.
        """
        if self._choice is None or not self._config.log_file or self.log_continues:
            return
        earlier = self._choice.replaced_log
        if self.resumed and self.resumed.manifest.log:
            earlier = self.resumed.manifest.log.path
        path = self._config.log_file
        if earlier != os.path.abspath(path):
            return
        try:
            log_file.mark_all_lines_lost(path)
        except OSError as error:
            raise UserError(f"--log-file {path} cannot be written ({error.strerror})") from None

    @property
    def position(self) -> Optional[Position]:
        return self.resumed.manifest.position if self.resumed else None

    @property
    def accuracy(self) -> Optional[float]:
        """Of the evaluation at the checkpoint, if there was one."""
        return self.resumed.manifest.accuracy if self.resumed else None

    @property
    def seed(self) -> Optional[int]:
        """Seed of the run that continues."""
        return self.resumed.manifest.seed if self.resumed else None

    @property
    def log_continues(self) -> bool:
        """Whether the log has the lines up to the checkpoint already."""
        return self.resumed is not None and self.resumed.log_continues

    @property
    def input_state(self) -> Optional[InputState]:
        return self.resumed.rank.input if self.resumed else None

    def start(self, config: Config, log: RunLog, progress: Progress) -> None:
        """Take the settings with the effective seed, and the outputs; describe a new run.

        Raises:
            UserError: the description cannot be written.
        """
        self._log, self._progress = log, progress
        if self.resumed:
            progress.resume(self.resumed.manifest.run_started, self._best or 0.0)
        if self._choice is None or self._fingerprint is None:
            self._config = config
            return
        self._config = config
        settings = effective_settings(config)
        self._fingerprint = dataclasses.replace(self._fingerprint, settings=settings)
        earlier = self.resumed.manifest if self.resumed else None
        self._run = store.RunDescription(
            earlier.run_id if earlier else secrets.token_hex(8),
            settings,
            self._world.size,
            os.path.abspath(config.log_file) if config.log_file else "",
            earlier.run_started if earlier else time.time(),
            job=os.environ.get("JOB_UID", ""),
        )
        try:
            store.write_run(self._choice.folder, self._run)
        except OSError as error:
            raise UserError(
                f"--checkpoint-dir {self._choice.folder} cannot be written ({error.strerror}): "
                "name another folder, or write no checkpoints (--checkpoints 0)"
            ) from None

    def restore(self, trainer: Trainer) -> None:
        """Set the network, the optimizer and the random generators as they were."""
        if self.resumed is None:
            return
        manifest, rank = self.resumed.manifest, self.resumed.rank
        network: Optional[NetworkState] = None
        if self._choice and self._choice.checkpoint:
            folder, channel_last = self._choice.checkpoint, trainer.has_channel_last_weights
            try:
                network = state.read_network(folder, manifest.updates, channel_last)
            except DamagedError as error:
                raise UserError(f"checkpoint {folder} cannot be used: {error}") from None
        trainer.restore(cast(NetworkState, self._world.broadcast(network)), rank.own)
        state.set_generator_states(rank.generators)

    def announce(self) -> None:
        """Log that the run continues, and from where."""
        if self.resumed is None or self._log is None or self._progress is None:
            return
        manifest = self.resumed.manifest
        gap = max(0.0, time.time() - manifest.created)
        self._log.resumed(manifest.position, gap)
        self._progress.write_line(
            f"resumed from checkpoint {manifest.position.folder_name}, written {gap:.0f} s ago"
        )

    def due(self, can_save: bool, can_save_soon: bool = True) -> bool:
        """Return whether to write a checkpoint after this step. Every rank calls it in each step.

        Args:
            can_save: whether the input's state can be saved now; the same on every rank.
            can_save_soon: whether that is so within a few steps.

        Raises:
            Interrupted: SIGTERM came, and the position in the input cannot be saved.
        """
        if not self.is_on:
            return False
        self._report()
        seconds = self._config.checkpoint_minutes * 60
        late = 0 < seconds <= time.monotonic() - self._last_time
        wanted = late and self._writer is not None and not self._writer.is_busy
        timed, stopped = self._requests.exchange([wanted, self._got_signal])
        # The exchange began before the checkpoint of the last step, which has met the request.
        timed = timed and not self._has_just_saved
        self._has_just_saved = False
        self._is_due = self._is_due or timed or stopped
        self._is_stopping = self._is_stopping or stopped
        if self._is_stopping and not can_save_soon:
            self._interrupt()
        return self._is_due and can_save

    def _interrupt(self) -> None:
        """Raise Interrupted on every rank, once nothing is written any more."""
        self._report(wait=True)
        self._requests.finish()
        if self._progress:
            self._progress.write_line(
                "stopped by SIGTERM: the same command continues from the last checkpoint"
            )
        self._world.barrier()
        raise Interrupted

    def save(
        self,
        position: Position,
        trainer: Trainer,
        inputs: InputState,
        accuracy: Optional[float] = None,
    ) -> None:
        """Copy the state of all ranks, and write it beside the next steps. Every rank calls it.

        Args:
            position: in the run.
            trainer: the network and the optimizer.
            inputs: position in the training data.
            accuracy: of the evaluation at this position.

        Raises:
            Interrupted: SIGTERM was the reason. The checkpoint is written.
        """
        if not self.is_on:
            return
        trainer.wait()  # for the step itself
        start = time.perf_counter()
        own = RankState(trainer.own_state(), inputs, state.generator_states())
        ranks = gather(self._communicator, own)
        is_best = accuracy is not None and (self._best is None or accuracy > self._best)
        if is_best:
            self._best = accuracy
        if self._writer:
            self._report(wait=True)  # one copy of the state at a time
            network = trainer.network_state()
            self._symbol = self._symbol or trainer.symbol_json()
            write = self._write_function(position, network, ranks, accuracy, is_best)
            self._writer.submit(write)
            self._records.append(
                {"position": position, "wait_seconds": time.perf_counter() - start}
            )
        self._last_time = time.monotonic()
        self._is_due, self._has_just_saved = False, True
        if self._is_stopping:
            self._interrupt()

    def _write_function(
        self,
        position: Position,
        network: NetworkState,
        ranks: List[RankState],
        accuracy: Optional[float],
        is_best: bool,
    ) -> Callable[[], str]:
        """Return the function that writes a checkpoint, for the writer's thread."""
        chosen, fingerprint, symbol = self._choice, self._fingerprint, self._symbol
        if chosen is None or fingerprint is None or symbol is None:
            raise RuntimeError("only rank 0 writes checkpoints, after start()")
        path = self._config.log_file
        manifest = Manifest(
            run_id=self._run.run_id,
            position=position,
            updates=network.updates,
            seed=int(self._config.seed or 0),
            accuracy=accuracy,
            best_accuracy=self._best,
            is_best=is_best,
            created=time.time(),
            run_started=self._run.started,
            fingerprint=fingerprint,
            log=log_file.position_of(path) if path and os.path.isfile(path) else None,
        )
        folder = chosen.folder

        def write() -> str:
            if manifest.log:
                log_file.sync(manifest.log.path)
            written = store.publish(
                folder,
                position,
                state.size_bytes(network, ranks),
                lambda partial: state.write_state(partial, symbol, network, ranks),
                lambda files: dataclasses.replace(manifest, files=files),
            )
            store.prune(folder, written)
            return written

        return write

    def _report(self, wait: bool = False) -> None:
        """Log the writes that have ended."""
        if self._writer is None or self._log is None or self._progress is None:
            return
        for result in self._writer.results(wait):
            record = self._records.pop(0)
            position = record["position"]
            if result.path is None:
                self._progress.write_line(
                    f"warning: checkpoint {position.folder_name} could not be written "
                    f"({result.error}): the run goes on without it"
                )
                continue
            self._newest = result.path
            self._log.checkpoint(position, record["wait_seconds"], result.seconds)

    def finish(self, outcome: str) -> None:
        """Note that the run has ended, so that it is not resumed. Every rank calls it.

        Args:
            outcome: "success" or "aborted", as in the log.
        """
        if not self.is_on:
            return
        self._requests.finish()
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        if self._choice is None or self._progress is None:
            return
        self._report(wait=True)
        try:
            store.write_run(self._choice.folder, dataclasses.replace(self._run, outcome=outcome))
            if self._newest:
                store.prune(self._choice.folder, self._newest, kept=1)
        except OSError as error:
            self._progress.write_line(
                f"warning: {self._choice.folder} cannot be written ({error.strerror}): the same "
                "command would continue this finished run"
            )
