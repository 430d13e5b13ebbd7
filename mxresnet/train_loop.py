# SPDX-License-Identifier: Apache-2.0
"""The order of events in a run, and the log lines that go with them. Imports no framework.

Timing rules (MLPerf Training): work that takes time and reads no data comes before run_start. The
data set is read for the first time after run_start, with a barrier of all ranks on both sides of
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import (
    Any,
    Callable,
    Iterable,
    Iterator,
    List,
    NoReturn,
    Optional,
    Protocol,
    Tuple,
    TypeVar,
    cast,
)

from mxresnet.checkpoint.manifest import Position
from mxresnet.config import Config
from mxresnet.data.dataset import DataSet
from mxresnet.data.loader import Batch
from mxresnet.errors import UserError
from mxresnet.metrics import Score
from mxresnet.mllog import RunLog
from mxresnet.profiling import Rows, Timing
from mxresnet.progress import Progress
from mxresnet.run_plan import Plan
from mxresnet.step_times import StepClock

Value = TypeVar("Value")
# Steps whose gradients are checked later, because the device may not have finished them.
UNCHECKED_STEPS = 2


class Trainer(Protocol):
    """The methods of mxresnet.trainer.Trainer that a run uses; the tests use a fake."""

    def initialize(self) -> List[str]: ...

    def warm_up(self) -> None: ...

    def forward(self, batch: Batch) -> None: ...

    def backward(self) -> None: ...

    def update(self) -> None: ...

    def bad_gradient(self, max_pending: int) -> Optional[Tuple[str, int]]: ...

    def take_loss(self) -> float: ...

    def evaluate(self, batches: Iterable[Batch]) -> Score: ...

    def wait(self) -> None: ...

    def start_profile(self) -> None: ...

    def stop_profile(self) -> None: ...


class Checkpoints(Protocol):
    """The methods of mxresnet.checkpoint.session.Session that a run uses."""

    @property
    def is_on(self) -> bool: ...

    @property
    def position(self) -> Optional[Position]: ...

    @property
    def accuracy(self) -> Optional[float]: ...

    @property
    def log_continues(self) -> bool: ...

    def restore(self, trainer: Any) -> None: ...

    def announce(self) -> None: ...

    def due(self, can_save: bool, can_save_soon: bool = True) -> bool: ...

    def save(
        self, position: Position, trainer: Any, inputs: Any, accuracy: Optional[float] = None
    ) -> None: ...

    def finish(self, outcome: str) -> None: ...


class TrainLoader(Protocol):
    @property
    def restores_exactly(self) -> bool: ...

    @property
    def can_save(self) -> bool: ...

    def state(self) -> Any: ...

    @property
    def wait_seconds(self) -> float: ...

    def batches(self, steps: int) -> Iterator[Batch]: ...


class ValLoader(Protocol):
    def batches(self) -> Iterator[Batch]: ...


class DataLoaders(Protocol):
    """Data loaders that have not read anything yet."""

    def open(self) -> Tuple[TrainLoader, ValLoader]: ...


class Ranks(Protocol):
    """The collective operations of mxresnet.parallel.world.World that a run uses."""

    @property
    def size(self) -> int: ...

    def barrier(self) -> None: ...

    def gather(self, value: Any) -> List[Any]: ...

    def run_on_all_ranks(self, function: Callable[[], Value]) -> Value: ...

    def raise_if_any_failed(self, problem: Optional[UserError]) -> None: ...

    def raise_same_error(self, problem: UserError) -> NoReturn: ...


@dataclass(frozen=True)
class TrainLoop:
    """One rank's run, from initial weights to the target accuracy or the last epoch."""

    config: Config
    dataset: DataSet
    plan: Plan
    ranks: Ranks
    log: RunLog
    progress: Progress
    trainer: Trainer
    data_loaders: DataLoaders
    timing: Timing
    checkpoints: Checkpoints

    def run(self) -> Optional[bool]:
        """Return whether the target accuracy was reached; None when nothing was evaluated.

        Raises:
            UserError: the data set is damaged or training diverged.
            Interrupted: SIGTERM came; a checkpoint is written, and run_stop is not logged.
        """
        self._prepare()
        with self.log.run() as run_status:
            self.ranks.barrier()
            self.progress.run_started()
            train_loader, val_loader = self.ranks.run_on_all_ranks(self.data_loaders.open)
            self.log.samples(self.dataset.train_examples, self.dataset.val_examples)
            self.checkpoints.announce()
            self.timing.profiler(on=True)
            reached = self._train_blocks(train_loader, val_loader)
            # A profiled run evaluates nothing; the reference benchmark logs it as a success.
            if reached or self.config.profile:
                run_status.succeed()
        self.checkpoints.finish(run_status.text)
        self.timing.profiler(on=False)
        self.trainer.stop_profile()
        self.progress.run_done(reached, self.config.accuracy_threshold)
        return reached

    def _prepare(self) -> None:
        """Initialize and warm up: the work that takes time and reads no data."""
        config = self.config
        parameter_names = self.trainer.initialize()
        self.log.initialization(config.seed, config.batch_size * config.bn_group, parameter_names)
        self.log.init_stop()
        self.log.hyperparameters(config, self.plan, self.ranks.size)
        self.trainer.warm_up()
        self.checkpoints.restore(self.trainer)
        self.trainer.start_profile()
        self.ranks.barrier()

    def _train_blocks(self, train_loader: TrainLoader, val_loader: ValLoader) -> Optional[bool]:
        """Train and evaluate block by block until an evaluation is above the target."""
        reached, steps = None, self.plan.steps_per_epoch
        start = self.checkpoints.position or Position(1, 0)
        for block in self.plan.blocks:
            end = Position(block.last_epoch, steps, evaluated=True)
            if end <= start:
                if block.evaluated:
                    accuracy = self.checkpoints.accuracy if end == start else None
                    reached = accuracy is not None and accuracy > self.config.accuracy_threshold
                if reached:  # the earlier process was ended before it noted that
                    break
                continue
            logged = self.checkpoints.log_continues and start >= Position(block.first_epoch, 1)
            accuracy = None
            with self.log.block(block, logged):
                for epoch in block.epochs:
                    if epoch >= start.epoch:
                        first_step = start.step + 1 if epoch == start.epoch else 1
                        self._train_epoch(epoch, train_loader, first_step)
                if block.evaluated:
                    score = self._evaluate(block.last_epoch, val_loader)
                    self.progress.evaluated(block.last_epoch, score, self.config)
                    accuracy = score.accuracy
                    reached = accuracy > self.config.accuracy_threshold
            if self.checkpoints.is_on:
                self.checkpoints.save(end, self.trainer, train_loader.state(), accuracy)
            if reached:
                break
        return reached

    def _train_epoch(self, epoch: int, train_loader: TrainLoader, first_step: int) -> None:
        """Take the steps of an epoch, those from the first one that is not done.

        The next batch is fetched while the device works on the current one.
        """
        trainer, timing, steps = self.trainer, self.timing, self.plan.steps_per_epoch
        self.progress.epoch_started(first_step)
        timing.start_epoch(epoch)
        waited_before = train_loader.wait_seconds
        with self.log.epoch(epoch, self.checkpoints.log_continues and first_step > 1):
            batches = train_loader.batches(steps - first_step + 1)
            batch = cast(Batch, next(batches, None))  # None if no step is left
            step_clock = StepClock()
            for step in range(first_step, steps + 1):
                with timing.step(step):
                    with timing.part("fwd_time"):
                        trainer.forward(batch)
                    with timing.part("load_time"):
                        inputs = self._input_state_if_due(train_loader, is_last=step == steps)
                        if step < steps:
                            batch = next(batches)
                    with timing.part("bwd_time"):
                        trainer.backward()
                    with timing.part("opt_time"):
                        trainer.update()
                self._log_times(timing.rows_at_limit())
                self.progress.step_done(epoch, step)
                step_clock.step_done()
                self._check_gradients(epoch, step, 0 if inputs is not None else UNCHECKED_STEPS)
                if inputs is not None:
                    self.checkpoints.save(Position(epoch, step), trainer, inputs)
            trainer.wait()  # the throughput below counts finished work, not queued work
            self._check_gradients(epoch, steps)
            self._log_times(timing.end_epoch())
        step_times = step_clock.summary(train_loader.wait_seconds - waited_before)
        # On ranks other than 0, which write nothing, the list is empty.
        ranks = self.ranks.gather((trainer.take_loss(), step_times))
        loss = sum(rank_loss for rank_loss, _ in ranks) / self.ranks.size
        learning_rate = self.plan.learning_rate(epoch * steps)
        throughput = self.progress.epoch_done(epoch, learning_rate, loss)
        self.log.throughput(throughput, epoch)
        self.log.train_loss(loss, epoch)
        self.log.step_times([times for _, times in ranks], epoch)

    def _input_state_if_due(self, train_loader: TrainLoader, is_last: bool) -> Optional[Any]:
        """Return the position in the data after this step's batch if a checkpoint is due."""
        exact = train_loader.restores_exactly
        can_save = train_loader.can_save and (exact or is_last)
        if not self.checkpoints.due(can_save, can_save_soon=exact or is_last):
            return None
        return train_loader.state()

    def _check_gradients(self, epoch: int, step: int, max_pending: int = 0) -> None:
        """Raise UserError on every rank when a gradient was not finite in the steps so far."""
        bad = self.trainer.bad_gradient(max_pending)
        if bad:
            parameter, steps_ago = bad
            self.ranks.raise_same_error(
                UserError(
                    f"epoch {epoch}, step {step - steps_ago}: the gradient of {parameter} is not "
                    f"finite (--dtype {self.config.dtype}): training diverged; lower --lr or use "
                    "more --warmup-epochs"
                )
            )

    def _evaluate(self, epoch: int, val_loader: ValLoader) -> Score:
        """Evaluate on the validation set, log the accuracy and return the score.

        Raises:
            UserError: not every image was counted exactly once.
        """
        self.timing.start_evaluation()
        with self.log.evaluation(epoch):
            score = self.trainer.evaluate(val_loader.batches())
        self._log_times(self.timing.end_evaluation())
        expected = self.dataset.val_examples
        if score.total != expected:  # the total is the same on every rank
            self.ranks.raise_if_any_failed(
                UserError(
                    f"the evaluation after epoch {epoch} counted {score.total} images of {expected}"
                )
            )
        self.log.accuracy(score.accuracy, epoch)
        return score

    def _log_times(self, rows: Rows) -> None:
        """Log the times of every rank; all ranks have rows, or none has."""
        if rows:
            self.log.times(self.ranks.gather(rows))
