# SPDX-License-Identifier: Apache-2.0
"""Complete runs on 1, 2 and 3 ranks under mpirun: the log, the counts, the kinds of run."""

import os
import re

import pytest
from support.commands import ROOT, SMALL, mpirun, python
from support.mlperf_log import check_compliance, log_lines

SHORT = [*SMALL, "--num-epochs", "2"]
# The checker of logs knows the names of its parameters.
RESNET_50 = ["--num-layers", "50"]


@pytest.fixture(scope="module", params=[1, 2, 3])
def finished(request, few, tmp_path_factory):
    """A short run that misses its target: (number of ranks, finished process, log file)."""
    log = tmp_path_factory.mktemp("run") / "run.log"
    ranks = request.param
    flags = [*SHORT, *RESNET_50, "--data-root", few, "--seed", "5", "--log-file", log]
    done = mpirun(ranks, "-m", "mxresnet", *flags)
    return ranks, done, log


def test_a_missed_target_has_its_own_status(finished):
    _, done, _ = finished
    assert done.returncode == 3, done.stderr
    assert "target accuracy 0.759 missed" in done.stderr and "Traceback" not in done.stderr


def test_every_rank_starts_and_rank_0_writes_the_log(finished):
    ranks, done, log = finished
    keys = [line["key"] for line in log_lines(done.stdout)]
    assert keys.count("init_start") == ranks
    for key in ("submission_org", "seed", "init_stop", "run_start", "run_stop"):
        assert keys.count(key) == 1
    assert done.stderr.count("epoch 1 of at most 2") == 1
    in_file = [line["key"] for line in log_lines(log.read_text())]
    assert in_file.count("init_start") == 1 and set(in_file) == set(keys)
    assert "epoch 1 of at most 2" in log.read_text()


def test_every_evaluation_counts_every_image_once(finished):
    _, done, _ = finished
    counts = re.findall(r"after epoch (\d+): accuracy [\d.]+ \((\d+) of (\d+)\)", done.stderr)
    assert [(epoch, total) for epoch, _, total in counts] == [("1", "47"), ("2", "47")]
    accuracies = [
        line["value"] for line in log_lines(done.stdout) if line["key"] == "eval_accuracy"
    ]
    assert accuracies == [int(correct) / 47 for _, correct, _ in counts]


def test_loss_and_step_times_of_each_epoch_are_logged(finished):
    """The first loss is that of a network that knows nothing: about log 10."""
    ranks, done, _ = finished
    lines = log_lines(done.stdout)
    losses = [line["value"] for line in lines if line["key"] == "train_loss"]
    assert len(losses) == 2 and 1 < losses[0] < 10
    assert re.findall(r", loss ([\d.]+),", done.stderr) == [f"{loss:.4f}" for loss in losses]
    times = [line for line in lines if line["key"] == "step_times"]
    assert [line["metadata"]["epoch_num"] for line in times] == [1, 2]
    for line in times:
        value = line["value"]
        assert list(value) == ["p50_ms", "p99_ms", "max_ms", "input_wait_seconds"]
        assert {len(rows) for rows in value.values()} == {ranks}
        for p50, p99, longest, wait in zip(*value.values()):
            assert 0 < p50 <= p99 <= longest and wait > 0


def test_steps_of_a_shard(finished):
    ranks, done, _ = finished
    assert f"{-(-(100 // ranks) // 16)} steps an epoch" in done.stderr


def test_only_the_accuracy_keeps_a_short_run_from_being_compliant(finished, tmp_path):
    _, _, log = finished
    done = check_compliance(log)
    assert done.returncode == 1 and "eval_accuracy" in done.stdout + done.stderr
    good = tmp_path / "good.log"
    good.write_text(re.sub(r'("eval_accuracy", "value": )[\d.]+', r"\g<1>0.76", log.read_text()))
    done = check_compliance(good)
    assert done.returncode == 0 and "SUCCESS" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "damage",
    [
        (r'.*"run_stop".*\n', ""),
        (r'.*"tensor": "fc1_bias".*\n', ""),
        (r"_bnsc_", "_bn_sc_"),
        (r'"lars_epsilon", "value": 0.0', '"lars_epsilon", "value": 1'),
        (r'"init_stop"', '"init_stopped"'),
        (r'.*"global_batch_size".*\n', ""),
    ],
)
def test_the_official_checker_refuses_a_damaged_log(finished, tmp_path, damage):
    _, _, log = finished
    good = re.sub(r'("eval_accuracy", "value": )[\d.]+', r"\g<1>0.76", log.read_text())
    damaged = re.sub(*damage, good)
    assert damaged != good
    path = tmp_path / "damaged.log"
    path.write_text(damaged)
    assert check_compliance(path).returncode == 1


