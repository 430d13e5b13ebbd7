# SPDX-License-Identifier: Apache-2.0
"""The checks of gpu.sh that train, run on a CPU: right training passes, wrong training fails."""

import os
import subprocess
import sys

import mxnet as mx
import pytest
from support.commands import ROOT, python
from support.cudnn_bn import load_cpu_library

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_speed  # noqa: E402
import gpu_training  # noqa: E402
import training_problem  # noqa: E402
from gpu_query import Gpu  # noqa: E402

STEPS = 12


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    variables = {}
    gpu_training.set_environment(variables)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("name", ["float32-nchw-public", "bfloat16-nchw-public"])
def test_right_training_agrees_with_float64(name, capsys):
    assert gpu_training.check(name, mx.cpu(), STEPS), capsys.readouterr().out


def test_training_and_evaluation_with_own_batch_norms_agree_with_float64(capsys):
    load_cpu_library()
    assert gpu_training.check("float32-nchw-own", mx.cpu(), 3), capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.9}, {"mom": 0.8}, {"label_smoothing": 0.05}, {"optimizer": "sgd"}]
)
def test_wrong_training_is_noticed(wrong, capsys):
    variant = gpu_training.VARIANTS["float32-nchw-public"]
    with gpu_training.narrow_network():
        trainer = gpu_training.start_training(variant, mx.cpu(), **wrong)
        batches = gpu_training.make_batches(trainer._config, mx.cpu())
        losses = gpu_training.train(trainer, batches, STEPS)
    assert not gpu_training.compare_losses(losses, "float32"), capsys.readouterr().out


def test_a_wrong_evaluation_is_noticed(capsys):
    """Statistics that differ between the trained network and the one that evaluates."""
    variant = gpu_training.VARIANTS["float32-nchw-public"]
    with gpu_training.narrow_network():
        trainer = gpu_training.start_training(variant, mx.cpu())
        batches = gpu_training.make_batches(trainer._config, mx.cpu())
        parameters, statistics = trainer._module.get_params()
        assert gpu_training.compare_evaluation(trainer, batches, "float16")
        statistics["stage2_unit1_bn1_moving_var"][:] = 1.1
        trainer._module.get_params = lambda: (parameters, statistics)
        assert not gpu_training.compare_evaluation(trainer, batches, "float16")
    assert "probabilities differ" in capsys.readouterr().out


def test_losses_that_are_not_numbers_are_wrong(capsys):
    assert not gpu_training.compare_losses([float("nan")] * 3, "float16")


def test_float16_weights_in_both_layouts_start_as_in_float32():
    """A convolution's weight is stored as (O, H, W, I) in NHWC; all values are exact in float16."""
    shapes = {"conv0_weight": (16, 4, 7, 7), "bn0_gamma": (16,), "fc1_weight": (10, 512)}
    weights = training_problem.initial_weights(shapes)
    channel_last = gpu_training._with_axes(weights["conv0_weight"], gpu_training._FROM_CPU)
    assert channel_last.shape == (16, 7, 7, 4)
    back = gpu_training._with_axes(channel_last, gpu_training._TO_CPU)
    assert (back == weights["conv0_weight"]).all()
    for value in weights.values():
        assert (value.astype("float16") == value).all()


def test_a_variant_for_a_gpu_is_refused_elsewhere_in_one_line():
    done = python("benchmarks/gpu_training.py", "float16-nhwc-own")
    assert done.returncode == 2 and done.stderr.endswith("gpu_training.py: MXNet finds no GPU\n")


def test_the_configuration_fits_the_gpu():
    for name, memory, system in [
        ("NVIDIA A100-SXM4-80GB", "81920 MiB", "DGXA100"),
        ("NVIDIA A100-SXM4-40GB", "40960 MiB", "A100-40GB_8gpu"),
        ("NVIDIA A30", "24576 MiB", "A30_1x2x204"),
        ("Tesla T4", "15360 MiB", "T4_4gpu"),
        ("NVIDIA A40", "46068 MiB", "A100-40GB_4gpu"),
        ("NVIDIA A2", "15356 MiB", "T4_4gpu"),
    ]:
        assert gpu_speed.choose_system(Gpu(name, 8.0, "535", memory)) == system


def test_speeds_are_compared_with_published_ones_and_between_ranks(capsys):
    assert gpu_speed.report("NVIDIA A100-SXM4-80GB", {1: 1700.0, 2: 3200.0})
    text = capsys.readouterr().out
    assert "1700 images/s with 1 x NVIDIA A100-SXM4-80GB; 0.50 of the published 3395" in text
    assert "3200 with 2: 0.94 of 2 times one" in text
    assert not gpu_speed.report("NVIDIA A100-SXM4-80GB", {1: 170.0})
    assert not gpu_speed.report("Tesla T4", {1: 400.0, 2: 500.0})
    assert "no result of MLPerf Training v2.1 is for such a GPU" in capsys.readouterr().out


SPEED_FLAGS = "--image-shape 3,32,32 --resize 32 --batch-size 4 --num-classes 10 --num-layers 18"


def test_speed_is_measured_with_the_program_itself(capfd):
    speed = gpu_speed.measure(1, "CPU", 2, [*SPEED_FLAGS.split(), "--dtype", "float32"])
    assert speed > 0


def test_ranks_average_exactly_and_keep_the_same_weights():
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu_ranks.py", "--device", "cpu", "--steps", "2"],
        cwd=ROOT,
        # As in a shell that Slurm has started on a machine with GPUs: it is not a rank.
        env={**os.environ, "OMP_NUM_THREADS": "1", "SLURM_PROCID": "0"},
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks (cpu, float32-nchw-public): averages and weights after 2 steps" in done.stdout
