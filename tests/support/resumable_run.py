# SPDX-License-Identifier: Apache-2.0
"""Short runs that are killed at a step and started again, and what they end with.

As a program: a rank that runs python -m mxresnet and kills itself. Variables: KILL_STEP, the step
of this process after which it does; KILL_RANK, the rank that does (empty: all); KILL_SIGNAL; and
KILL_WAIT, the seconds to wait for a first checkpoint before.
"""

import os
import pathlib
import re
import signal
import sys
import time

import numpy as np

if __name__ != "__main__":
    from support.commands import mpirun
    from support.mlperf_log import log_lines

FLAGS = [
    *("--num-layers", "18", "--image-shape", "3,8,8", "--resize", "8", "--rand-mirror", "1"),
    *("--batch-size", "8", "--num-epochs", "3", "--eval-period", "2", "--eval-offset", "0"),
    *("--num-examples", "64"),
    *("--lr-step-epochs", "pow2", "--warmup-epochs", "1", "--dali-threads", "1"),
    *("--disp-batches", "0", "--lr", "0.5", "--checkpoint-minutes", "0.001"),
    *("--watchdog-limit", "20", "--watchdog-period", "1"),
]


class Run:
    """A run in a folder: its log is run.log, its checkpoints are in run.checkpoints."""

    def __init__(self, folder, records, *flags, ranks=1):
        self.folder, self.ranks = pathlib.Path(folder), ranks
        self.folder.mkdir(exist_ok=True)
        self.log = self.folder / "run.log"
        self.checkpoints = self.folder / "run.checkpoints"
        self.flags = [*FLAGS, "--data-root", records, "--log-file", self.log, *flags]

    def start(self, *flags, kill_step=0, kill_rank="", kill_signal=signal.SIGKILL, **env):
        """Run to the end, or until a rank kills itself; return the finished process."""
        variables = {
            "CHECKPOINTS": "1",
            "KILL_STEP": str(kill_step),
            "KILL_RANK": str(kill_rank),
            "KILL_SIGNAL": str(int(kill_signal)),
            "KILL_WAIT": "20",
            **env,
        }
        program = [__file__] if kill_step else ["-m", "mxresnet"]
        return mpirun(self.ranks, *program, *self.flags, *flags, env=variables, timeout=120)

    def killed(self, *flags, **options):
        """Run until a rank kills itself."""
        done = self.start(*flags, **options)
        assert done.returncode not in (0, 1, 2, 3), done.stderr
        return done

    def finish(self, *flags, **env):
        """Run to the end of the last epoch, below the target."""
        done = self.start(*flags, **env)
        assert done.returncode == 3, done.stderr
        return done

    def result(self):
        """Return what the run ended with: weights, momenta, statistics, accuracies."""
        last = sorted(self.checkpoints.glob("epoch_*"))[-1]
        arrays = {}
        for path in sorted(last.glob("*.npz")):
            for name, array in np.load(path).items():
                # A position in the data can be described in two ways (data/dali_position.py).
                if name != "values" and not name.startswith("input:"):
                    arrays[f"{path.name}:{name}"] = array.tobytes()
        arrays["model"] = (last / "model-0000.params").read_bytes()
        lines = log_lines(self.log.read_text())
        scores = [
            (x["metadata"]["epoch_num"], x["value"]) for x in lines if x["key"] == "eval_accuracy"
        ]
        losses = [x["value"] for x in lines if x["key"] == "train_loss"]
        return last.name, arrays, scores, losses

    def resumed(self):
        """Return the checkpoints that the run was resumed from, as the log has them."""
        return re.findall(r'"key": "resumed".*?"checkpoint": "(\w+)"', self.log.read_text())


def assert_same_result(run, other):
    (name, arrays, scores, losses), expected = run.result(), other.result()
    assert (name, scores, losses) == (expected[0], expected[2], expected[3])
    different = [key for key in expected[1] if arrays.get(key) != expected[1][key]]
    assert arrays.keys() == expected[1].keys() and not different, different


def wait_for_checkpoint(log_path, seconds):
    """Wait until a checkpoint of the run is complete, or the time is over."""
    folder, end = pathlib.Path(log_path).with_suffix(".checkpoints"), time.monotonic() + seconds
    while not list(folder.glob("epoch_*")) and time.monotonic() < end:
        time.sleep(0.01)


def main():
    """Run a rank of mxresnet that kills itself after a step."""
    from mxresnet import cli, config_parser
    from mxresnet.data import loader
    from mxresnet.errors import exit_now

    loader.load_backend(config_parser.parse(sys.argv[1:], os.environ)[0])
    from mxresnet.trainer import Trainer

    step, rank = int(os.environ["KILL_STEP"]), os.environ["KILL_RANK"]
    update, done = Trainer.update, [-1]  # the first update is the warm-up's

    def update_or_die(self):
        update(self)
        done[0] += 1
        if done[0] == step and rank in ("", str(self._world.rank)):
            self.wait()
            wait_for_checkpoint(self._config.log_file, float(os.environ["KILL_WAIT"]))
            os.kill(os.getpid(), int(os.environ["KILL_SIGNAL"]))

    Trainer.update = update_or_die
    exit_now(cli.main())


if __name__ == "__main__":
    main()
