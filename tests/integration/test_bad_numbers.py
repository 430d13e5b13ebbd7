# SPDX-License-Identifier: Apache-2.0
"""A run ends at the step in which a gradient is not finite, on all ranks and with one line."""

import pytest
from support.commands import ROOT, SMALL, mpirun
from support.mlperf_log import log_lines

# Rank 1 gets a bad image in step 2 of epoch 2, or finds a bad gradient alone.
FAULTY_RANK = """
import sys
from mxresnet import cli, trainer
from mxresnet.gradient_check import GradientCheck
from mxresnet.parallel import world
from mxresnet.parallel.launched import launched_rank
fault, calls = sys.argv.pop(1), []
forward, find = trainer.Trainer.forward, GradientCheck.find
def faulty_forward(self, batch):
    calls.append(1)
    if len(calls) == {call} and launched_rank() == 1:
        batch.image[:] = float("nan")
    forward(self, batch)
def faulty_find(self, max_pending):
    calls.append(1)
    return ("fc1_bias", 0) if len(calls) == 3 and launched_rank() == 1 else None
if fault == "image":
    trainer.Trainer.forward = faulty_forward
else:
    GradientCheck.find = faulty_find
    world._SAME_ERROR_SECONDS = 1
sys.exit(cli.main())
"""
STEPS = 4  # of an epoch of 100 images on 2 ranks with batches of 16
WARM_UP_CALLS = 1


@pytest.fixture
def run_faulty(few, tmp_path):
    def run(fault):
        script = tmp_path / "faulty_rank.py"
        script.write_text(FAULTY_RANK.format(call=WARM_UP_CALLS + STEPS + 2))
        flags = [*SMALL, "--num-layers", "18", "--data-root", few]
        done = mpirun(2, script, fault, *flags, env={"PYTHONPATH": str(ROOT)}, timeout=200)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("mxresnet: ")]
        return done, lines

    return run


def test_a_bad_number_on_one_rank_ends_all_ranks_with_step_and_parameter(run_faulty):
    done, lines = run_faulty("image")
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(
        "mxresnet: epoch 2, step 2: the gradient of conv0_weight is not finite"
    )
    events = log_lines(done.stdout)
    assert events[-1]["metadata"]["status"] == "aborted"
    keys = [line["key"] for line in events]
    assert keys.count("eval_accuracy") == keys.count("train_loss") == 1


def test_a_rank_that_finds_it_alone_ends_the_job(run_faulty):
    """Its device is faulty: the others, which go on, would wait for it in the next exchange."""
    _, lines = run_faulty("alone")
    assert lines[0].startswith("mxresnet: rank 1 alone: epoch 1, step 3: the gradient of fc1_bias")
