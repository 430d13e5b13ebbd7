# SPDX-License-Identifier: Apache-2.0
"""benchmarks/gpu.sh: verdicts, time limits, and machines without a GPU or its programs."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from support.commands import ROOT
from support.fake_programs import fake_program

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_checks  # noqa: E402
import gpu_parts  # noqa: E402
import gpu_query  # noqa: E402

from mxresnet.errors import UserError  # noqa: E402


def make_part(code, limit_seconds=30, obstacle=None):
    command = [sys.executable, "-c", code]
    return gpu_parts.Part("name", "proves", command, limit_seconds, lambda: obstacle)


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
    assert verdict.result == "out of time (2 s)" and verdict.is_bad and verdict.seconds < 20
    assert_ended(int((tmp_path / "name.txt").read_text()))


def assert_ended(child):
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
    assert "1 x NVIDIA Fake (compute capability 9.0, 81559 MiB), driver 535.1" in summary
    assert "not run: public MXNet has no code for compute capability 9.0" in summary
    assert f"not run: {tmp_path / 'none'} lacks cuDNN 8: pip install --target" in summary
    assert "Not proven:\n- batch norms" in summary and "- a whole training run" in summary
    if not gpu_parts.is_importable("torch"):
        assert done.returncode == 2 and "not run: torch cannot be imported" in summary


def test_a_part_that_ignores_sigterm_is_ended_with_descendants_in_other_sessions(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(gpu_checks, "GRACE_SECONDS", 1)
    code = """
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen(["sleep", "100"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(100)
"""
    verdict = gpu_checks.run_part(make_part(code, limit_seconds=2), tmp_path, 60)
    assert verdict.result == "out of time (2 s)" and verdict.seconds < 20
    assert_ended(int((tmp_path / "name.txt").read_text()))


def test_ctrl_c_leaves_no_process_and_the_summary_tells_what_ran(tmp_path):
    """The part that runs is stopped; the others do not start."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import gpu_checks, gpu_parts, gpu_query
gpu_checks.query_gpus = lambda environ: [gpu_query.Gpu("Fake", 8.0, "535", "81559 MiB")]
sleep = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(100)"]
gpu_checks.make_parts = lambda *_: [
    gpu_parts.Part(name, "proves", sleep, 60, lambda: None) for name in ("first", "second")
]
sys.argv = ["gpu.sh", "--out", {str(tmp_path)!r}]
sys.exit(gpu_checks.main())
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    output = tmp_path / "first.txt"
    for _ in range(300):
        if output.exists() and output.read_text().strip():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "gpu.sh: stopped by SIGINT\n")
    assert_ended(int(output.read_text()))
    summary = (tmp_path / "summary.txt").read_text()
    assert "stopped by SIGINT" in summary and not (tmp_path / "second.txt").exists()


def test_order_of_the_parts():
    """Where MXNet runs, its parts come first; elsewhere the kernels."""
    cuda = pathlib.Path("none")
    ampere = [part.name for part in gpu_parts.make_parts(8.0, 2, cuda)]
    assert ampere[:4] == ["operators", "float16-nhwc-own", "speed", "two-gpus"]
    hopper = gpu_parts.make_parts(9.0, 1, cuda)
    assert [part.name for part in hopper[:4]] == ["kernels", "kernels-cudnn8", "memory", "input"]
    assert {part.obstacle() for part in hopper[4:]} == {
        "public MXNet has no code for compute capability 9.0"
    }
    assert len({part.name for part in hopper}) == len(hopper) == len(ampere) == 12
    assert all(part.limit_seconds <= 300 for part in hopper)


@pytest.mark.parametrize(
    "script, message",
    [
        ("echo No devices were found; exit 6", "nvidia-smi lists no GPU: run this on a machine"),
        ("echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2", "nvidia-smi fails"),
        ("echo 'NVIDIA A100, [N/A], 535, 81920 MiB'", "nvidia-smi describes a GPU as 'NVIDIA A100"),
        ("sleep 100", "nvidia-smi has not ended in 1 s"),
    ],
)
def test_why_the_gpus_are_not_known(monkeypatch, tmp_path, script, message):
    monkeypatch.setattr(gpu_query, "TIMEOUT_SECONDS", 1)
    fake_program(tmp_path, "nvidia-smi", f"{script}\n")
    with pytest.raises(UserError, match=message):
        gpu_query.query_gpus({"PATH": f"{tmp_path}:{os.environ['PATH']}"})


def test_gpus_are_those_that_cuda_uses(tmp_path):
    fake_program(tmp_path, "nvidia-smi", 'echo "$*, 8.0, 535.1, 81920 MiB"\n')
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": "1"}
    with pytest.raises(UserError, match="-i 1, 8.0"):
        gpu_query.query_gpus(environ)
    with pytest.raises(UserError, match="CUDA_VISIBLE_DEVICES=-1 hides every GPU"):
        gpu_query.query_gpus({**environ, "CUDA_VISIBLE_DEVICES": "-1"})


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
