# SPDX-License-Identifier: Apache-2.0
"""The plan of a run: steps of an epoch, and which epochs end with an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Tuple

from mxresnet.config import Config
from mxresnet.errors import UserError
from mxresnet.lr_schedule import LearningRateSchedule, make_schedule


@dataclass(frozen=True)
class Block:
    """Consecutive epochs, counted from 1, up to an evaluation: what MLPerf's log calls a block.

    Attributes:
        first_epoch: first epoch.
        last_epoch: last epoch.
        epoch_count: number of epochs that the log announces. For a run that ends before its first
            evaluation, or has none, it is the number up to that evaluation, as in the reference.
        evaluated: whether it ends with an evaluation. Only the last block may have none.
    """

    first_epoch: int
    last_epoch: int
    epoch_count: int
    evaluated: bool

    @property
    def epochs(self) -> range:
        return range(self.first_epoch, self.last_epoch + 1)


@dataclass(frozen=True)
class Plan:
    """The steps, learning rates and blocks of a run. Every rank takes the same number of steps."""

    steps_per_epoch: int
    num_epochs: int
    schedule: LearningRateSchedule
    blocks: Tuple[Block, ...]

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.num_epochs

    def learning_rate(self, update: int) -> float:
        """Return the learning rate of an optimizer update. Updates count from 1."""
        return self.schedule.learning_rate(update)


def make_blocks(num_epochs: int, period: int, offset: int) -> Tuple[Block, ...]:
    """Divide the epochs into blocks.

    A block ends after each 0-based epoch e with e % period == offset.
    """
    ends = [epoch + 1 for epoch in range(num_epochs) if epoch % period == offset]
    starts = [1] + [end + 1 for end in ends]
    blocks = [Block(start, end, end - start + 1, True) for start, end in zip(starts, ends)]
    if not ends:
        blocks.append(Block(1, num_epochs, offset + 1, False))
    elif starts[-1] <= num_epochs:
        blocks.append(Block(starts[-1], num_epochs, num_epochs - starts[-1] + 1, False))
    return tuple(blocks)


def count_steps_per_epoch(num_images: int, num_ranks: int, batch_size: int) -> int:
    """Return the steps that every rank takes in an epoch, rounded as in the reference benchmark.

    It is the number of batches of the smallest shard. Images of the next epoch complete the last of
    these batches.

    Raises:
        UserError: a rank would get no image.
    """
    shard = num_images // num_ranks
    if shard == 0:
        raise UserError(
            f"{num_images} training images are too few for {num_ranks} ranks: start fewer ranks"
        )
    return -(-shard // batch_size)


def make_plan(config: Config, num_images: int, num_ranks: int) -> Plan:
    """Plan a run over num_images training images on num_ranks ranks.

    Raises:
        UserError: a rank would get no image.
    """
    steps_per_epoch = count_steps_per_epoch(num_images, num_ranks, config.batch_size)
    if config.synth_data or config.profile:  # no validation data, or a run that only measures
        blocks: Tuple[Block, ...] = (Block(1, config.num_epochs, config.eval_offset + 1, False),)
    else:
        blocks = make_blocks(config.num_epochs, config.eval_period, config.eval_offset)
    return Plan(steps_per_epoch, config.num_epochs, make_schedule(config, steps_per_epoch), blocks)
