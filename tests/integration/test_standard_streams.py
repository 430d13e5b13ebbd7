# SPDX-License-Identifier: Apache-2.0
"""`python -m mxresnet` with streams that are closed, full or without a reader, and SIGINT."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from support.commands import ROOT, SMALL, mpirun
from support.mlperf_log import log_lines

SHOW = "--print-config"
# A run of one epoch of tiny images; the last flag of each name counts.
TINY = [
    *(*SMALL, "--image-shape", "3,8,8", "--resize", "8", "--num-layers", "18"),
    *("--num-epochs", "1", "--warmup-epochs", "0", "--accuracy-threshold", "0.0001", "--seed", "1"),
]


def run_line(flags, redirections, **options):
    """Run `python -m mxresnet` with the flags in a shell; return the finished process."""
    command = shlex.join([sys.executable, "-m", "mxresnet", *map(str, flags)])
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} {redirections}"],
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=120,
        **options,
    )


@pytest.mark.parametrize(
    "flag,redirections,status,reason",
    [
        (SHOW, ">&-", 0, ""),
        (SHOW, "<&- >&- 2>&-", 0, ""),
        (SHOW, "| true", 0, ""),
        (SHOW, ">/dev/full", 2, "standard output cannot be written (No space left on device)"),
        (SHOW, ">/dev/full 2>&-", 2, ""),
        ("--help", ">&-", 0, ""),
        ("--help", "| true", 0, ""),
        ("--help", ">/dev/full", 2, "standard output cannot be written (No space left on device)"),
        ("--lr=x", "2>&-", 2, ""),
        ("--lr=x", "<&- >&-", 2, "--lr"),
        ("--lr=x", "<&- >&- 2>&-", 2, ""),
        ("--lr=x", "2>/dev/full", 2, ""),
        ("--lr=x", "2>&1 >/dev/null | true", 2, ""),
    ],
)
def test_a_command_that_does_not_train(flag, redirections, status, reason):
    done = run_line([flag], redirections)
    assert done.returncode == status, done.stderr
    assert reason in done.stderr and len(done.stderr.splitlines()) == bool(reason)


@pytest.mark.parametrize("redirections", ["<&- >&- 2>&-", "2>&1 >/dev/null | true"])
def test_training_with_a_lost_stream_that_is_not_the_log(few, redirections):
    done = run_line([*TINY, "--data-root", few], redirections)
    assert done.returncode == 0 and done.stderr == "", done.stderr


def test_training_with_a_log_file_and_without_output(few, tmp_path):
    """PYTHONWARNINGS: packages warn, which must not end the run."""
    log = tmp_path / "log"
    environ = {**os.environ, "PYTHONWARNINGS": "error"}
    done = run_line([*TINY, "--data-root", few, "--log-file", log], ">/dev/full", env=environ)
    assert done.returncode == 0 and "trained to accuracy" in done.stderr, done.stderr
    assert "Logging error" not in done.stderr and "Traceback" not in done.stderr
    assert log_lines(log.read_text())[-1]["key"] == "run_stop"


@pytest.mark.parametrize(
    "redirections,reason", [(">/dev/full", "No space left"), ("| head -n 12", "Broken pipe")]
)
def test_training_whose_log_is_lost(few, redirections, reason):
    """`head` ends during the run, after the header."""
    done = run_line([*TINY, "--data-root", few], redirections)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("mxresnet: ")]
    assert len(lines) == 1 and reason in lines[0] and "--log-file" in lines[0], done.stderr
    assert "Logging error" not in done.stderr


# Executed by each rank before the program.
LOSE = """
import os, runpy, sys
rank = os.environ["OMPI_COMM_WORLD_RANK"]
if rank in sys.argv.pop(1).split(","):
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
runpy.run_module("mxresnet", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("ranks_without_output", ["0", "1", "0,1"])
def test_two_ranks_whose_log_is_lost(few, ranks_without_output):
    done = mpirun(2, "-c", LOSE, ranks_without_output, *TINY, "--data-root", few, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("mxresnet: ") == 1 and "the MLPerf log" in done.stderr


def test_two_ranks_with_a_log_file_and_without_output(few, tmp_path):
    flags = [*TINY, "--data-root", few, "--log-file", tmp_path / "log"]
    done = mpirun(2, "-c", LOSE, "0,1", *flags, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("last_key", ["init_start", "run_start"])
def test_an_interrupt_ends_the_run_in_one_line(few, last_key):
    flags = [*TINY, "--num-epochs", "500", "--eval-period", "500", "--data-root", few]
    command = [sys.executable, "-m", "mxresnet", *map(str, flags)]
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        for line in process.stdout:
            if f'"{last_key}"' in line:
                break
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert err.splitlines()[-1] == "mxresnet: interrupted" and err.count("mxresnet: ") == 1


def test_an_interrupt_while_the_program_is_imported_shows_no_traceback(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'mxresnet.environment':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt)\n"
    )
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-m", "mxresnet", SHOW], cwd=ROOT, capture_output=True, env=environ
    )
    assert done.returncode == -signal.SIGINT and done.stderr == b"", done.stderr


def test_a_file_that_is_cut_off_during_the_run_is_reported_in_one_line(copied):
    """DALI has the records mapped into memory."""
    flags = [*TINY, "--num-epochs", "500", "--eval-period", "500", "--data-root", copied]
    with subprocess.Popen(
        [sys.executable, "-m", "mxresnet", *map(str, flags), "--disp-batches", "1"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    ) as process:
        for line in process.stderr:
            if "images/s" in line:
                break
        os.truncate(copied / "train.rec", 4096)
        *_, last = process.stderr
        process.wait(timeout=60)
    assert process.returncode == 2 and last.startswith("mxresnet: SIGBUS: a file was cut off")


def test_an_interrupt_ends_a_process_that_waits_for_a_library():
    script = (
        "import ctypes; from mxresnet.standard_streams import prepare_streams; prepare_streams();"
        "mutex = (ctypes.c_char * 64)(); lock = ctypes.CDLL(None).pthread_mutex_lock;"
        "lock(mutex); print('ready', flush=True); lock(mutex)"  # no signal ends the second wait
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        try:
            _, err = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130 and err == b"mxresnet: interrupted\n"
