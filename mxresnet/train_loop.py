# SPDX-License-Identifier: Apache-2.0
"""The order of a run: what happens when, and what the log says of it. Knows no framework.

Timing rules (MLPerf Training): whatever costs time and touches no data comes before run_start; the first read of the
data set comes after it, with every rank waiting on both sides.
"""

from __future__ import annotations

from typing import Any, Optional

from mxresnet.config import Config
from mxresnet.data.dataset import DataSet
from mxresnet.errors import UserError
from mxresnet.lr_schedule import Plan
from mxresnet.metrics import Score
from mxresnet.mllog import RunLog
from mxresnet.profiling import Timing
from mxresnet.progress import Progress


def run(
    config: Config,
    dataset: DataSet,
    plan: Plan,
    world: Any,
    log: RunLog,
    progress: Progress,
    trainer: Any,
    pipelines: Any,
    timing: Timing,
) -> Optional[bool]:
    """Train until the target accuracy or the last epoch; return whether the target was reached (None: not evaluated).

    trainer and pipelines are a Trainer and unopened DataLoaders (or fakes of them).
    """
    names = trainer.initialise()
    log.initialisation(config.seed, config.batch_size * config.bn_group, names)
    log.init_stop()
    log.hyperparameters(config, plan, world.size)
    trainer.warm_up()
    trainer.start_profile()
    world.barrier()
    with log.run() as outcome:
        world.barrier()
        progress.run_started()
        train, val = world.run_on_all_ranks(pipelines.open)
        val_images = dataset.val_examples
        log.samples(dataset.train_examples, val_images)
        reached = None
        timing.profiler(on=True)
        for block in plan.blocks:
            with log.block(block):
                for epoch in block.epochs:
                    with timing.span("epoch_time"):
                        _train_epoch(epoch, plan, log, progress, trainer, train, timing)
                if block.evaluated:
                    with timing.span("eval_time"):
                        score = _evaluate(epoch, val_images, world, log, trainer, val)
                    progress.evaluated(epoch, score, config)
                    reached = score.accuracy > config.accuracy_threshold
            if reached:
                break
        timing.profiler(on=False)
        # A profiled run has nothing to reach; the reference calls it a success.
        if reached or config.profile:
            outcome.succeed()
    trainer.stop_profile()
    log.times(world.gather(timing.report()))
    progress.run_done(reached, config.accuracy_threshold)
    return reached


def _train_epoch(
    epoch: int,
    plan: Plan,
    log: RunLog,
    progress: Progress,
    trainer: Any,
    train: Any,
    timing: Timing,
) -> None:
    """plan.steps_per_epoch steps. The next batch is fetched while the device works on the current one."""
    progress.epoch_started()
    with log.epoch(epoch):
        batches = train.batches(plan.steps_per_epoch)
        batch = next(batches)
        for step in range(1, plan.steps_per_epoch + 1):
            with timing.span("iter_time"):
                with timing.span("fwd_time"):
                    trainer.forward(batch)
                with timing.span("load_time"):
                    batch = next(batches, None)
                with timing.span("bwd_time"):
                    trainer.backward()
                with timing.span("opt_time"):
                    trainer.update()
            progress.step_done(epoch, step)
        trainer.wait()  # the rate below is that of work done, not of work queued
    log.throughput(
        progress.epoch_done(epoch, plan.learning_rate(epoch * plan.steps_per_epoch)), epoch
    )


def _evaluate(
    epoch: int, val_images: int, world: Any, log: RunLog, trainer: Any, val: Any
) -> Score:
    """Score the validation set. Raises UserError when not every image was counted exactly once."""
    with log.evaluation(epoch):
        score = trainer.evaluate(val.batches())
    if score.total != val_images:  # as every rank sees
        world.raise_if_any_failed(
            UserError(
                f"the evaluation after epoch {epoch} counted {score.total} images of {val_images}"
            )
        )
    log.accuracy(score.accuracy, epoch)
    return score
