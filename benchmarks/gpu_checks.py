# SPDX-License-Identifier: Apache-2.0
"""Run all that the GPU of this machine can prove, in the order of worth.

    benchmarks/gpu.sh [--out DIR] [--minutes 10] [--cuda DIR]

Each part is a command with its own time limit; its output goes to a file in DIR. The summary, also
printed, has the verdict of each part: passed, failed, out of time, or not run with the reason.
Exit status: 0 no part failed, 1 a part failed or ran out of time, 2 no part could run.

What a part needs is made beforehand, not in the GPU's time:

    pip install --target DIR --no-deps <cuDNN 8 and CUDA 11>    as the message of a missing DIR says
    python benchmarks/input.py --make-records DIR/records       photographs as RecordIO

No GPU has been used yet: only the parts' order, limits and verdicts have been tested.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Callable, List, Optional

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mxresnet.model.cudnn_bn import build  # noqa: E402

MIN_SECONDS = 10  # a part is not started with less time left
# Compute capabilities that the public GPU package of MXNet has machine code for.
MXNET_CAPABILITIES = (5.0, 8.6)


@dataclass(frozen=True)
class Gpu:
    """GPU 0, as nvidia-smi describes it."""

    name: str
    capability: float
    driver: str
    memory: str


@dataclass(frozen=True)
class Part:
    """A command that proves something.

    Attributes:
        name: name of its output file, and its name in the summary.
        proves: what it proves, for the summary.
        command: the command.
        limit_seconds: its time limit.
        obstacle: returns why it cannot run here, or None.
    """

    name: str
    proves: str
    command: List[str]
    limit_seconds: int
    obstacle: Callable[[], Optional[str]]


@dataclass(frozen=True)
class Verdict:
    """The result of a part."""

    part: Part
    result: str  # "passed", "failed (status N)", "out of time" or "not run: REASON"
    seconds: float = 0

    @property
    def is_bad(self) -> bool:
        return not self.result.startswith(("passed", "not run"))


def query_gpu() -> Optional[Gpu]:
    """Return GPU 0, or None when there is none."""
    program = shutil.which("nvidia-smi")
    if not program:
        return None
    fields = "name,compute_cap,driver_version,memory.total"
    command = [program, "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    values = [value.strip() for value in done.stdout.partition("\n")[0].split(",")]
    if done.returncode or len(values) != len(fields.split(",")):
        return None
    return Gpu(values[0], float(values[1]), values[2], values[3])


def is_importable(module: str) -> bool:
    """Return whether another process can import a module: an import may crash."""
    command = [sys.executable, "-c", f"import {module}"]
    return not subprocess.run(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ).returncode


def without(*modules: str) -> Callable[[], Optional[str]]:
    """Return an obstacle: modules that are not installed."""

    def missing() -> Optional[str]:
        names = [name for name in modules if not is_importable(name)]
        return f"{', '.join(names)} cannot be imported" if names else None

    return missing


def no_cuda_11(folder: pathlib.Path) -> Optional[str]:
    """Return the obstacle of the parts that need cuDNN 8: a folder that lacks it, or PyTorch."""
    if not (folder / "nvidia" / "cudnn").is_dir():
        wheels = " ".join(build.WHEELS)
        return f"{folder} lacks cuDNN 8: pip install --target {folder} --no-deps {wheels}"
    return without("torch")()


def no_mxnet_for(gpu: Gpu) -> Optional[str]:
    """Return the obstacle of the parts that use MXNet on the GPU."""
    if not MXNET_CAPABILITIES[0] <= gpu.capability <= MXNET_CAPABILITIES[1]:
        return f"public MXNet has no code for compute capability {gpu.capability}"
    code = "import mxnet; assert mxnet.context.num_gpus(), 0"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    return "no MXNet with CUDA is installed" if done.returncode else None


def make_parts(gpu: Gpu, cuda: pathlib.Path) -> List[Part]:
    """Return the parts, in the order in which they run."""
    kernels = [sys.executable, str(ROOT / "benchmarks" / "gpu_batch_norm.py")]
    with_cuda_11 = ["--cuda", str(cuda)]
    records = cuda / "records"
    return [
        Part(
            "kernels",
            "batch norms against float64 and PyTorch, cuDNN of PyTorch",
            kernels,
            300,
            without("torch", "numpy"),
        ),
        Part(
            "kernels-cudnn8",
            "the same with cuDNN 8, which MXNet uses",
            [*kernels, *with_cuda_11],
            240,
            lambda: no_cuda_11(cuda),
        ),
        Part(
            "memory",
            "no wrong access to memory (compute-sanitizer)",
            [*kernels, *with_cuda_11, "--sanitize"],
            150,
            lambda: no_cuda_11(cuda),
        ),
        Part(
            "input",
            "DALI's graph on the GPU against the CPU's: pixels and speed",
            [
                sys.executable,
                str(ROOT / "benchmarks" / "input.py"),
                *("--gpu", "--batch", "64", "--rounds", "5", "--records", str(records)),
            ],
            120,
            lambda: (
                without("nvidia.dali")()
                or (None if records.is_dir() else f"{records} is missing: see --help")
            ),
        ),
        Part(
            "operators",
            "batch norms inside MXNet against its own operators",
            [
                *(sys.executable, "-m", "mxresnet.model.cudnn_bn", "test"),
                *("--gpu", "0", "--batch-size", "256"),
            ],
            180,
            lambda: no_mxnet_for(gpu),
        ),
    ]


def run_part(part: Part, folder: pathlib.Path, seconds_left: float) -> Verdict:
    """Run a part within its limit and the time that is left; end all its processes."""
    obstacle = part.obstacle()
    if obstacle:
        return Verdict(part, f"not run: {obstacle}")
    if seconds_left < MIN_SECONDS:
        return Verdict(part, "not run: no time left")
    start = time.monotonic()
    with open(folder / f"{part.name}.txt", "w") as output:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(min(part.limit_seconds, seconds_left))
            result = "passed" if status == 0 else f"failed (status {status})"
        except subprocess.TimeoutExpired:
            result = "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of them have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Verdict(part, result, time.monotonic() - start)


def summarize(gpu: Gpu, verdicts: List[Verdict]) -> str:
    """Return the summary: what ran where, and the verdicts."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    lines = [
        f"{gpu.name} (compute capability {gpu.capability}, {gpu.memory}), driver {gpu.driver}",
        f"{datetime.date.today()}, Python {platform.python_version()}, "
        f"commit {commit or 'unknown'}",
    ]
    for verdict in verdicts:
        part = verdict.part
        lines.append(f"{part.name:15} {verdict.seconds:4.0f} s  {verdict.result}")
        lines.append(f"{'':23}{part.proves}")
    return "\n".join(lines)


def main() -> int:
    """Run the command line and return the exit status."""
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
    options = parser.parse_args()
    gpu = query_gpu()
    if gpu is None:
        print("gpu.sh: nvidia-smi lists no GPU: run this on a machine with one", file=sys.stderr)
        return 2
    folder = pathlib.Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    verdicts = []
    for part in make_parts(gpu, pathlib.Path(options.cuda).expanduser()):
        verdicts.append(run_part(part, folder, end - time.monotonic()))
        print(f"{part.name}: {verdicts[-1].result}", flush=True)
    summary = summarize(gpu, verdicts)
    (folder / "summary.txt").write_text(summary + "\n")
    print(f"\n{summary}\nOutputs: {folder}")
    if all(verdict.result.startswith("not run") for verdict in verdicts):
        return 2
    return int(any(verdict.is_bad for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
