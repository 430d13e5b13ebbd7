# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: --evaluate and --init-from of its checkpoints, and the same weights
again from the same seed.
"""

import os
import re

import numpy as np
import pytest
from support.commands import SMALL, mpirun
from support.mlperf_log import log_lines

from mxresnet.checkpoint import manifest, state, store
from mxresnet.checkpoint.fingerprint import sha256_of

FLAGS = [*SMALL, "--num-layers", "18", "--num-epochs", "2", "--batchnorm-mom", "0.3"]


def train(ranks, few, folder, *flags):
    """Train with checkpoints in a folder; return the finished process."""
    arguments = [
        *FLAGS,
        "--data-root",
        few,
        "--seed",
        "3",
        "--checkpoints",
        "1",
        "--checkpoint-dir",
        folder,
    ]
    done = mpirun(ranks, "-m", "mxresnet", *arguments, *flags)
    assert done.returncode == 3, done.stderr
    return done


def evaluate(ranks, *flags):
    """Evaluate; return the finished process."""
    return mpirun(ranks, "-m", "mxresnet", *flags)


@pytest.fixture(scope="module", params=[1, 2])
def trained(request, few, tmp_path_factory):
    """A run on 1 or 2 ranks: (number of ranks, folder of its checkpoints, accuracies)."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    done = train(request.param, few, folder)
    lines = log_lines(done.stdout)
    accuracies = {
        line["metadata"]["epoch_num"]: line["value"]
        for line in lines
        if line["key"] == "eval_accuracy"
    }
    return request.param, folder, accuracies


def test_an_evaluation_gives_the_accuracy_that_training_logged(trained):
    """On another number of ranks than the run had, and on a shell without its settings."""
    ranks, folder, accuracies = trained
    newest = store.list_checkpoints(str(folder))[0]
    expected = accuracies[manifest.read_manifest(newest).position.epoch]
    done = evaluate(3 - ranks, "--evaluate", newest)
    assert done.returncode == 0, done.stderr
    accuracy, correct = re.match(r"accuracy ([\d.]+) \((\d+) of 47\)", done.stdout).groups()
    assert int(correct) / 47 == expected and float(accuracy) == pytest.approx(expected, abs=1e-6)
    assert f"the run logged {expected:.6f}" in done.stdout
    assert done.stdout.count("\n") == 1 and ":::MLLOG" not in done.stdout + done.stderr


def test_the_same_seed_gives_the_same_weights_on_a_cpu(trained, few, tmp_path):
    ranks, folder, accuracies = trained
    train(ranks, few, tmp_path / "again")
    names = sorted(os.listdir(folder))
    assert names == sorted(os.listdir(tmp_path / "again")) and len(names) == 3
    for name in names:
        if os.path.isdir(folder / name):
            for file in (manifest.PARAMS_FILE, manifest.OPTIMIZER_FILE):
                assert sha256_of(str(folder / name / file)) == sha256_of(
                    str(tmp_path / "again" / name / file)
                )


def test_a_run_starts_from_the_weights_of_another(trained, few, tmp_path):
    ranks, folder, _ = trained
    if ranks == 1:
        pytest.skip("2 ranks are enough")
    flags = ["--init-from", folder, "--lr", "1e-9", "--num-epochs", "1", "--warmup-epochs", "0"]
    done = train(2, few, tmp_path / "new", *flags)
    best = store.find_model(str(folder))
    assert f"note: the initial weights are those of {best} (--init-from)\n" in done.stderr
    (new,) = store.list_checkpoints(str(tmp_path / "new"))
    before, after = (state.read_weights(path)[0] for path in (best, new))
    for name in before:
        np.testing.assert_allclose(after[name], before[name], atol=1e-3, err_msg=name)


def test_a_folder_without_a_checkpoint_is_one_line_for_all_ranks(few, tmp_path):
    done = mpirun(2, "-m", "mxresnet", *SMALL, "--data-root", few, "--init-from", tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("mxresnet: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr
    assert f"{tmp_path} has no checkpoint" in lines[0]
