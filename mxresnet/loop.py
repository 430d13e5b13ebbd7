# SPDX-License-Identifier: Apache-2.0
"""The order of a run: what happens when, and what the log says of it. Knows no framework.

Timing rules (MLPerf Training): whatever costs time and touches no data comes before run_start; the first read of the
data set comes after it, with every rank waiting on both sides.
"""

from __future__ import annotations

from typing import Any

from mxresnet.config import Config, UserError
from mxresnet.dataset import DataSet
from mxresnet.mllog import RunLog
from mxresnet.metrics import Score
from mxresnet.progress import Progress
from mxresnet.schedule import Block, Plan


def run(
        config: Config, dataset: DataSet, plan: Plan, world: Any, log: RunLog, progress: Progress, trainer: Any,
        pipelines: Any) -> bool:
    """Train until the target accuracy or the last epoch; return whether the target was reached.

    trainer and pipelines are a Trainer and unopened Pipelines (or fakes of them).
    """
    names = trainer.initialise()
    log.initialisation(config.seed, config.batch_size, names)
    log.init_stop()
    log.hyperparameters(config, plan, world.size)
    trainer.warm_up()
    world.barrier()
    with log.run() as outcome:
        world.barrier()
        progress.run_started()
        train, val = pipelines.open()
        log.samples(dataset.train_examples, dataset.val_examples)
        reached = False
        for block in plan.blocks:
            with log.block(block):
                _train_block(block, plan, log, progress, trainer, train)
                if block.evaluated:
                    score = _evaluate(block.epochs[-1], dataset, log, trainer, val)
                    progress.evaluated(block.epochs[-1], score, config.accuracy_threshold)
                    reached = score.accuracy > config.accuracy_threshold
            if reached:
                outcome.succeed()
                break
    progress.run_done(reached, config.accuracy_threshold)
    return reached


def _train_block(block: Block, plan: Plan, log: RunLog, progress: Progress, trainer: Any, train: Any) -> None:
    for epoch in block.epochs:
        progress.epoch_started()
        with log.epoch(epoch):
            _train_epoch(epoch, plan, progress, trainer, train)
        speed = progress.epoch_done(epoch, plan.learning_rate(epoch * plan.steps_per_epoch))
        log.throughput(speed, epoch)


def _train_epoch(epoch: int, plan: Plan, progress: Progress, trainer: Any, train: Any) -> None:
    """plan.steps_per_epoch steps. The next batch is fetched while the device works on the current one."""
    batches = train.batches(plan.steps_per_epoch)
    batch = next(batches)
    for step in range(1, plan.steps_per_epoch + 1):
        trainer.start_step(batch)
        batch = next(batches, None)
        trainer.finish_step()
        progress.step_done(epoch, step)


def _evaluate(epoch: int, dataset: DataSet, log: RunLog, trainer: Any, val: Any) -> Score:
    """Score the validation set. Raises UserError when not every image was counted exactly once."""
    trainer.wait()
    with log.evaluation(epoch):
        score = trainer.evaluate(val.batches())
    if score.total != dataset.val_examples:
        raise UserError(f"the evaluation after epoch {epoch} counted {score.total} images of {dataset.val_examples}")
    log.accuracy(score.accuracy, epoch)
    return score
