# SPDX-License-Identifier: Apache-2.0
"""Learning rates and run plans against published runs and MXNet's schedulers."""

import mxnet as mx
import pytest
from support.commands import python

from mxresnet.config import Config
from mxresnet.errors import UserError
from mxresnet.run_plan import make_blocks, make_plan

IMAGENET = 1281167
MLPERF = {"lr_step_epochs": "pow2", "warmup_epochs": 2, "num_epochs": 37}


@pytest.mark.parametrize(
    "ranks, batch, warmup, epochs, steps",
    [
        # Published v2.1 systems: steps per epoch, of warm-up, in total.
        (8, 408, 2, 37, (393, 786, 14541)),
        (4, 256, 2, 37, (1252, 2504, 46324)),
        (4, 204, 2, 37, (1571, 3142, 58127)),
        (4, 408, 2, 37, (786, 1572, 29082)),
        (2, 204, 2, 37, (3141, 6282, 116217)),
        (1024, 35, 17, 60, (36, 612, 2160)),
        (4216, 16, 31, 90, (19, 589, 1710)),
    ],
)
def test_steps(ranks, batch, warmup, epochs, steps):
    plan = make_plan(
        Config(batch_size=batch, lr_step_epochs="pow2", warmup_epochs=warmup, num_epochs=epochs),
        IMAGENET,
        ranks,
    )
    assert (plan.steps_per_epoch, plan.schedule.warmup_steps, plan.total_steps) == steps


@pytest.mark.parametrize(
    "ranks, batch, lr, first, after_35",
    [(8, 408, 10.5, 0.013359, 0.034385), (4, 256, 6.0, 0.002396, 0.019692)],
)
def test_learning_rates_of_published_runs(ranks, batch, lr, first, after_35):
    plan = make_plan(Config(batch_size=batch, lr=lr, **MLPERF), IMAGENET, ranks)
    assert plan.learning_rate(1) == pytest.approx(first, abs=5e-7)
    assert plan.learning_rate(35 * plan.steps_per_epoch) == pytest.approx(after_35, abs=5e-7)


@pytest.mark.parametrize("warmup", [0, 2])
def test_polynomial_schedule_equals_mxnets(warmup):
    plan = make_plan(
        Config(batch_size=4, lr=6.0, lr_step_epochs="pow2", warmup_epochs=warmup, num_epochs=9),
        100,
        3,
    )
    theirs = mx.lr_scheduler.PolyScheduler(
        plan.total_steps,
        base_lr=6.0,
        pwr=2,
        final_lr=1e-4,
        warmup_steps=plan.schedule.warmup_steps,
        warmup_begin_lr=0,
    )
    for update in range(1, plan.total_steps + 3):
        # MXNet's warm-up excludes the last step and ours includes it: both are at the peak there.
        assert plan.learning_rate(update) == pytest.approx(theirs(update), rel=1e-12)


def test_step_schedule_equals_mxnets():
    plan = make_plan(
        Config(batch_size=4, lr=0.5, lr_step_epochs="3,6", warmup_epochs=2, num_epochs=9), 100, 3
    )
    theirs = mx.lr_scheduler.MultiFactorScheduler(
        [3 * plan.steps_per_epoch, 6 * plan.steps_per_epoch],
        factor=0.1,
        base_lr=0.5,
        warmup_steps=plan.schedule.warmup_steps,
    )
    for update in range(1, plan.total_steps + 3):
        assert plan.learning_rate(update) == pytest.approx(theirs(update), rel=1e-12)


def test_a_rate_without_warm_up_begins_at_its_peak():
    """LARS reads the rate of update 0 in the first update."""
    plan = make_plan(
        Config(batch_size=4, lr=6.0, lr_step_epochs="pow2", warmup_epochs=0, num_epochs=9), 100, 3
    )
    assert plan.learning_rate(0) == pytest.approx(6.0) and plan.learning_rate(1) < 6.0


@pytest.mark.parametrize("epochs", ["pow2", "3,6"])
def test_a_factor_of_one_is_a_constant_rate(epochs):
    plan = make_plan(
        Config(
            batch_size=4,
            lr=6.0,
            lr_step_epochs=epochs,
            lr_factor=1.0,
            warmup_epochs=2,
            num_epochs=9,
        ),
        100,
        3,
    )
    assert {plan.learning_rate(update) for update in range(plan.total_steps + 3)} == {6.0}


def test_blocks_of_the_published_runs():
    blocks = [
        (b.first_epoch, b.epoch_count, b.evaluated) for b in make_blocks(37, period=4, offset=2)
    ]
    assert blocks == [(1, 3, True)] + [(first, 4, True) for first in range(4, 36, 4)] + [
        (36, 2, False)
    ]
    blocks = [(b.first_epoch, b.epoch_count) for b in make_blocks(60, period=4, offset=3)]
    assert blocks == [(first, 4) for first in range(1, 60, 4)]
    assert [(b.first_epoch, b.epoch_count) for b in make_blocks(48, period=4, offset=0)][:3] == [
        (1, 1),
        (2, 4),
        (6, 4),
    ]


@pytest.mark.parametrize("epochs", range(1, 12))
@pytest.mark.parametrize("period, offset", [(1, 0), (4, 0), (4, 3), (3, 1)])
def test_blocks_cover_every_epoch_once(epochs, period, offset):
    blocks = make_blocks(epochs, period, offset)
    assert [epoch for block in blocks for epoch in block.epochs] == list(range(1, epochs + 1))
    assert all(block.evaluated == ((block.epochs[-1] - 1) % period == offset) for block in blocks)


def test_more_ranks_than_images_is_refused():
    with pytest.raises(UserError, match="2 training images .* 3 ranks"):
        make_plan(Config(), 2, 3)


@pytest.mark.parametrize("factor, logged", [(1.0, 0), (0.1, 4)])
def test_a_constant_rate_is_not_logged_as_a_schedule(factor, logged):
    code = f"""
from mxresnet.config import Config
from mxresnet.mllog import RunLog
from mxresnet.run_plan import make_plan
config = Config(
    batch_size=4, lr_step_epochs="pow2", lr_factor={factor}, warmup_epochs=2, num_epochs=9)
RunLog(0).hyperparameters(config, make_plan(config, 100, 1), 1)
"""
    done = python("-c", code)
    assert (
        done.stdout.count("decay_poly_power") + done.stdout.count("end_learning_rate") == logged
    ), done.stdout + done.stderr
    assert "base_learning_rate" in done.stdout
