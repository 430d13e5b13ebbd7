# SPDX-License-Identifier: Apache-2.0
"""The MLPerf log: keys, values and order of its lines. The only module that writes it.

Keys, values and order are those of NVIDIA's v2.1 MXNet logs, except for the differences that
docs/fidelity.md lists; mlperf_logging's compliance checker (ruleset 2.1.0) defines the rules.
Rank 0 writes every line, to standard output and to --log-file; the other ranks write only
init_start, to standard output.
"""

from __future__ import annotations

import dataclasses
import logging
import pathlib
import sys
from typing import Any, Dict, Iterable, Optional, Sequence, Tuple

from mlperf_logging import mllog
from mlperf_logging.mllog import constants

from mxresnet.checkpoint.log_file import CHECKPOINT_KEY, RESUMED_KEY
from mxresnet.checkpoint.manifest import Position
from mxresnet.config import Config
from mxresnet.errors import Interrupted, UserError
from mxresnet.lr_schedule import END_LEARNING_RATE, POLYNOMIAL_POWER
from mxresnet.run_plan import Block, Plan
from mxresnet.standard_streams import describe_error, output_error
from mxresnet.step_times import StepTimes


class _LogFile(logging.FileHandler):
    """A log file that stores the error of a failed write, because a log must be complete.

    logging only prints such an error, and mlperf_logging would report an exception raised here as
    an error in the line. _raise_write_error() raises the stored error after the line.
    """

    write_error: Optional[UserError] = None

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        error = sys.exc_info()[1]
        reason = getattr(error, "strerror", error)
        self.write_error = UserError(f"--log-file {self.baseFilename} cannot be written ({reason})")


def _raise_write_error(to_file: bool = False) -> None:
    """Raise UserError if a line could not be written to the log.

    The log is the log file, and without one it is standard output.

    Args:
        to_file: the log is a file, which another rank may write.
    """
    for handler in mllog.get_mllogger().logger.handlers:
        if isinstance(handler, _LogFile):
            to_file = True
            if handler.write_error:
                raise handler.write_error
    error = None if to_file else output_error()
    if error is not None:
        raise UserError(
            f"standard output, which is the MLPerf log, cannot be written ({describe_error(error)})"
            ": send it to a file, or set --log-file"
        )


def open_file(path: str) -> None:
    """Append every further line of this process to a file.

    Only this process writes the file. In the output that mpirun collects, by contrast, another
    rank's output may interrupt a line.

    Raises:
        UserError: the file cannot be written.
    """
    if pathlib.Path(path).is_fifo():  # to open it would wait for a reader
        raise UserError(f"--log-file {path} is a named pipe: name a file")
    try:
        mllog.get_mllogger().logger.addHandler(_LogFile(path))
    except OSError as error:
        raise UserError(
            f"--log-file {path} cannot be written ({error.strerror}): name a file in a folder that "
            "you may write"
        ) from None


def header(config: Config) -> None:
    """Log the submitter and the machine, once per run, before init_start."""
    log = mllog.get_mllogger()
    log.event(constants.SUBMISSION_BENCHMARK, constants.RESNET)
    log.event(constants.SUBMISSION_ORG, config.submission_org)
    log.event(constants.SUBMISSION_DIVISION, config.submission_division)
    log.event(constants.SUBMISSION_STATUS, config.submission_status)
    log.event(constants.SUBMISSION_PLATFORM, config.submission_platform)
    log.event(constants.CACHE_CLEAR, config.cache_cleared)
    _raise_write_error()


def init_start(to_file: bool = False, time_ms: Optional[int] = None) -> None:
    """Log the start of the process.

    Args:
        to_file: whether rank 0 writes the log to a file.
        time_ms: when it started, milliseconds since 1970; None: now.
    """
    mllog.get_mllogger().start(constants.INIT_START, time_ms=time_ms)
    _raise_write_error(to_file)


