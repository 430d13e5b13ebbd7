# SPDX-License-Identifier: Apache-2.0
"""What the person at the terminal sees of a run: plain lines on standard error and in the log file, from rank 0 only."""

from __future__ import annotations

import sys
import time
from typing import Callable, Optional, Sequence, TextIO

from mxresnet.config import Config
from mxresnet.errors import UserError
from mxresnet.metrics import Score, images_per_second
from mxresnet.run_plan import Plan


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Progress:
    """Speaks on rank 0, is silent elsewhere; clock returns seconds."""

    def __init__(
        self,
        plan: Plan,
        images_per_epoch: int,
        images_per_step: int,
        every_steps: int,
        rank: int,
        streams: Sequence[TextIO] = (sys.stderr,),
        clock: Callable[[], float] = time.monotonic,
    ):
        self._plan, self._images, self._step_images, self._every = (
            plan,
            images_per_epoch,
            images_per_step,
            every_steps,
        )
        self._streams = streams if rank == 0 else ()
        self._clock = clock
        self._run_start = self._epoch_start = self._mark = 0.0
        self._best = 0.0

    def write_line(self, text: str) -> None:
        for stream in self._streams:
            try:
                stream.write(text + "\n")  # in one piece: what ranks write is collected by mpirun
                stream.flush()
            except OSError as error:
                raise UserError(
                    f"{getattr(stream, 'name', 'a stream')} cannot be written ({error.strerror})"
                ) from None

    def run_started(self) -> None:
        self._run_start = self._clock()

    def epoch_started(self) -> None:
        self._epoch_start = self._mark = self._clock()

    def step_done(self, epoch: int, step: int) -> None:
        if self._every and step % self._every == 0:
            now = self._clock()
            speed = images_per_second(self._every * self._step_images, now - self._mark)
            self._mark = now
            self.write_line(
                f"epoch {epoch}, step {step} of {self._plan.steps_per_epoch}: {speed:,.0f} images/s"
            )

    def epoch_done(self, epoch: int, learning_rate: float) -> float:
        """Say how the epoch went; return its images per second."""
        seconds = self._clock() - self._epoch_start
        per_epoch = (self._clock() - self._run_start) / epoch  # evaluations included
        left = per_epoch * (self._plan.num_epochs - epoch)
        speed = images_per_second(self._images, seconds)
        self.write_line(
            f"epoch {epoch:{len(str(self._plan.num_epochs))}d} of at most {self._plan.num_epochs}: {speed:,.0f} images/s, "
            f"{duration(seconds)}, learning rate {learning_rate:.4g}, at most {duration(left)} left"
        )
        return speed

    def evaluated(self, epoch: int, score: Score, config: Config) -> None:
        self._best = max(self._best, score.accuracy)
        target = config.accuracy_threshold
        verdict = "target reached" if score.accuracy > target else f"target above {target:g}"
        top_k = f", top-{config.top_k} {score.top_k_accuracy:.4f}" if config.top_k else ""
        self.write_line(
            f"after epoch {epoch}: accuracy {score.accuracy:.4f} ({score.correct} of {score.total}){top_k}, {verdict}"
        )

    def run_done(self, reached: Optional[bool], target: float) -> None:
        took = duration(self._clock() - self._run_start)
        if reached is None:
            self.write_line(f"done in {took}; nothing was evaluated")
        elif reached:
            self.write_line(
                f"trained to accuracy {self._best:.4f} (target above {target:g}) in {took}"
            )
        else:
            self.write_line(
                f"target accuracy {target:g} missed: best {self._best:.4f} in {self._plan.num_epochs} epochs, {took}"
            )
