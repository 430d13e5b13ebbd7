# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.sh: verdicts, time limits, and machines without a GPU or its programs."""

import os
import subprocess
import sys
import time

import pytest
from support.commands import ROOT
from support.fake_programs import fake_program

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_checks  # noqa: E402


def make_part(code, limit_seconds=30, obstacle=None):
    command = [sys.executable, "-c", code]
    return gpu_checks.Part("name", "proves", command, limit_seconds, lambda: obstacle)


@pytest.mark.parametrize(
    "part, seconds_left, result",
    [
        (make_part("print('right')"), 60, "passed"),
        (make_part("raise SystemExit(3)"), 60, "failed (status 3)"),
        (make_part("", obstacle="no compiler"), 60, "not run: no compiler"),
        (make_part(""), 5, "not run: no time left"),
    ],
)
def test_verdict(tmp_path, part, seconds_left, result):
    assert gpu_checks.run_part(part, tmp_path, seconds_left).result == result


def test_a_part_out_of_time_is_ended_with_its_children(tmp_path):
    code = """
import subprocess, time
print(subprocess.Popen(["sleep", "100"]).pid, flush=True)
time.sleep(100)
"""
    part = make_part(code, limit_seconds=2)
    verdict = gpu_checks.run_part(part, tmp_path, 60)
    assert verdict.result == "out of time" and verdict.is_bad and verdict.seconds < 20
    child = int((tmp_path / "name.txt").read_text())
    for _ in range(100):
        if not os.path.exists(f"/proc/{child}") or "Z" in state_of(child):
            return
        time.sleep(0.1)
    raise AssertionError(f"process {child} is still there")


def state_of(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def run_on_fake_gpu(tmp_path, capability):
    programs = tmp_path / "programs"
    programs.mkdir()
    fake_program(programs, "nvidia-smi", f"echo 'NVIDIA Fake, {capability}, 535.1, 81559 MiB'\n")
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu_checks.py", "--cuda", tmp_path / "none"]
        + ["--out", tmp_path / "out"],
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
        text=True,
        capture_output=True,
    )


def test_what_could_not_run_is_in_the_summary(tmp_path):
    done = run_on_fake_gpu(tmp_path, "9.0")
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary in done.stdout and done.stderr == ""
    assert "NVIDIA Fake (compute capability 9.0, 81559 MiB), driver 535.1" in summary
    assert "not run: public MXNet has no code for compute capability 9.0" in summary
    assert f"not run: {tmp_path / 'none'} lacks cuDNN 8: pip install --target" in summary
    if not gpu_checks.is_importable("torch"):
        assert done.returncode == 2 and "not run: torch cannot be imported" in summary


def test_without_a_gpu_there_is_one_line(tmp_path):
    fake_program(tmp_path, "nvidia-smi", "echo No devices were found; exit 6\n")
    done = subprocess.run(
        [ROOT / "benchmarks" / "gpu.sh"],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        text=True,
        capture_output=True,
    )
    message = "gpu.sh: nvidia-smi lists no GPU: run this on a machine with one\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