class _Interval:
    """A pair of start and stop lines; no stop line after an exception.

    This is a class and not a generator with @contextmanager, which would change the stack depth by
    which the logger finds the file and line to log.
    """

    def __init__(
        self,
        log: RunLog,
        kind: str,
        start: Dict[str, Any],
        stop: Optional[Dict[str, Any]],
        started: bool = False,
    ):
        """Take the metadata of the two lines.

        Args:
            log: where to write them.
            kind: first part of their keys.
            start: metadata of the start line.
            stop: metadata of the stop line; None: there is none.
            started: whether an earlier process has written the start line.
        """
        self._log, self._kind, self._start, self._stop = log, kind, start, stop
        self._started = started

    def __enter__(self) -> None:
        if self._started:
            return
        self._log.write("start", f"{self._kind}_start", None, self._start, depth=1)

    def __exit__(self, error: Any, *_: Any) -> None:
        if error is None and self._stop is not None:
            self._log.write("end", f"{self._kind}_stop", None, self._stop, depth=1)


class _Run:
    """Context manager that writes run_start on entry and run_stop on exit.

    The status of run_stop is "aborted" unless succeed() was called. A run that was interrupted
    after a checkpoint has no run_stop: it goes on in another process.
    """

    def __init__(self, log: RunLog):
        self._log, self._status = log, constants.ABORTED

    @property
    def text(self) -> str:
        """The status of run_stop: "success" or "aborted"."""
        return self._status

    def __enter__(self) -> _Run:
        self._log.write("start", constants.RUN_START, None, {}, depth=1)
        return self

    def succeed(self) -> None:
        self._status = constants.SUCCESS

    def __exit__(self, error_type: Any, *_: Any) -> None:
        if error_type is not None and issubclass(error_type, Interrupted):
            return
        self._log.write("end", constants.RUN_STOP, None, {"status": self._status}, depth=1)


