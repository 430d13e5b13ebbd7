# SPDX-License-Identifier: Apache-2.0
"""When things happen: epochs turned into steps and blocks once, and the learning rate of each step. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

from mxresnet.config import Config
from mxresnet.errors import UserError

END_LEARNING_RATE = 1e-4  # fixed by the MLPerf rules, as is the exponent
POLYNOMIAL_POWER = 2


@dataclass(frozen=True)
class Block:
    """Epochs (counted from 1) between two evaluations, as MLPerf logs them; the last block may lack its evaluation."""

    first_epoch: int
    epoch_count: int
    evaluated: bool

    @property
    def epochs(self) -> range:
        return range(self.first_epoch, self.first_epoch + self.epoch_count)


@dataclass(frozen=True)
class Plan:
    """One run in steps. Learning rates are those of the optimizer's update number, which counts from 1."""

    steps_per_epoch: int
    num_epochs: int
    warmup_steps: int
    total_steps: int
    peak_lr: float
    polynomial: bool  # else the rate drops by drop_factor at each of drop_steps
    drop_steps: Tuple[int, ...]
    drop_factor: float
    warmup_is_constant: bool
    blocks: Tuple[Block, ...]

    @property
    def constant_rate(self) -> bool:
        """Whether a factor of 1 or more switches the schedule off."""
        return self.drop_factor >= 1

    def learning_rate(self, update: int) -> float:
        """Linear warm-up, then polynomial decay of power 2 to 1e-4, or a drop by a factor after each of drop_steps.

        Source: the MLPerf Training v2.1 rules; MXNet's PolyScheduler
        and MultiFactorScheduler, whose "constant" warm-up starts at zero and stays there.
        """
        if self.constant_rate:
            return self.peak_lr
        if self.warmup_steps and update <= self.warmup_steps:
            return (
                0.0
                if self.warmup_is_constant and update < self.warmup_steps
                else self.peak_lr * update / self.warmup_steps
            )
        if not self.polynomial:
            return self.peak_lr * self.drop_factor ** sum(update > step for step in self.drop_steps)
        left = max(0.0, 1 - (update - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return END_LEARNING_RATE + (self.peak_lr - END_LEARNING_RATE) * left**POLYNOMIAL_POWER


def make_blocks(num_epochs: int, period: int, offset: int) -> Tuple[Block, ...]:
    """Cut the epochs into blocks: one ends after each 0-based epoch e with e % period == offset."""
    ends = [epoch + 1 for epoch in range(num_epochs) if epoch % period == offset]
    starts = [1] + [end + 1 for end in ends]
    blocks = [Block(start, end - start + 1, True) for start, end in zip(starts, ends)]
    if starts[-1] <= num_epochs:
        blocks.append(Block(starts[-1], num_epochs - starts[-1] + 1, False))
    return tuple(blocks)


def make_plan(config: Config, examples: int, ranks: int) -> Plan:
    """Plan a run over `examples` training images on `ranks` ranks. Raises UserError when a rank would get none."""
    shard = examples // ranks
    if shard == 0:
        raise UserError(
            f"{examples} training images are too few for {ranks} ranks: start fewer ranks"
        )
    # The reference's rounding: every rank takes as many steps as the smallest shard fills, the last one topped up.
    steps_per_epoch = -(-shard // config.batch_size)
    polynomial = "pow" in config.lr_step_epochs
    drops = (
        ()
        if polynomial
        else tuple(int(epoch) for epoch in config.lr_step_epochs.split(",") if epoch)
    )
    return Plan(
        steps_per_epoch=steps_per_epoch,
        num_epochs=config.num_epochs,
        warmup_steps=steps_per_epoch * config.warmup_epochs,
        total_steps=steps_per_epoch * config.num_epochs,
        peak_lr=config.lr,
        polynomial=polynomial,
        drop_steps=tuple(steps_per_epoch * epoch for epoch in drops),
        drop_factor=config.lr_factor,
        warmup_is_constant=not polynomial and config.warmup_strategy == "constant",
        # Without validation data, or when profiling, nothing is evaluated.
        blocks=(Block(1, config.num_epochs, False),)
        if config.synth_data or config.profile
        else make_blocks(config.num_epochs, config.eval_period, config.eval_offset),
    )