WEIGHTS = """
import hashlib, sys
from mxresnet.parallel import world
from mxresnet.train_loop import TrainLoop
from mxresnet import cli
run, prepare = TrainLoop.run, TrainLoop._prepare
def print_digest(self, moment):
    parameters, _ = self.trainer._module.get_params()
    content = b"".join(parameters[name].asnumpy().tobytes() for name in sorted(parameters))
    digest = hashlib.sha256(content).hexdigest()
    sys.stderr.write(f"weights {moment} {digest}\\n")
def prepare_and_print_digest(self):
    prepare(self)
    print_digest(self, "before")
def run_and_print_digest(self):
    reached = run(self)
    print_digest(self, "after")
    return reached
TrainLoop._prepare, TrainLoop.run = prepare_and_print_digest, run_and_print_digest
sys.exit(cli.main())
"""


def test_all_ranks_hold_the_same_weights_after_training(few, tmp_path):
    script = tmp_path / "print_digests.py"
    script.write_text(WEIGHTS)
    flags = [*SHORT, "--data-root", few]
    done = mpirun(3, script, *flags, env={"PYTHONPATH": str(ROOT)})
    before, after = (re.findall(rf"weights {m} (\w+)", done.stderr) for m in ("before", "after"))
    assert len(before) == len(after) == 3, done.stderr
    assert len(set(after)) == 1 and not set(before) & set(after), done.stderr


def test_a_log_of_sgd_is_compliant_but_for_the_accuracy(few, tmp_path):
    log = tmp_path / "sgd.log"
    flags = [*SHORT, *RESNET_50, "--data-root", few, "--log-file", log]
    flags += ["--optimizer", "sgd", "--lr", "0.1"]
    done = mpirun(1, "-m", "mxresnet", *flags)
    assert done.returncode == 3, done.stderr
    assert check_compliance(log).returncode == 1
    log.write_text(re.sub(r'("eval_accuracy", "value": )[\d.]+', r"\g<1>0.76", log.read_text()))
    checked = check_compliance(log)
    assert checked.returncode == 0 and "closed_resnet_sgd.yaml" in checked.stdout + checked.stderr


class TestKindsOfRun:
    """Settings of the reference that change what a run does, on two ranks."""

    def finished(self, few, *flags, status=3):
        done = mpirun(2, "-m", "mxresnet", *SHORT, "--data-root", few, *flags)
        assert done.returncode == status, done.stderr
        return done, log_lines(done.stdout)

    def test_settings_without_effect_are_reported_once_by_name(self, few):
        """And plain SGD with a step schedule has an effect."""
        flags = ["--conv-algo", "1", "--force-tensor-core", "1", "--dali-cache-size", "100"]
        flags += ["--network", "resnet-v1b-stats-fl"]
        schedule = ["--optimizer", "sgd", "--lr", "0.1", "--lr-step-epochs", "1"]
        done, lines = self.finished(few, *flags, *schedule)
        notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
        for name in (
            "--conv-algo, --force-tensor-core",
            "--dali-cache-size",
            "resnet-v1b-stats-fl",
        ):
            assert sum(name in note for note in notes) == 1, name
        values = {line["key"]: line["value"] for line in lines}
        assert values["opt_name"] == "sgd"
        assert values["opt_learning_rate_decay_boundary_epochs"] == [1]

    def test_imagerecorditer(self, few):
        flags = ["--use-dali", "0", "--input-batch-multiplier", "2", "--top-k", "3"]
        done, _ = self.finished(few, *flags)
        assert done.stderr.count("ImageRecordIter, not DALI") == 1
        assert "of 47), top-3 0." in done.stderr

    def test_synthetic_data(self, few):
        sizes = ["--num-examples", "64", "--num-classes", "10"]
        flags = ["--synth-data", "1", *sizes, "--data-root", "/nowhere"]
        done, lines = self.finished(few, *flags, status=0)
        assert "nothing was evaluated" in done.stderr
        assert not [line for line in lines if line["key"] == "eval_start"]
        assert lines[-1]["metadata"]["status"] == "aborted"

    def test_separate_validation_and_hidden_data_with_time_tags_on_every_rank(self, few):
        flags = ["--separ-val", "--lazy_init_sanity", "--input-batch-multiplier", "3"]
        done, lines = self.finished(few, *flags, "--time-tags", "1", "--num-examples", "32")
        assert "of 47)" in done.stderr
        times = [line["value"] for line in lines if line["key"] == "iter_time_count"]
        # One line for each rank and each of 4 epochs, of 1 step.
        assert sorted(value["r"] for value in times) == [0] * 4 + [1] * 4
        assert {value["t"] for value in times} == {1}
        assert "epoch 4 of at most 4" in done.stderr

    def test_profiles(self, few, tmp_path):
        name = f"{tmp_path.name}.json"
        done, lines = self.finished(
            few, "--profile", "1", "--profile-worker-suffix", name, status=0
        )
        files = sorted(ROOT.glob(f"rank*_{name}"))
        try:
            assert lines[-1]["metadata"]["status"] == "success" and len(files) == 2
            assert '"traceEvents"' in files[0].read_text() and "Convolution" in files[0].read_text()
        finally:
            for file in files:
                file.unlink()


def test_without_a_launcher_a_run_is_one_rank(few):
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMPI_", "PMIX_", "SLURM_"))
    }
    done = python("-m", "mxresnet", *SHORT, "--data-root", few, env=clean)
    assert done.returncode == 3 and "1 x cpu" in done.stderr, done.stderr
