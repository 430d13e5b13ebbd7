# SPDX-License-Identifier: Apache-2.0
"""Real runs of the real program on 1, 2 and 3 ranks under mpirun: the log, the counts, and every way to fail."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from support.commands import ROOT, SMALL, mpirun, python

SHORT = [*SMALL, "--num-epochs", "2"]


def log_lines(text):
    return [
        json.loads(line.split(":::MLLOG ", 1)[1])
        for line in text.splitlines()
        if ":::MLLOG " in line
    ]


def check_compliance(path):
    return python(
        "-m",
        "mlperf_logging.compliance_checker",
        "--usage",
        "training",
        "--ruleset",
        "2.1.0",
        "--log_output",
        os.devnull,
        path,
    )


@pytest.fixture(scope="module", params=[1, 2, 3])
def finished(request, few, tmp_path_factory):
    """A short run that misses its target: (ranks, process, its log file)."""
    log = tmp_path_factory.mktemp("run") / "run.log"
    ranks = request.param
    done = mpirun(
        ranks, "-m", "mxresnet", *SHORT, "--data-root", few, "--seed", "5", "--log-file", log
    )
    return ranks, done, log


def test_a_missed_target_has_its_own_status(finished):
    _, done, _ = finished
    assert done.returncode == 3, done.stderr
    assert "target accuracy 0.759 missed" in done.stderr and "Traceback" not in done.stderr


def test_every_rank_starts_and_rank_0_speaks(finished):
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


WEIGHTS_AFTER_STEPS = """
import hashlib, sys
from mxresnet.parallel import world
from mxresnet.train_loop import TrainLoop
from mxresnet import cli
run = TrainLoop.run
def run_and_show(self):
    reached = run(self)
    arguments, _ = self.trainer._module.get_params()
    digest = hashlib.sha256(b"".join(arguments[name].asnumpy().tobytes() for name in sorted(arguments))).hexdigest()
    sys.stderr.write("weights %s\\n" % digest)
    return reached
