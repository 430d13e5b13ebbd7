# SPDX-License-Identifier: Apache-2.0
"""The figures of one run, computed from its MLPerf log: times, accuracies, throughput, settings.

Any ResNet log of MLPerf Training 1.0 to 4.0 is accepted: other frameworks leave out epochs,
evaluation times or throughput, and a figure that a log does not have is None.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional

from mxresnet.results.log_reader import Event, finite_number
from mxresnet.results.log_scan import LogScan, scan_log
from mxresnet.results.rank_times import STEP_TIMES_KEY, StepTimes, read_step_times

TARGET_ACCURACY = 0.759  # of MLPerf's ResNet-50 on ImageNet
IMAGENET_TRAIN_IMAGES, IMAGENET_VAL_IMAGES = 1_281_167, 50_000
MAX_TEXT_CHARACTERS = 300
_INTERVALS = ("init", "run", "epoch", "eval", "block")
# Keys of the settings that are shown, in this order.
SETTINGS = {
    "seed": "seed",
    "global_batch_size": "global batch",
    "d_batch_size": "batch per accelerator",
    "gradient_accumulation_steps": "gradient accumulation steps",
    "model_bn_span": "batch-norm span",
    "s_network": "network",
    "opt_name": "optimizer",
    "s_optimizer": "optimizer implementation",
    "lars_opt_base_learning_rate": "base learning rate",
    "lars_opt_weight_decay": "weight decay",
    "lars_opt_momentum": "momentum",
    "lars_epsilon": "LARS epsilon",
    "lars_opt_learning_rate_warmup_epochs": "warm-up epochs",
    "lars_opt_learning_rate_decay_steps": "decay steps",
    "lars_opt_learning_rate_decay_poly_power": "decay power",
    "lars_opt_end_learning_rate": "end learning rate",
    "sgd_opt_base_learning_rate": "base learning rate (SGD)",
    "sgd_opt_weight_decay": "weight decay (SGD)",
    "sgd_opt_momentum": "momentum (SGD)",
    "opt_learning_rate_warmup_epochs": "warm-up epochs (SGD)",
    "sgd_opt_learning_rate_decay_steps": "decay epochs (SGD)",
    "train_samples": "training images",
    "eval_samples": "validation images",
    "cache_clear": "page cache dropped",
}
SUBMISSION_KEYS = ("benchmark", "org", "division", "status", "platform")
OTHER_KEYS = ("tracked_stats", "throughput", "eval_accuracy", "resumed", "environment")

WANTED_KEYS = frozenset(
    [*SETTINGS, *OTHER_KEYS, STEP_TIMES_KEY]
    + [f"submission_{name}" for name in SUBMISSION_KEYS]
    + [f"{name}_{end}" for name in _INTERVALS for end in ("start", "stop")]
)


class Epoch(NamedTuple):
    """One epoch of training."""

    epoch: int  # from 1
    seconds: Optional[float]
    images_per_second: Optional[float]
    source: str  # of the throughput: "log", "epoch time" or "block time"


class EvaluationFigures(NamedTuple):
    """One evaluation."""

    epoch: int
    accuracy: float  # top-1, a fraction
    seconds: Optional[float]
    minutes_after_start: Optional[float]


class Resumption(NamedTuple):
    """The start of a process that continued a run from a checkpoint."""

    epoch: Optional[int]
    step: Optional[int]
    gap_seconds: Optional[float]
    checkpoint: str


@dataclass
class RunFigures:
    """The figures of one run; None or empty where the log does not have them.

    Attributes:
        submission: Values of the submission_* events, by their names without the prefix.
        settings: Values of the keys in SETTINGS.
        status: Metadata of run_stop; None: the log has no run_stop.
        reached: Whether run_stop reports success and an accuracy is at least the target.
        run_seconds: From run_start to run_stop: MLPerf's time to train.
        init_seconds: From the first init_start to init_stop.
        init_to_run_seconds: From the first init_start to run_start.
        train_seconds, eval_seconds: Sums over epochs and evaluations.
        images_per_second: Mean of the epochs after the first.
        effective_images_per_second: Training images of all epochs over the run's time.
        log_throughput_is_plausible: False where the log's throughput contradicts the epoch times.
        run_starts, run_stops: Their numbers in the file: more than 1 for several ranks or runs.
        environment: Hardware and versions, where the log names them.
    """

    scan: LogScan
    submission: Dict[str, str] = field(default_factory=dict)
    settings: Dict[str, Any] = field(default_factory=dict)
    status: Optional[str] = None
    reached: bool = False
    started_ms: Optional[float] = None
    run_seconds: Optional[float] = None
    init_seconds: Optional[float] = None
    init_to_run_seconds: Optional[float] = None
    train_seconds: Optional[float] = None
    eval_seconds: Optional[float] = None
    epochs: List[Epoch] = field(default_factory=list)
    evaluations: List[EvaluationFigures] = field(default_factory=list)
    images_per_second: Optional[float] = None
    effective_images_per_second: Optional[float] = None
    log_throughput_is_plausible: bool = True
    resumptions: List[Resumption] = field(default_factory=list)
    step_times: StepTimes = field(default_factory=StepTimes)
    run_starts: int = 0
    run_stops: int = 0
    environment: Dict[str, Any] = field(default_factory=dict)

    @property
    def accelerators(self) -> Optional[int]:
        """Number of processes: the global batch over the batch of one."""
        total, each = self.number("global_batch_size"), self.number("d_batch_size")
        steps = self.number("gradient_accumulation_steps") or 1
        if not total or not each or total % (each * steps):
            return None
        return int(total / (each * steps))

    @property
    def final_evaluation(self) -> Optional[EvaluationFigures]:
        return self.evaluations[-1] if self.evaluations else None

    @property
    def is_imagenet(self) -> bool:
        return self.number("train_samples") in (None, IMAGENET_TRAIN_IMAGES)

    @property
    def other_seconds(self) -> Optional[float]:
        """Time of the run that is neither training nor evaluation."""
        if None in (self.run_seconds, self.train_seconds):
            return None
        spent = (self.train_seconds or 0.0) + (self.eval_seconds or 0.0)
        return max(0.0, (self.run_seconds or 0.0) - spent)

    def number(self, key: str) -> Optional[float]:
        """Return a setting as a finite number, or None."""
        return finite_number(self.settings.get(key))


def plain_value(value: Any) -> Any:
    """Return a JSON value for the report: finite numbers, bools and short text as they are."""
    if value is None or isinstance(value, (bool, str)):
        return value[:MAX_TEXT_CHARACTERS] if isinstance(value, str) else value
    if isinstance(value, (int, float)):
        number = finite_number(value)
        if number is None:
            return str(value)[:MAX_TEXT_CHARACTERS]
        return value
    return str(value)[:MAX_TEXT_CHARACTERS]


def _text(value: Any) -> str:
    return "" if value is None else str(value)[:MAX_TEXT_CHARACTERS]


def _epoch_number(event: Event, key: str = "epoch_num") -> Optional[int]:
    number = finite_number(event.metadata.get(key))
    return int(number) if number is not None and 0 <= number < 1e6 else None


class _Intervals:
    """Start and stop times of one kind of interval by epoch: first start, last stop."""

    def __init__(self, events: List[Event], kind: str, key: str = "epoch_num") -> None:
        self.starts: Dict[Optional[int], float] = {}
        self.stops: Dict[Optional[int], float] = {}
        for event in events:
            if event.time_ms is None or not event.key.startswith(kind):
                continue
            number = _epoch_number(event, key)
            if event.key == f"{kind}_start":
                self.starts[number] = min(event.time_ms, self.starts.get(number, event.time_ms))
            elif event.key == f"{kind}_stop":
                self.stops[number] = max(event.time_ms, self.stops.get(number, event.time_ms))

    def seconds(self, number: Optional[int]) -> Optional[float]:
        """Return the length of the interval of an epoch; None when it is incomplete."""
        start, stop = self.starts.get(number), self.stops.get(number)
        return None if start is None or stop is None or stop < start else (stop - start) / 1000

    @property
    def total_seconds(self) -> Optional[float]:
        known = [self.seconds(number) for number in self.starts]
        found = [value for value in known if value is not None]
        return sum(found) if found else None


def _run_times(figures: RunFigures, events: List[Event]) -> None:
    """Store the times of start and end, found as MLPerf's result summarizer finds them."""
    start = stop = None
    for event in events:
        if event.key == "run_start" and stop is None:
            start = event.time_ms
        elif event.key == "run_stop" and stop is None:
            stop = event.time_ms
            figures.status = _text(event.metadata.get("status")) or "unknown"
    figures.started_ms = start
    if start is not None and stop is not None and stop >= start:
        figures.run_seconds = (stop - start) / 1000
    initial = [e.time_ms for e in events if e.key == "init_start" and e.time_ms is not None]
    ended = [e.time_ms for e in events if e.key == "init_stop" and e.time_ms is not None]
    if initial and ended and ended[0] >= min(initial):
        figures.init_seconds = (ended[0] - min(initial)) / 1000
    if initial and start is not None and start >= min(initial):
        figures.init_to_run_seconds = (start - min(initial)) / 1000


