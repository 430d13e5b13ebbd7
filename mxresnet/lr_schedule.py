# SPDX-License-Identifier: Apache-2.0
"""The learning rate of each optimizer update: warm-up, then polynomial decay or drops.

This module only does arithmetic. Sources: the MLPerf Training v2.1 rules; MXNet's PolyScheduler and
MultiFactorScheduler, which return the same values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

from mxresnet.config import Config

# The MLPerf rules fix both values of the polynomial decay.
END_LEARNING_RATE = 1e-4
POLYNOMIAL_POWER = 2
MIN_RATE = 2.0**-126  # the smallest normal number of float32


@dataclass(frozen=True)
class LearningRateSchedule:
    """The schedule of one run, in optimizer updates (steps). Updates count from 1."""

    peak_lr: float
    warmup_steps: int
    total_steps: int
    polynomial: bool  # False: the rate drops by drop_factor after each of drop_steps
    drop_steps: Tuple[int, ...]
    drop_factor: float
    warmup_is_constant: bool

    @property
    def is_constant(self) -> bool:
        """Whether the rate never changes: a drop factor of 1 or more disables the schedule."""
        return self.drop_factor >= 1

    def learning_rate(self, update: int) -> float:
        """Return the learning rate of a step. Steps count from 1; 0 is before the first one."""
        if self.is_constant:
            return self.peak_lr
        if self.warmup_steps and update <= self.warmup_steps:
            return self._warm_up(update)
        if self.polynomial:
            return self._polynomial_decay(update)
        return self._step_decay(update)

    def _warm_up(self, update: int) -> float:
        """Return a rate that rises linearly to the peak.

        MXNet's "constant" warm-up is instead zero until its last update.
        """
        if self.warmup_is_constant and update < self.warmup_steps:
            return 0.0
        return self.peak_lr * update / self.warmup_steps

    def _polynomial_decay(self, update: int) -> float:
        """Return a rate that decays from the peak to END_LEARNING_RATE at the last update."""
        decay_steps = self.total_steps - self.warmup_steps
        remaining = max(0.0, 1 - (update - self.warmup_steps) / decay_steps)
        return END_LEARNING_RATE + (self.peak_lr - END_LEARNING_RATE) * remaining**POLYNOMIAL_POWER

    def _step_decay(self, update: int) -> float:
        """Return the peak times drop_factor to the power of the drops before this update.

        A rate that float32 cannot hold is 0: MXNet's kernels refuse it.
        """
        drops = sum(update > step for step in self.drop_steps)
        rate = self.peak_lr * self.drop_factor**drops
        return rate if rate >= MIN_RATE else 0.0


def make_schedule(config: Config, steps_per_epoch: int) -> LearningRateSchedule:
    """Convert the schedule of the settings, which counts epochs, to steps."""
    polynomial = "pow" in config.lr_step_epochs
    drop_epochs = [] if polynomial else [e for e in config.lr_step_epochs.split(",") if e]
    return LearningRateSchedule(
        peak_lr=config.lr,
        warmup_steps=steps_per_epoch * config.warmup_epochs,
        total_steps=steps_per_epoch * config.num_epochs,
        polynomial=polynomial,
        drop_steps=tuple(steps_per_epoch * int(epoch) for epoch in drop_epochs),
        drop_factor=config.lr_factor,
        warmup_is_constant=not polynomial and config.warmup_strategy == "constant",
    )