TrainLoop.run = run_and_show
sys.exit(cli.main())
"""


def test_all_ranks_hold_the_same_weights_after_training(few, tmp_path):
    script = tmp_path / "show.py"
    script.write_text(WEIGHTS_AFTER_STEPS)
    shown = []
    for seed in (1, 2):
        flags = [*SMALL, "--num-epochs", "2", "--data-root", few, "--seed", seed]
        done = mpirun(3, script, *flags, env={"PYTHONPATH": str(ROOT)})
        weights = re.findall(r"weights (\w+)", done.stderr)
        assert len(weights) == 3 and len(set(weights)) == 1, done.stderr
        shown.append(weights[0])
    assert shown[0] != shown[1]


def test_a_log_of_sgd_is_compliant_but_for_the_accuracy(few, tmp_path):
    log = tmp_path / "sgd.log"
    done = mpirun(
        1,
        "-m",
        "mxresnet",
        *SHORT,
        "--optimizer",
        "sgd",
        "--lr",
        "0.1",
        "--data-root",
        few,
        "--log-file",
        log,
    )
    assert done.returncode == 3, done.stderr
    assert check_compliance(log).returncode == 1
    log.write_text(re.sub(r'("eval_accuracy", "value": )[\d.]+', r"\g<1>0.76", log.read_text()))
    checked = check_compliance(log)
    assert checked.returncode == 0 and "closed_resnet_sgd.yaml" in checked.stdout + checked.stderr


class TestKindsOfRun:
    """Settings of the reference that change what a run does, from the command line, on two ranks."""

    def finished(self, few, *flags, status=3):
        done = mpirun(
            2,
            "-m",
            "mxresnet",
            *SMALL,
            "--num-layers",
            "18",
            "--num-epochs",
            "2",
            "--data-root",
            few,
            *flags,
        )
        assert done.returncode == status, done.stderr
        return done, log_lines(done.stdout)

    def test_what_has_no_effect_is_said_once_by_name(self, few):
        done, _ = self.finished(
            few,
            "--conv-algo",
            "1",
            "--force-tensor-core",
            "1",
            "--dali-cache-size",
            "100",
            "--network",
            "resnet-v1b-stats-fl",
        )
        notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
        assert [
            flag
            for flag in (
                "--conv-algo, --force-tensor-core",
                "--dali-cache-size",
                "resnet-v1b-stats-fl",
            )
            if sum(flag in n for n in notes) == 1
        ] == ["--conv-algo, --force-tensor-core", "--dali-cache-size", "resnet-v1b-stats-fl"]

    def test_imagerecorditer(self, few):
        done, lines = self.finished(
            few, "--use-dali", "0", "--input-batch-multiplier", "2", "--top-k", "3"
        )
        assert (
            done.stderr.count("ImageRecordIter, not DALI") == 1
            and "of 47), top-3 0." in done.stderr
        )

    def test_synthetic_data(self, few):
        done, lines = self.finished(
            few,
            "--synth-data",
            "1",
            "--num-examples",
            "64",
            "--num-classes",
            "10",
            "--data-root",
            "/nowhere",
            status=0,
        )
        assert "nothing was evaluated" in done.stderr and not [
            line for line in lines if line["key"] == "eval_start"
        ]
        assert lines[-1]["metadata"]["status"] == "aborted"

    def test_separate_validation_and_hidden_data(self, few):
        done, lines = self.finished(
            few, "--separ-val", "--lazy_init_sanity", "--input-batch-multiplier", "3"
        )
        assert "of 47)" in done.stderr

    def test_plain_sgd_with_a_step_schedule(self, few):
        done, lines = self.finished(
            few, "--optimizer", "sgd", "--lr", "0.1", "--lr-step-epochs", "1"
        )
        values = {line["key"]: line["value"] for line in lines}
        assert values["opt_name"] == "sgd" and values[
            "opt_learning_rate_decay_boundary_epochs"
        ] == [1]

    def test_time_tags_on_every_rank(self, few):
        done, lines = self.finished(few, "--time-tags", "1", "--num-examples", "32")
        times = [line["value"] for line in lines if line["key"] == "iter_time_count"]
        assert sorted(value["r"] for value in times) == [0, 1] and {
            value["t"] for value in times
        } == {4}
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


RANK_CHECKS = """
import sys
import numpy as np
from mxresnet.data import loader
from mxresnet.config import Config
from mxresnet.errors import UserError
loader.load_backend(Config())
from mxresnet.parallel.world import CollectiveUserError, join, rank_seeds, start_horovod
world = start_horovod(join())
import mxnet as mx
size = int(sys.argv[1])
assert world.size == size and 0 <= world.rank < size and world.local_rank == world.rank
assert world.sum([1, world.rank]) == [size, size * (size - 1) // 2]
assert world.broadcast("from %d" % world.rank) == "from 0"
for groups in (0, 1, 2, 7):
    arrays = [mx.nd.full((3, i + 1), world.rank * (i + 1)) for i in range(5)]
    world.average(arrays, "test%d" % groups, groups)
    for i, array in enumerate(arrays):
        np.testing.assert_allclose(array.asnumpy(), (size - 1) / 2 * (i + 1), rtol=1e-6)
parameters = {"a": mx.nd.full((2,), world.rank + 1), "b": mx.nd.full((3,), -world.rank)}
world.broadcast_parameters(parameters)
assert (parameters["a"].asnumpy() == 1).all() and (parameters["b"].asnumpy() == 0).all()
try:
    world.raise_if_any_failed(UserError("mine is bad") if world.rank == size - 1 else None)
except CollectiveUserError as error:
    assert str(error) == ("mine is bad" if size == 1 else "rank %d: mine is bad" % (size - 1)), error
else:
    raise AssertionError("nobody was told")
world.raise_if_any_failed(None)
mx.nd.waitall()
world.shutdown()
"""


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_collectives(ranks):
    done = mpirun(ranks, "-c", RANK_CHECKS, ranks)
    assert done.returncode == 0, done.stderr


def test_another_number_of_ranks_than_the_launcher_asked_for_is_refused_in_one_line(few):
    done = mpirun(
        2, "-m", "mxresnet", "--data-root", few, "--batch-size", "16", env={"EXPECTED_RANKS": "3"}
    )
    assert (
        done.returncode == 2
        and done.stderr.count("2 ranks were started and EXPECTED_RANKS is 3") == 1
    ), done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_mpi_does_not_bring_together_are_refused_and_the_first_says_so(few, rank):
    """What an mpirun of another kind than the library makes of a run: each rank is alone in its world."""
    env = {
        **os.environ,
        "OMPI_COMM_WORLD_RANK": str(rank),
        "EXPECTED_RANKS": "2",
        "OMPI_MCA_plm_rsh_agent": "/bin/false",
    }
    done = python("-m", "mxresnet", "--data-root", few, "--batch-size", "16", env=env)
    assert (
        done.returncode == 2
        and done.stderr.count("1 ranks were started and EXPECTED_RANKS is 2") == 1 - rank
    ), done.stderr


def test_rank_seeds_are_the_references():
    import numpy as np

    from mxresnet.parallel.world import rank_seeds

    np.random.seed(42)
    assert rank_seeds(42, 5) == list(np.random.randint(2**16, size=5))


def test_without_a_launcher_a_run_is_one_rank(few):
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("OMPI_", "PMIX_", "SLURM_"))
    }
    done = python("-m", "mxresnet", *SHORT, "--data-root", few, env=clean)
    assert done.returncode == 3 and "1 x cpu" in done.stderr, done.stderr


class TestMistakes:
    """One line that names the thing, status 2, no traceback, no hang; from one rank and from three."""

    def refused(self, ranks, *flags, env=None):
        done = mpirun(ranks, "-m", "mxresnet", *SMALL, *flags, env=env, timeout=60)
        said = [line for line in done.stderr.splitlines() if line.startswith("mxresnet: ")]
        assert done.returncode == 2 and len(said) == 1 and "Traceback" not in done.stderr, (
            done.stderr
        )
        return said[0]

    @pytest.mark.parametrize("ranks", [1, 3])
    def test_settings(self, ranks, digits):
        assert "--no-such-flag" in self.refused(ranks, "--no-such-flag", "1")
        assert "--batch-size" in self.refused(ranks, "--batch-size", "none")
        assert "WD" in self.refused(ranks, env={"WD": "-3"})

    @pytest.mark.parametrize("ranks", [1, 3])
    def test_data(self, ranks, copied, tmp_path):
        line = self.refused(ranks, "--data-root", tmp_path / "nowhere")
        assert f"{tmp_path}/nowhere/train.rec" in line and "prepare.imagenet" in line
        assert "--num-examples 5000" in self.refused(
            ranks, "--data-root", copied, "--num-examples", "5000"
        )
        (copied / "val.idx").unlink()
        assert f"{copied}/val.idx" in self.refused(ranks, "--data-root", copied)

    @pytest.mark.parametrize("ranks", [1, 3])
    def test_counts_that_the_records_do_not_have(self, ranks, copied):
        """Seen when the clock runs already, by every rank."""
        for path in copied.glob("*.json"):
            path.unlink()
        line = self.refused(
            ranks,
            "--data-root",
            copied,
            "--num-examples",
            "96",
            "--num-val-examples",
            "50",
            "--num-classes",
            "10",
        )
        assert "355 validation images" in line and "--num-val-examples" in line

    def test_a_top_k_of_more_than_there_are(self, digits):
        assert "--top-k 20 is above the 10 classes" in self.refused(
            2, "--data-root", digits, "--top-k", "20"
        )

    def test_too_many_ranks(self, digits):
        assert "2 training images are too few for 3 ranks" in self.refused(
            3, "--data-root", digits, "--num-examples", "2"
        )

    def test_a_gpu_that_is_not_there(self, digits):
        assert "float16 needs a GPU" in self.refused(2, "--data-root", digits, "--dtype", "float16")

    def test_a_log_that_cannot_be_written(self, digits, tmp_path):
        assert "no/such/folder" in self.refused(
            2, "--data-root", digits, "--log-file", tmp_path / "no/such/folder/log"
        )

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_an_image_that_is_damaged_ends_all_ranks_within_the_run(self, ranks, copied):
        """The last record of the validation set: only the last rank meets it, in its evaluation."""
        for path in copied.glob("*.json"):
            path.unlink()
        size = (copied / "val.rec").stat().st_size
        offset = max(
            int(line.split("\t")[1]) for line in (copied / "val.idx").read_text().splitlines()
        )
        with open(copied / "val.rec", "r+b") as file:
            file.seek(offset + 8 + 24)
            file.write(b"x" * (size - offset - 8 - 24))
        counts = ["--num-examples", "96", "--num-val-examples", "355", "--num-classes", "10"]
        done = mpirun(ranks, "-m", "mxresnet", *SMALL, *counts, "--data-root", copied, timeout=120)
        said = [line for line in done.stderr.splitlines() if line.startswith("mxresnet: ")]
        assert done.returncode == 2 and len(said) == 1 and "Traceback" not in done.stderr, (
            done.stderr
        )
        assert f"rank {ranks - 1}, validation data {copied}/val.rec" in said[0]
        if ranks == 1:
            assert log_lines(done.stdout)[-1]["metadata"]["status"] == "aborted"


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_rank_that_raises_in_a_step_names_itself_and_ends_the_job(ranks, few, tmp_path):
    """A monkey in one rank's trainer; the others wait for its gradients and must not do so for ever."""
    script = tmp_path / "crash.py"
    script.write_text(
        "import sys\n"
        "from mxresnet.data import loader; from mxresnet import cli, config\n"
        "loader.load_backend(config.Config())\n"
        "from mxresnet.trainer import Trainer\n"
        "original, count = Trainer.update, [0]\n"
        "def update(self):\n"
        "    count[0] += 1\n"
        "    if count[0] == 4 and self._world.rank == self._world.size - 1:\n"
        "        raise RuntimeError('bad luck')\n"
        "    original(self)\n"
        "Trainer.update = update\n"
        "sys.exit(cli.main())\n"
    )
    done = mpirun(
        ranks, script, *SMALL, "--data-root", few, env={"PYTHONPATH": str(ROOT)}, timeout=90
    )
    assert done.returncode == 1
    assert (
        done.stderr.count(f"mxresnet: rank {ranks - 1} failed:") == 1
        and "RuntimeError: bad luck" in done.stderr
    )


def test_a_killed_rank_ends_the_job(few):
    launcher = subprocess.Popen(
        [
            os.path.join(os.path.dirname(sys.executable), "mpirun"),
            "-np",
            "2",
            "--oversubscribe",
            "--bind-to",
            "none",
            "--allow-run-as-root",
            sys.executable,
            "-m",
            "mxresnet",
            *SMALL,
            "--num-epochs",
            "50",
            "--data-root",
            str(few),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMPI_MCA_plm_rsh_agent": "/bin/false", "OMP_NUM_THREADS": "1"},
    )
    try:
        for line in launcher.stdout:
            if '"run_start"' in line:
                break
        ranks = subprocess.run(
            ["pgrep", "-P", str(launcher.pid)], text=True, capture_output=True
        ).stdout.split()
        assert len(ranks) == 2
        os.kill(int(ranks[1]), signal.SIGKILL)
        assert launcher.wait(timeout=30) != 0
        time.sleep(1)
        assert not any(os.path.exists(f"/proc/{rank}/exe") for rank in ranks)
    finally:
        launcher.kill()
