# SPDX-License-Identifier: Apache-2.0
"""Run all that the GPUs of this machine can prove, in the order of worth.

    benchmarks/gpu.sh [--out DIR] [--minutes 10] [--cuda DIR] [--list]

Each part is a command with its own time limit; its output goes to a file in DIR. The summary, also
printed, has the verdict of each part: passed, failed, out of time, or not run with the reason, and
what has not been proven. No process of a part remains when its time is over or this program is
stopped.

Exit status: 0 no part failed, 1 a part failed or ran out of time, 2 no part could run, for example
because there is no GPU, 128 + n when stopped by signal n.

What a part needs is made beforehand, not in the GPU's time:

    ./setup_env.sh                       MXNet, on Volta to Ampere
    pip install torch                    for the parts with kernels
    pip install --target DIR --no-deps <cuDNN 8 and CUDA 11>   as the message of a missing DIR says
    python benchmarks/input.py --make-records DIR/records      photographs as RecordIO

No GPU has been used yet. The checks of training, ranks and speed have been run on a CPU.
"""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import platform
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from typing import List

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from gpu_parts import NEVER_PROVEN, Part, make_parts  # noqa: E402
from gpu_query import Gpu, query_gpus  # noqa: E402

from mxresnet.errors import UserError  # noqa: E402
from mxresnet.launch import processes  # noqa: E402

MIN_SECONDS = 10  # a part is not started with less time left
GRACE_SECONDS = 5  # for a part to end after SIGTERM
PACKAGES = ("mxnet", "mxnet-cu112", "horovod", "nvidia-dali-cuda110", "torch", "numpy")


@dataclass(frozen=True)
class Verdict:
    """The result of a part."""

    part: Part
    result: str  # "passed", "failed (status N)", "out of time" or "not run: REASON"
    seconds: float = 0
    last_line: str = ""

    @property
    def is_bad(self) -> bool:
        return not self.result.startswith(("passed", "not run"))


def run_part(part: Part, folder: pathlib.Path, seconds_left: float) -> Verdict:
    """Run a part within its limit and the time that is left; end all its processes."""
    start = time.monotonic()
    obstacle = part.obstacle()
    seconds_left -= time.monotonic() - start
    if obstacle:
        return Verdict(part, f"not run: {obstacle}")
    if seconds_left < MIN_SECONDS:
        return Verdict(part, "not run: no time left")
    limit = min(part.limit_seconds, seconds_left)
    expired = threading.Event()
    timers: List[threading.Timer] = []

    def start_timers(child: subprocess.Popen) -> None:
        def terminate() -> None:
            expired.set()
            child.terminate()

        # run_to_end kills what remains of the part when the guard of its processes is killed.
        timers.append(threading.Timer(limit, terminate))
        timers.append(threading.Timer(limit + GRACE_SECONDS, child.kill))
        for timer in timers:
            timer.daemon = True
            timer.start()

    path = folder / f"{part.name}.txt"
    start = time.monotonic()
    with open(path, "w") as output:
        try:
            status = processes.run_to_end(
                part.command, stdout=output, stderr=subprocess.STDOUT, on_start=start_timers
            )
            result = "passed" if status == 0 else f"failed (status {status})"
        except UserError as error:
            result = f"failed ({error})"
        finally:
            for timer in timers:
                timer.cancel()
    if processes.stopped_by():
        result = f"stopped by {processes.stopped_by()}"
    elif expired.is_set():
        result = f"out of time ({limit:.0f} s)"
    return Verdict(part, result, time.monotonic() - start, _last_line(path))


def _last_line(path: pathlib.Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else "no output"


def describe_machine(gpus: List[Gpu]) -> List[str]:
    """Return lines that describe the machine and the versions."""
    first = gpus[0]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ).stdout.strip()
    code = (
        "import importlib.metadata as m, sys\n"
        "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "print(', '.join(f'{n} {found[n]}' for n in sys.argv[1:] if n in found))"
    )
    packages = subprocess.run(
        [sys.executable, "-c", code, *PACKAGES], stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    return [
        f"{len(gpus)} x {first.name} (compute capability {first.capability}, {first.memory}), "
        f"driver {first.driver}",
        f"{datetime.date.today()}, Python {platform.python_version()}, "
        f"commit {commit or 'unknown'}",
        packages or "none of the packages that parts use is installed",
    ]


def summarize(machine: List[str], verdicts: List[Verdict]) -> str:
    """Return the summary: what ran where, the verdicts, and what has not been proven."""
    lines = list(machine)
    for verdict in verdicts:
        part = verdict.part
        lines.append(f"{part.name:20} {verdict.seconds:4.0f} s  {verdict.result}")
        lines.append(f"{'':28}{part.proves}")
        if verdict.last_line:
            lines.append(f"{'':28}> {verdict.last_line}")
    lines.append("Not proven:")
    lines += [f"- {v.part.proves} ({v.result})" for v in verdicts if v.result != "passed"]
    lines += [f"- {text}" for text in NEVER_PROVEN]
    return "\n".join(lines)


def run_parts(
    parts: List[Part], machine: List[str], folder: pathlib.Path, seconds: float
) -> List[Verdict]:
    """Run the parts and return their verdicts; the summary is up to date after each."""
    end = time.monotonic() + seconds
    verdicts: List[Verdict] = []
    for part in parts:
        verdicts.append(run_part(part, folder, end - time.monotonic()))
        print(f"{part.name}: {verdicts[-1].result}", flush=True)
        (folder / "summary.txt").write_text(summarize(machine, verdicts) + "\n")
        if processes.stopped_by():
            break
    return verdicts


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="gpu-checks", help="folder for the outputs")
    parser.add_argument("--minutes", type=float, default=10, help="time for all parts")
    parser.add_argument(
        "--cuda",
        default=os.environ.get("MXRESNET_CUDA11", "~/.cache/mxresnet/cuda11"),
        help="folder with cuDNN 8 and CUDA 11 from NVIDIA's wheels",
    )
    parser.add_argument("--list", action="store_true", help="print the parts, do not run them")
    return parser.parse_args()


def run_all(options: argparse.Namespace) -> int:
    """Run everything that the options select and return the exit status.

    Raises:
        UserError: There is no GPU.
    """
    gpus = query_gpus(os.environ)
    cuda = pathlib.Path(options.cuda).expanduser()
    parts = make_parts(gpus[0].capability, len(gpus), cuda)
    if options.list:
        for part in parts:
            print(f"{part.name:20} {part.limit_seconds:4} s at most  {part.proves}")
        return 0
    folder = pathlib.Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(gpus)
    verdicts = run_parts(parts, machine, folder, 60 * options.minutes)
    print(f"\n{summarize(machine, verdicts)}\nOutputs: {folder}")
    if all(verdict.result.startswith("not run") for verdict in verdicts):
        return 2
    return int(any(verdict.is_bad for verdict in verdicts))


def main() -> int:
    """Run the command line and return the exit status."""
    options = parse_arguments()
    processes.handle_stop_signals()
    try:
        status = run_all(options)
        processes.raise_if_stopped()
        return status
    except UserError as error:
        print(f"gpu.sh: {error}", file=sys.stderr)
        return 2
    except processes.StoppedBySignal as stopped:
        print(f"gpu.sh: {stopped}", file=sys.stderr)
        return stopped.status


if __name__ == "__main__":
    sys.exit(main())
