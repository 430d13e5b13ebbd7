# SPDX-License-Identifier: Apache-2.0
"""The MLPerf log: which line is written when, with which value. The only place that knows MLPerf's keys.

Key names and order follow NVIDIA's v2.1 MXNet logs; the rules are mlperf_logging's compliance checker, ruleset 2.1.0.
Lines go to standard output, and rank 0's to --log-file too. All are rank 0's but init_start, which every rank writes.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Dict, Iterable, Optional, Sequence, Tuple

from mlperf_logging import mllog
from mlperf_logging.mllog import constants

from mxresnet.config import Config
from mxresnet.errors import UserError
from mxresnet.lr_schedule import END_LEARNING_RATE, POLYNOMIAL_POWER
from mxresnet.run_plan import Block, Plan


class _LogFile(logging.FileHandler):
    """A log with lines missing is no log: a full disk ends the run, where logging would only grumble."""

    problem: Optional[UserError] = None

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        self.problem = UserError(
            f"--log-file {self.baseFilename} cannot be written ({getattr(error, 'strerror', error)})"
        )


def _check() -> None:
    """Raise what happened while a line was written. Not from within the logger, which would take it for a mistake in the line."""
    for handler in mllog.get_mllogger().logger.handlers:
        if isinstance(handler, _LogFile) and handler.problem:
            raise handler.problem


def open_file(path: str) -> None:
    """From now on append every line of this process to a file too. Raises UserError when it cannot be written.

    The file is this process's own, so that no line is cut by another's, as may happen in what mpirun collects.
    """
    try:
        mllog.get_mllogger().logger.addHandler(_LogFile(path))
    except OSError as error:
        raise UserError(
            f"--log-file {path} cannot be written ({error.strerror}): name a file in a folder that you may write"
        ) from None


def header(config: Config) -> None:
    """Who submits what on which machine; once per run, before init_start."""
    log = mllog.get_mllogger()
    log.event(constants.SUBMISSION_BENCHMARK, constants.RESNET)
    log.event(constants.SUBMISSION_ORG, config.submission_org)
    log.event(constants.SUBMISSION_DIVISION, config.submission_division)
    log.event(constants.SUBMISSION_STATUS, config.submission_status)
    log.event(constants.SUBMISSION_PLATFORM, config.submission_platform)
    log.event(constants.CACHE_CLEAR, config.cache_cleared)
    _check()


def init_start() -> None:
    mllog.get_mllogger().start(constants.INIT_START)
    _check()


class _Interval:
    """A pair of start and end lines. A class, not a generator: the logger records the calling line by stack depth."""

    def __init__(self, log: RunLog, kind: str, metadata: Dict[str, Any]):
        self._log, self._kind, self._metadata = log, kind, metadata

    def __enter__(self) -> None:
        self._log.write("start", f"{self._kind}_start", None, self._metadata, depth=1)

    def __exit__(self, error: Any, *_: Any) -> None:
        if error is None:
            self._log.write("end", f"{self._kind}_stop", None, self._metadata, depth=1)


class _Run:
    """run_start ... run_stop. The end is "aborted" whatever happens, unless succeed() was called."""

    def __init__(self, log: RunLog):
        self._log, self._status = log, constants.ABORTED

    def __enter__(self) -> _Run:
        self._log.write("start", constants.RUN_START, None, {}, depth=1)
        return self

    def succeed(self) -> None:
        self._status = constants.SUCCESS

    def __exit__(self, *_: Any) -> None:
        self._log.write("end", constants.RUN_STOP, None, {"status": self._status}, depth=1)


class RunLog:
    """The log of one run, after init_start."""

    def __init__(self, rank: int):
        self._logger = mllog.get_mllogger() if rank == 0 else None

    def write(
        self, kind: str, key: str, value: Any, metadata: Dict[str, Any], depth: int = 0
    ) -> None:
        """One line; kind is event, start or end; depth counts the callers to skip for the line's file and number."""
        if self._logger:
            getattr(self._logger, kind)(key, value, metadata=metadata, stack_offset=2 + depth)
            _check()

    def _event(
        self, key: str, value: Any = None, metadata: Optional[Dict[str, Any]] = None
    ) -> None:
        self.write("event", key, value, metadata or {}, depth=1)

    def initialization(self, seed: int, bn_span: int, parameters: Iterable[str]) -> None:
        """Seed, images per batch-norm statistic, and the name of every parameter that was initialized."""
        self._event(constants.SEED, seed)
        self._event(constants.MODEL_BN_SPAN, bn_span)
        for name in sorted(parameters):
            self._event(constants.WEIGHTS_INITIALIZATION, metadata={"tensor": name})

    def init_stop(self) -> None:
        self.write("end", constants.INIT_STOP, None, {})

    def hyperparameters(self, config: Config, plan: Plan, ranks: int) -> None:
        """What was set, under the optimizer's own keys. Decay steps are logged in epochs, as the reference does."""
        if plan.schedule.polynomial and not plan.schedule.is_constant:
            for family in ("sgd", "lars"):
                self._event(f"{family}_opt_learning_rate_decay_poly_power", POLYNOMIAL_POWER)
                self._event(f"{family}_opt_end_learning_rate", END_LEARNING_RATE)
        elif not plan.schedule.is_constant:
            self._event(
                "opt_learning_rate_decay_boundary_epochs",
                [step // plan.steps_per_epoch for step in plan.schedule.drop_steps],
            )
        self._event("d_batch_size", config.batch_size)
        self._event("s_optimizer", config.optimizer)
        self._event("s_network", config.network)
        self._event("s_process", config.kv_store)
        self._event(constants.GLOBAL_BATCH_SIZE, config.batch_size * ranks)
        self._event(constants.GRADIENT_ACCUMULATION_STEPS, 1)
        lars = "lars" in config.optimizer
        family = "lars" if lars else "sgd"
        self._event(constants.OPT_NAME, family)
        if lars:
            self._event(constants.LARS_EPSILON, config.lars_eps)
        self._event(f"{family}_opt_weight_decay", config.wd)
        self._event(f"{family}_opt_momentum", config.mom)
        self._event(f"{family}_opt_base_learning_rate", config.lr)
        warmup = "lars_opt_learning_rate_warmup_epochs" if lars else constants.OPT_LR_WARMUP_EPOCHS
        self._event(warmup, config.warmup_epochs)
        self._event(f"{family}_opt_learning_rate_decay_steps", plan.num_epochs)

    def run(self) -> _Run:
        return _Run(self)

    def samples(self, train: int, val: int) -> None:
        self._event(constants.TRAIN_SAMPLES, train)
        self._event(constants.EVAL_SAMPLES, val)

    def block(self, block: Block) -> _Interval:
        metadata = {
            constants.FIRST_EPOCH_NUM: block.first_epoch,
            constants.EPOCH_COUNT: block.epoch_count,
        }
        return _Interval(self, "block", metadata)

    def epoch(self, number: int) -> _Interval:
        return _Interval(self, "epoch", {constants.EPOCH_NUM: number})

    def evaluation(self, epoch: int) -> _Interval:
        return _Interval(self, "eval", {constants.EPOCH_NUM: epoch})

    def throughput(self, images_per_second: float, epoch: int) -> None:
        self._event("tracked_stats", {"imgs_sec": images_per_second}, {"step": epoch})
        self._event("throughput", images_per_second)

    def accuracy(self, fraction: float, epoch: int) -> None:
        self._event(constants.EVAL_ACCURACY, fraction, {constants.EPOCH_NUM: epoch})

    def times(self, rows_of_ranks: Sequence[Sequence[Tuple[str, float]]]) -> None:
        """How long parts of the run took on each rank, in the reference's form."""
        for rank, rows in enumerate(rows_of_ranks):
            for key, value in rows:
                self._event(key, {"r": rank, "t": value})
