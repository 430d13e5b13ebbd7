# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and started again ends with the same bytes as one that was not."""

import random
import re
import signal

import pytest
from support.mlperf_log import check_compliance, log_lines
from support.resumable_run import Run, assert_same_result

SEED = ["--seed", "3"]
LARS = ["--optimizer", "sgdwfastlars", "--lr", "4", "--label-smoothing", "0.1"]
# Not fewer pixels: stage 4 would have one, where gradients in bfloat16 varied from run to run.
BFLOAT16 = ["--dtype", "bfloat16", "--image-shape", "4,32,32", "--resize", "32"]
SYNTHETIC = ["--synth-data", "1", "--num-classes", "10", "--num-val-examples", "8"]
VARIANTS = {
    "lars": LARS,
    "bfloat16": [*LARS, *BFLOAT16],
    "image_record_iter": ["--use-dali", "0"],
    "synthetic": SYNTHETIC,
    "multiplier": [*LARS, "--input-batch-multiplier", "3"],
    "roi": ["--dali-roi-decode"],
    "no momentum": ["--mom", "0"],
}


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """Return a function that makes an uninterrupted run of some flags and ranks, once each."""
    runs = {}

    def make(*flags, ranks=1, status=3):
        if (flags, ranks) not in runs:
            run = Run(tmp_path_factory.mktemp("whole"), few, *SEED, *flags, ranks=ranks)
            assert run.start().returncode == status
            runs[flags, ranks] = run
        return runs[flags, ranks]

    return make


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_once(few, tmp_path, whole, ranks):
    run = Run(tmp_path, few, *SEED, *LARS, ranks=ranks)
    run.killed(kill_step=9 // ranks)
    run.finish()
    assert len(run.resumed()) == 1
    assert_same_result(run, whole(*LARS, ranks=ranks))
    check_log(run)


def check_log(run):
    """Check that the log reads as that of one run."""
    keys = [line["key"] for line in log_lines(run.log.read_text())]
    for key in ("submission_org", "init_start", "init_stop", "seed", "run_start", "run_stop"):
        assert keys.count(key) == 1, key
    for key in ("epoch_start", "epoch_stop", "throughput", "train_loss"):
        assert keys.count(key) == 3, key
    assert keys.count("eval_accuracy") == 2 and "checkpoint" in keys
    good = run.folder / "good.log"
    text = re.sub(r'("eval_accuracy", "value": )[\d.]+', r"\g<1>0.76", run.log.read_text())
    good.write_text(text)
    done = check_compliance(good)
    # A network of 18 layers lacks tensors of the benchmark's.
    errors = [line for line in (done.stdout + done.stderr).splitlines() if "CHECK" in line]
    assert all("tensor" in error or "s[" in error for error in errors), errors


def test_sigterm(few, tmp_path, whole):
    """The run writes a checkpoint after the step, and ends with the status of SIGTERM."""
    run = Run(tmp_path, few, *SEED, *LARS)
    done = run.start("--checkpoint-minutes", "0", kill_step=5, kill_signal=signal.SIGTERM)
    assert done.returncode == 143 and "stopped by SIGTERM" in done.stderr, done.stderr
    assert "run_stop" not in [line["key"] for line in log_lines(run.log.read_text())]
    names = [path.name for path in run.checkpoints.glob("epoch_*")]
    assert names and set(names) <= {f"epoch_001_step_00000{step}" for step in (5, 6, 7)}
    run.finish()
    assert run.resumed() == names
    assert_same_result(run, whole(*LARS))


@pytest.mark.slow
def test_a_run_with_another_setting_is_refused(few, tmp_path):
    run = Run(tmp_path, few, *SEED)
    run.killed(kill_step=3)
    done = run.start("--wd", "0.5")
    assert done.returncode == 2 and "--wd 0.5, there 0.0001" in done.stderr, done.stderr
    assert done.stderr.count("mxresnet: ") == 1 and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("kills", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_random_steps(few, tmp_path, whole, variant, ranks, kills):
    flags, status = VARIANTS[variant], 0 if variant == "synthetic" else 3
    choose = random.Random(f"{variant}{ranks}{kills}")
    run = Run(tmp_path, few, *SEED, *flags, ranks=ranks)
    for _ in range(kills):
        kill_rank = choose.choice(["", ranks - 1])
        done = run.start(kill_step=choose.randint(4, 6), kill_rank=kill_rank)
        if done.returncode == status:
            break  # few steps were left
    else:
        assert run.start().returncode == status
    assert run.resumed()
    assert_same_result(run, whole(*flags, ranks=ranks, status=status))
