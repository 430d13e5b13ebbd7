# SPDX-License-Identifier: Apache-2.0
"""Human-readable progress of a run on standard error and in the log file, from rank 0."""

from __future__ import annotations

import sys
import time
from typing import Callable, Optional, Sequence, TextIO

from mxresnet.config import Config
from mxresnet.errors import UserError
from mxresnet.metrics import Score
from mxresnet.run_plan import Plan


def format_duration(seconds: float) -> str:
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def images_per_second(images: float, seconds: float) -> float:
    """Return the throughput; to get that of all ranks, pass the number of images of all ranks."""
    return images / seconds


class Progress:
    """Measures the run's speed on every rank and writes lines on rank 0."""

    def __init__(
        self,
        plan: Plan,
        images_per_epoch: int,
        images_per_step: int,
        interval_steps: int,
        rank: int,
        streams: Sequence[TextIO] = (sys.stderr,),
        clock: Callable[[], float] = time.monotonic,
    ):
        """Store what the lines are computed from; write nothing.

        Args:
            plan: steps and epochs of the run.
            images_per_epoch: training images of all ranks together.
            images_per_step: training images of all ranks together.
            interval_steps: steps between two lines; 0: one line an epoch.
            rank: this rank.
            streams: where rank 0 writes.
            clock: returns seconds.
        """
        self._plan = plan
        self._images_per_epoch, self._images_per_step = images_per_epoch, images_per_step
        self._interval_steps = interval_steps
        self._streams = streams if rank == 0 else ()
        self._clock = clock
        self._run_start = self._epoch_start = self._interval_start = 0.0
        self._best_accuracy = 0.0
        self._seconds_before = 0.0  # of the run, before this process
        self._first_step = 1

    def write_line(self, text: str) -> None:
        """Write a line on rank 0.

        Raises:
            UserError: a stream cannot be written.
        """
        for stream in self._streams:
            try:
                stream.write(text + "\n")  # in one call, so that mpirun does not split the line
                stream.flush()
            except OSError as error:
                name = getattr(stream, "name", "a stream")
                raise UserError(f"{name} cannot be written ({error.strerror})") from None

    def resume(self, run_started: float, best_accuracy: float) -> None:
        """Continue an earlier process: the time since then counts as time of the run.

        Args:
            run_started: when it started, seconds since 1970.
            best_accuracy: of its evaluations.
        """
        self._seconds_before = max(0.0, time.time() - run_started)
        self._best_accuracy = best_accuracy

    def run_started(self) -> None:
        self._run_start = self._clock() - self._seconds_before

    def epoch_started(self, first_step: int = 1) -> None:
        """Start to measure an epoch whose earlier steps another process has done."""
        self._first_step = first_step
        self._epoch_start = self._interval_start = self._clock()

    def step_done(self, epoch: int, step: int) -> None:
        """Write the speed since the previous line, every interval_steps steps."""
        if self._interval_steps and step % self._interval_steps == 0:
            now = self._clock()
            images = self._interval_steps * self._images_per_step
            speed = images_per_second(images, now - self._interval_start)
            self._interval_start = now
            self.write_line(
                f"epoch {epoch}, step {step} of {self._plan.steps_per_epoch}: {speed:,.0f} images/s"
            )

    def epoch_done(self, epoch: int, learning_rate: float, loss: float) -> float:
        """Write the epoch's line; return the epoch's images per second over all ranks."""
        num_epochs = self._plan.num_epochs
        epoch_seconds = self._clock() - self._epoch_start
        seconds_per_epoch = (self._clock() - self._run_start) / epoch  # evaluations included
        seconds_left = seconds_per_epoch * (num_epochs - epoch)
        steps = self._plan.steps_per_epoch
        images = self._images_per_epoch * (steps - self._first_step + 1) / steps
        speed = images_per_second(images, max(epoch_seconds, 1e-9))
        self.write_line(
            f"epoch {epoch:{len(str(num_epochs))}d} of at most {num_epochs}: {speed:,.0f} images/s,"
            f" {format_duration(epoch_seconds)}, loss {loss:.4f}, learning rate "
            f"{learning_rate:.4g}, at most {format_duration(seconds_left)} left"
        )
        return speed

    def evaluated(self, epoch: int, score: Score, config: Config) -> None:
        """Write the accuracy of an evaluation."""
        self._best_accuracy = max(self._best_accuracy, score.accuracy)
        target = config.accuracy_threshold
        verdict = "target reached" if score.accuracy > target else f"target above {target:g}"
        top_k = f", top-{config.top_k} {score.top_k_accuracy:.4f}" if config.top_k else ""
        self.write_line(
            f"after epoch {epoch}: accuracy {score.accuracy:.4f} "
            f"({score.correct} of {score.total}){top_k}, {verdict}"
        )

    def run_done(self, reached: Optional[bool], target: float) -> None:
        """Write the result; reached is None when nothing was evaluated."""
        duration, best = format_duration(self._clock() - self._run_start), self._best_accuracy
        if reached is None:
            self.write_line(f"done in {duration}; nothing was evaluated")
        elif reached:
            self.write_line(
                f"trained to accuracy {best:.4f} (target above {target:g}) in {duration}"
            )
        else:
            self.write_line(
                f"target accuracy {target:g} missed: best {best:.4f} in "
                f"{self._plan.num_epochs} epochs, {duration}"
            )
