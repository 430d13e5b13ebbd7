# SPDX-License-Identifier: Apache-2.0
"""How a run on several ranks ends when its input is wrong or a rank fails."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support.commands import ROOT, SMALL, mpirun
from support.mlperf_log import log_lines


class TestUserErrors:
    """One line that names the thing, status 2, no traceback, no hang; on one rank and on three."""

    def refused(self, ranks, *flags, env=None):
        done = mpirun(ranks, "-m", "mxresnet", *SMALL, *flags, env=env, timeout=60)
        lines = [line for line in done.stderr.splitlines() if line.startswith("mxresnet: ")]
        assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, (
            done.stderr
        )
        return lines[0]

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
        """Every rank finds it after run_start."""
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

    def test_a_top_k_above_the_number_of_classes(self, digits):
        assert "--top-k 20 is above the 10 classes" in self.refused(
            2, "--data-root", digits, "--top-k", "20"
        )

    def test_too_many_ranks(self, digits):
        assert "2 training images are too few for 3 ranks" in self.refused(
            3, "--data-root", digits, "--num-examples", "2"
        )

    def test_a_gpu_that_is_not_there(self, digits):
        assert "float16 needs a GPU" in self.refused(2, "--data-root", digits, "--dtype", "float16")

    def test_training_that_diverges_is_reported_once(self, few):
        flags = ["--num-layers", "18", "--warmup-epochs", "0", "--optimizer", "sgd", "--lr", "1e5"]
        line = self.refused(2, "--data-root", few, *flags)
        assert "training diverged; lower --lr" in line

    def test_a_log_that_cannot_be_written(self, digits, tmp_path):
        assert "no/such/folder" in self.refused(
            2, "--data-root", digits, "--log-file", tmp_path / "no/such/folder/log"
        )
        os.mkfifo(tmp_path / "pipe")
        line = self.refused(2, "--data-root", digits, "--log-file", tmp_path / "pipe")
        assert "is a named pipe" in line

    @pytest.mark.parametrize("ranks", [1, 3])
    def test_an_image_that_is_damaged_ends_all_ranks_within_the_run(self, ranks, copied):
        """Only the last rank reads the last record of the validation set, in its evaluation."""
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
        lines = [line for line in done.stderr.splitlines() if line.startswith("mxresnet: ")]
        assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, (
            done.stderr
        )
        assert f"rank {ranks - 1}, validation data {copied}/val.rec" in lines[0]
        if ranks == 1:
            assert log_lines(done.stdout)[-1]["metadata"]["status"] == "aborted"


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_rank_that_raises_in_a_step_names_itself_and_ends_the_job(ranks, few, tmp_path):
    """The fault: the last rank's trainer raises. The others must not wait for its gradients."""
    script = tmp_path / "fault.py"
    script.write_text(
        "import sys\n"
        "from mxresnet.data import loader\n"
        "from mxresnet import cli, config\n"
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
