# SPDX-License-Identifier: Apache-2.0
"""Kill training runs at random times, start them again, and compare their results byte for byte.

    python benchmarks/training_kills.py DATAROOT [KILLS] [RANKS]

DATAROOT is a small data set, such as the built-in digits. A kill is SIGKILL of one rank, of all
ranks or of run_and_time.sh; the same command then continues the run, until all kills are done.
The last checkpoint must have the bytes of that of a run that was not killed.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from typing import Dict, List, Optional

import numpy as np

from mxresnet.checkpoint import store
from mxresnet.process_guard import descendants

ROOT = pathlib.Path(__file__).resolve().parents[1]
FLAGS = [
    *("--num-layers", "18", "--image-shape", "4,8,8", "--resize", "8", "--batch-size", "8"),
    *("--num-examples", "96", "--num-epochs", "9", "--eval-period", "4", "--eval-offset", "0"),
    *("--accuracy-threshold", "1", "--checkpoint-minutes", "0.001", "--seed", "3"),
]
MAX_START_SECONDS = 120.0


def start(folder: pathlib.Path, data: str, ranks: int) -> subprocess.Popen:
    """Start ./run_and_time.sh with LOGDIR in a folder."""
    env = {
        **os.environ,
        "DGXSYSTEM": "CPU_digits",
        "DATAROOT": os.path.abspath(data),
        "DGXNGPU": str(ranks),
        "LOGDIR": str(folder),
        "OMP_NUM_THREADS": "1",
        "CHECKPOINTS": "1",
    }
    with open(folder / "output", "ab") as output:
        return subprocess.Popen(
            ["./run_and_time.sh", *FLAGS], cwd=ROOT, env=env, stdout=output, stderr=output
        )


def ranks_of(script: subprocess.Popen) -> List[int]:
    """Return the process ids of the ranks that a script has started."""
    found = []
    for pid in descendants(script.pid):
        try:
            words = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[1:3] == [b"-m", b"mxresnet"]:
            found.append(pid)
    return found


def kill(script: subprocess.Popen, choose: random.Random, log: pathlib.Path) -> Optional[str]:
    """Kill a run at a random time of its training.

    Returns:
        What was killed; None if the run ended before.
    """
    size = log.stat().st_size if log.exists() else 0
    end = time.monotonic() + MAX_START_SECONDS
    while script.poll() is None and time.monotonic() < end:
        if log.exists() and log.stat().st_size > size + 200:  # it trains
            break
        time.sleep(0.05)
    time.sleep(choose.uniform(0, 4))
    target = choose.choice(["rank", "all ranks", "script"])
    if script.poll() is not None:
        return None
    ranks = ranks_of(script)
    if target == "script" or not ranks:
        script.kill()
    for pid in {"rank": ranks[-1:], "all ranks": ranks}.get(target, []):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if script.wait() in (0, 3):
        return None
    return target


def result(folder: pathlib.Path) -> Dict[str, bytes]:
    """Return the arrays of the last checkpoint of the finished run in a LOGDIR."""
    # Runs that were killed before their first checkpoint may be there too.
    runs = (path.parent for path in folder.glob("*.checkpoints/run.json"))
    (run,) = (path for path in runs if store.read_run(str(path)).outcome)
    last = sorted(run.glob("epoch_*"))[-1]
    arrays = {"model": (last / "model-0000.params").read_bytes()}
    for path in sorted(last.glob("*.npz")):
        for name, array in np.load(path).items():
            # A position in the data can be described in two ways (data/dali_position.py).
            if name != "values" and not name.startswith("input:"):
                arrays[f"{path.name} {name}"] = array.tobytes()
    return arrays


def main(data: str, kills: int = 30, ranks: int = 2) -> int:
    """Return 0 if the results are the same."""
    choose = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        whole, killed = pathlib.Path(name, "whole"), pathlib.Path(name, "killed")
        for folder in (whole, killed):
            folder.mkdir()
        start(whole, data, ranks).wait()
        expected = result(whole)
        done = runs = 0
        while done < kills:
            folder = killed / str(runs)
            folder.mkdir()
            runs += 1
            while True:
                script = start(folder, data, ranks)
                logs = sorted(folder.glob("*.log"))
                if done < kills and choose.random() < 0.8:
                    log = logs[-1] if logs else folder / "output"
                    target = kill(script, choose, log)
                    if target:
                        done += 1
                        print(f"run {runs}, kill {done}: {target}", flush=True)
                if script.wait() in (0, 3):
                    break
            if result(folder) != expected:
                print(f"run {runs} differs: {(folder / 'output').read_text()}")
                return 1
    print(f"{done} kills of {runs} runs on {ranks} ranks: every result is byte-identical")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(int, sys.argv[2:])))