def _evaluations(figures: RunFigures, events: List[Event]) -> List[EvaluationFigures]:
    """Return the evaluations in the order of their epochs; of repeated ones the first."""
    intervals = _Intervals(events, "eval")
    found: Dict[int, EvaluationFigures] = {}
    for event in events:
        accuracy, epoch = finite_number(event.value), _epoch_number(event)
        if event.key != "eval_accuracy" or accuracy is None or epoch is None or epoch in found:
            continue
        minutes = None
        if event.time_ms is not None and figures.started_ms is not None:
            minutes = (event.time_ms - figures.started_ms) / 60_000
        found[epoch] = EvaluationFigures(epoch, accuracy, intervals.seconds(epoch), minutes)
    return [found[epoch] for epoch in sorted(found)]


def _logged_throughput(events: List[Event]) -> Dict[int, float]:
    """Return the throughput that the log has for each epoch, images/s."""
    found: Dict[int, float] = {}
    for event in events:
        if event.key != "tracked_stats" or not isinstance(event.value, dict):
            continue
        epoch = _epoch_number(event, "step")
        speeds = [finite_number(event.value.get(name)) for name in ("imgs_sec", "throughput")]
        speed = next((value for value in speeds if value is not None), None)
        if epoch is not None and speed is not None and speed > 0:
            found.setdefault(epoch, speed)
    return found