class RunLog:
    """The lines of one run after init_start. Writes nothing on ranks other than 0."""

    def __init__(self, rank: int, has_start: bool = False):
        """Choose whether to write.

        Args:
            rank: this rank.
            has_start: whether the log file has the lines up to a checkpoint already: then nothing
                is written before resumed().
        """
        self._logger = mllog.get_mllogger() if rank == 0 else None
        self._is_muted = has_start

    def write(
        self, kind: str, key: str, value: Any, metadata: Dict[str, Any], depth: int = 0
    ) -> None:
        """Write one line.

        Args:
            kind: "event", "start" or "end".
            key: MLPerf's key.
            value: any JSON value.
            metadata: any JSON object.
            depth: callers to skip for the file and line number that are logged.

        Raises:
            UserError: the log cannot be written.
        """
        if self._logger and not self._is_muted:
            getattr(self._logger, kind)(key, value, metadata=metadata, stack_offset=2 + depth)
            _raise_write_error()

    def _event(
        self, key: str, value: Any = None, metadata: Optional[Dict[str, Any]] = None
    ) -> None:
        self.write("event", key, value, metadata or {}, depth=1)

    def initialization(
        self, seed: Optional[int], bn_span: int, parameter_names: Iterable[str]
    ) -> None:
        """Log the seed, the images per batch-norm statistic and every initialized parameter."""
        self._event(constants.SEED, seed)
        self._event(constants.MODEL_BN_SPAN, bn_span)
        for name in sorted(parameter_names):
            self._event(constants.WEIGHTS_INITIALIZATION, metadata={"tensor": name})

    def init_stop(self) -> None:
        self.write("end", constants.INIT_STOP, None, {})

    def hyperparameters(self, config: Config, plan: Plan, num_ranks: int) -> None:
        """Log the settings under the optimizer's keys.

        The decay steps of both optimizers are in epochs, as in the reference benchmark's logs.
        """
        schedule = plan.schedule
        if schedule.polynomial and not schedule.is_constant:
            for family in ("sgd", "lars"):
                self._event(f"{family}_opt_learning_rate_decay_poly_power", POLYNOMIAL_POWER)
                self._event(f"{family}_opt_end_learning_rate", END_LEARNING_RATE)
        elif not schedule.is_constant:
            self._event(
                "opt_learning_rate_decay_boundary_epochs",
                [step // plan.steps_per_epoch for step in schedule.drop_steps],
            )
        self._event("d_batch_size", config.batch_size)
        self._program(config)
        self._event(constants.GLOBAL_BATCH_SIZE, config.batch_size * num_ranks)
        self._program(config)
        self._event(constants.GRADIENT_ACCUMULATION_STEPS, 1)
        if "lars" in config.optimizer:
            self._event(constants.OPT_NAME, "lars")
            self._event(constants.LARS_EPSILON, config.lars_eps)
            self._event("lars_opt_weight_decay", config.wd)
            self._event("lars_opt_momentum", config.mom)
            self._event("lars_opt_base_learning_rate", config.lr)
            self._event("lars_opt_learning_rate_warmup_epochs", config.warmup_epochs)
            self._event("lars_opt_learning_rate_decay_steps", plan.num_epochs)
        else:
            self._event(constants.OPT_NAME, "sgd")
            self._event("sgd_opt_weight_decay", config.wd)
            self._event("sgd_opt_momentum", config.mom)
            self._event("sgd_opt_learning_rate_decay_steps", plan.num_epochs)
            self._event(constants.OPT_LR_WARMUP_EPOCHS, config.warmup_epochs)
            self._event("sgd_opt_base_learning_rate", config.lr)

    def _program(self, config: Config) -> None:
        """Log optimizer, network and gradient exchange; the reference does so twice."""
        self._event("s_optimizer", config.optimizer)
        self._event("s_network", config.network)
        self._event("s_process", config.kv_store)

    def run(self) -> _Run:
        """Return a context that logs run_start on entry and run_stop on exit."""
        return _Run(self)

    def samples(self, train: int, val: int) -> None:
        self._event(constants.TRAIN_SAMPLES, train)
        self._event(constants.EVAL_SAMPLES, val)

    def resumed(self, position: Position, gap_seconds: float) -> None:
        """Log that the run continues from a checkpoint, the time after which it does so."""
        self._is_muted = False
        metadata = {"checkpoint": position.folder_name, "epoch_num": position.epoch}
        self._event(RESUMED_KEY, gap_seconds, {**metadata, "step": position.step})

    def checkpoint(self, position: Position, wait_seconds: float, write_seconds: float) -> None:
        """Log a checkpoint: how long the step waited for it, and how long its write took."""
        seconds = {"wait_seconds": wait_seconds, "write_seconds": write_seconds}
        metadata = {constants.EPOCH_NUM: position.epoch, "step": position.step}
        self._event(CHECKPOINT_KEY, seconds, metadata)

    def block(self, block: Block, started: bool = False) -> _Interval:
        """Log a block; one without an evaluation is never closed, as in the reference.

        Args:
            block: the block.
            started: whether the log has its start already.
        """
        first = {constants.FIRST_EPOCH_NUM: block.first_epoch}
        start = {**first, constants.EPOCH_COUNT: block.epoch_count}
        return _Interval(self, "block", start, first if block.evaluated else None, started)

    def epoch(self, number: int, started: bool = False) -> _Interval:
        """Log an epoch, without its start if the log has that already."""
        metadata = {constants.EPOCH_NUM: number}
        return _Interval(self, "epoch", metadata, metadata, started)

    def evaluation(self, epoch: int) -> _Interval:
        metadata = {constants.EPOCH_NUM: epoch}
        return _Interval(self, "eval", metadata, stop=metadata)

    def throughput(self, images_per_second: float, epoch: int) -> None:
        self._event("tracked_stats", {"imgs_sec": images_per_second}, {"step": epoch})
        self._event("throughput", images_per_second)

    def train_loss(self, loss: float, epoch: int) -> None:
        """Log the mean loss of an epoch (docs/fidelity.md describes this and the next key)."""
        self._event("train_loss", loss, {constants.EPOCH_NUM: epoch})

    def step_times(self, times_of_ranks: Sequence[StepTimes], epoch: int) -> None:
        """Log for each figure of StepTimes the list of the ranks' values, by rank."""
        names = [field.name for field in dataclasses.fields(StepTimes)]
        value = {name: [getattr(times, name) for times in times_of_ranks] for name in names}
        self._event("step_times", value, {constants.EPOCH_NUM: epoch})

    def accuracy(self, fraction: float, epoch: int) -> None:
        self._event(constants.EVAL_ACCURACY, fraction, {constants.EPOCH_NUM: epoch})

    def times(self, rows_of_ranks: Sequence[Sequence[Tuple[str, float]]]) -> None:
        """Log the rows that Timing returned on each rank, in the reference's format."""
        for rank, rows in enumerate(rows_of_ranks):
            for key, value in rows:
                self._event(key, {"r": rank, "t": value})