def _epochs(figures: RunFigures, events: List[Event]) -> List[Epoch]:
    """Return the epochs with their times and throughput."""
    intervals, logged = _Intervals(events, "epoch"), _logged_throughput(events)
    images = figures.number("train_samples")
    numbers = {number for number in [*intervals.starts, *logged] if number is not None}
    epochs = []
    for number in sorted(numbers):
        seconds = intervals.seconds(number)
        measured = images / seconds if images and seconds else None
        speed = logged.get(number)
        epochs.append(
            Epoch(number, seconds, speed, "log")
            if speed is not None
            else Epoch(number, seconds, measured, "epoch time")
        )
    return epochs or _epochs_of_blocks(figures, events)


def _epochs_of_blocks(figures: RunFigures, events: List[Event]) -> List[Epoch]:
    """Return the epochs of a log that has only blocks, each with the mean of its block."""
    blocks, evaluations = _Intervals(events, "block", "first_epoch_num"), _Intervals(events, "eval")
    images = figures.number("train_samples")
    epochs = []
    for event in events:
        first, count = _epoch_number(event, "first_epoch_num"), _epoch_number(event, "epoch_count")
        if event.key != "block_start" or first is None or not count or count > 1000:
            continue
        last = first + count - 1
        seconds = blocks.seconds(first)
        if seconds is not None:
            seconds = (seconds - (evaluations.seconds(last) or 0.0)) / count
        speed = images / seconds if images and seconds and seconds > 0 else None
        epochs += [Epoch(number, seconds, speed, "block time") for number in range(first, last + 1)]
    return sorted({epoch.epoch: epoch for epoch in epochs}.values())


def _throughput(figures: RunFigures) -> None:
    """Store the mean throughput, and whether the log's agrees with the times of the epochs."""
    later = [epoch for epoch in figures.epochs if epoch.epoch > figures.epochs[0].epoch]
    speeds = [epoch.images_per_second for epoch in later or figures.epochs]
    known = [speed for speed in speeds if speed is not None]
    figures.images_per_second = sum(known) / len(known) if known else None
    images, last = figures.number("train_samples"), figures.final_evaluation
    if images and last and figures.run_seconds:
        figures.effective_images_per_second = images * last.epoch / figures.run_seconds
    effective, logged = figures.effective_images_per_second, figures.images_per_second
    if figures.is_imagenet and images and last and effective and logged and figures.run_seconds:
        training = figures.run_seconds - (figures.eval_seconds or 0.0)
        by_time = images * last.epoch / max(training, 1e-3)
        figures.log_throughput_is_plausible = logged < 2 * by_time


def figures_of_scan(scan: LogScan) -> RunFigures:
    """Compute the figures of a log that was read with WANTED_KEYS."""
    figures, events = RunFigures(scan), scan.events
    figures.run_starts, figures.run_stops = (
        scan.counts.get(key, 0) for key in ("run_start", "run_stop")
    )
    for event in events:
        if event.key in SETTINGS and event.key not in figures.settings:
            figures.settings[event.key] = plain_value(event.value)
        elif event.key.startswith("submission_"):
            figures.submission.setdefault(event.key[len("submission_") :], _text(event.value))
        elif event.key == "environment" and isinstance(event.value, dict):
            figures.environment = {
                _text(key): plain_value(value) for key, value in list(event.value.items())[:50]
            }
        elif event.key == "resumed":
            figures.resumptions.append(_resumption(event))
    _run_times(figures, events)
    figures.evaluations = _evaluations(figures, events)
    figures.epochs = _epochs(figures, events)
    figures.eval_seconds = _Intervals(events, "eval").total_seconds
    times = [epoch.seconds for epoch in figures.epochs if epoch.seconds is not None]
    figures.train_seconds = sum(times) if times else None
    if figures.epochs:
        _throughput(figures)
    best = max((evaluation.accuracy for evaluation in figures.evaluations), default=0.0)
    figures.reached = figures.status == "success" and best >= TARGET_ACCURACY
    figures.step_times = read_step_times(events)
    return figures


def _resumption(event: Event) -> Resumption:
    """Return what an event `resumed` has: the value is the gap in seconds."""
    steps = finite_number(event.metadata.get("step"))
    return Resumption(
        _epoch_number(event),
        None if steps is None else int(steps),
        finite_number(event.value),
        _text(event.metadata.get("checkpoint")),
    )


def read_figures(path: str) -> RunFigures:
    """Read a log and compute its figures.

    Raises:
        OSError: The file cannot be read.
    """
    return figures_of_scan(scan_log(path, WANTED_KEYS))
