# SPDX-License-Identifier: Apache-2.0
"""run_and_time.sh as a user starts it: results, statuses, signals."""

import os
import re
import signal
import subprocess
import time

import pytest
from support.commands import ROOT, mpirun, python

QUICK = ["--batch-size", "16", "--num-epochs", "2"]


def environment(records, tmp_path, **more):
    """A clean environment in which the CPU configuration uses the given records."""
    keep = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    return {
        **keep,
        "DATAROOT": str(records),
        "LOGDIR": str(tmp_path / "results"),
        "DGXSYSTEM": "CPU_digits",
        **more,
    }


def run_and_time(*flags, env, timeout=120):
    return subprocess.run(
        ["./run_and_time.sh", *flags],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=env,
        timeout=timeout,
    )


def test_a_run_to_its_target_ends_with_one_result_line_and_a_compliant_log(few, tmp_path):
    env = environment(few, tmp_path, SEED="3", DATESTAMP="today", TRIAL="7")
    started = time.time()
    done = run_and_time(*QUICK, "--accuracy-threshold", "0", env=env)
    assert done.returncode == 0, done.stderr
    match = re.fullmatch(
        r"RESULT,IMAGE_CLASSIFICATION,,(\d+),(\S+),(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [AP]M)\n",
        done.stdout,
    )
    assert match and int(match[1]) <= time.time() - started + 1
    assert "accuracy" in done.stderr and ":::MLLOG" not in done.stderr
    log = tmp_path / "results" / "today_7.log"
    text = log.read_text()
    assert '"status": "success"' in text and '"key": "seed", "value": 3' in text
    log.write_text(re.sub(r'("eval_accuracy", "value": )[\d.]+', r"\g<1>0.76", text))
    checked = python(
        "-m",
        "mlperf_logging.compliance_checker",
        "--usage",
        "training",
        "--ruleset",
        "2.1.0",
        "--log_output",
        os.devnull,
        log,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_missed_target_prints_no_result(few, tmp_path):
    done = run_and_time(*QUICK, "--lr", "1e-9", env=environment(few, tmp_path, DGXNGPU="1"))
    assert done.returncode == 3 and done.stdout == "" and "missed" in done.stderr


@pytest.mark.parametrize(
    "flags, more, words",
    [
        ([], {"DGXSYSTEM": "PDP11"}, ["DGXSYSTEM=PDP11", "CPU_digits"]),
        (["--lr", "zero"], {}, ["--lr", "zero"]),
        ([], {"SEED": "x"}, ["SEED", "x"]),
        (["--data-root", "/nowhere"], {}, ["/nowhere"]),
        ([], {"LOGDIR": "/proc/nothing"}, ["LOGDIR=/proc/nothing"]),
        (["--log-file", "x"], {}, ["--log-file", "LOGDIR"]),
        ([], {"LOG_FILE": "x"}, ["LOG_FILE=x", "LOGDIR"]),
        ([], {"DGXSYSTEM": "CPU_common"}, ["DGXSYSTEM=CPU_common"]),
        ([], {"DGXSYSTEM": "", "CUDA_VISIBLE_DEVICES": ""}, ["DATAROOT=", "no GPU", "DGXSYSTEM"]),
    ],
)
def test_a_mistake_is_said_once_and_has_status_2(few, tmp_path, flags, more, words):
    done = run_and_time(*flags, env=environment(few, tmp_path, **more))
    assert done.returncode == 2 and done.stdout == "", done.stderr
    said = [
        line
        for line in done.stderr.splitlines()
        if line.startswith(("mxresnet: ", "run_and_time.sh: "))
    ]
    assert len(said) == 1, done.stderr
    for word in words:
        assert word in said[0]


@pytest.mark.parametrize("ranks", ["0", "many"])
def test_a_number_of_ranks_that_is_none_is_refused(few, tmp_path, ranks):
    done = run_and_time(env=environment(few, tmp_path, DGXNGPU=ranks))
    assert (
        done.returncode == 2
        and f"DGXNGPU={ranks}" in done.stderr
        and done.stderr.count("\n") == 1
        and done.stdout == ""
    )


def test_the_built_in_data_does_not_take_the_place_of_other_data(few, tmp_path):
    """Records without manifests, as im2rec makes them."""
    records = tmp_path / "records"
    records.mkdir()
    for path in few.glob("*.rec"):
        (records / path.name).write_bytes(path.read_bytes())
    done = run_and_time(env=environment(records, tmp_path))
    assert done.returncode == 2 and f"DATAROOT={records}" in done.stderr and done.stdout == "", (
        done.stderr
    )
    assert sorted(path.name for path in records.iterdir()) == ["train.rec", "val.rec"]


@pytest.mark.parametrize(
    "flag, words", [("--help", "usage: python -m mxresnet"), ("--print-config", '"batch_size": 64')]
)
def test_what_is_only_shown_is_no_run(few, tmp_path, flag, words):
    done = run_and_time(flag, env=environment(few, tmp_path))
    assert done.returncode == 0 and done.stdout.count(words) == 1 and "RESULT" not in done.stdout, (
        done.stderr
    )
    assert not (tmp_path / "results").exists()


def test_a_run_with_nothing_to_reach_has_no_result(few, tmp_path):
    done = run_and_time(
        *QUICK,
        "--eval-period",
        "9",
        "--eval-offset",
        "8",
        env=environment(few, tmp_path, DGXNGPU="1"),
    )
    assert done.returncode == 0 and done.stdout == "" and "nothing was evaluated" in done.stderr, (
        done.stderr
    )


def test_inside_mpirun_it_is_one_rank_and_rank_0_prints_the_result(few, tmp_path):
    env = environment(few, tmp_path)
    done = mpirun(
        2,
        "-c",
        "import os, sys; os.execv('./run_and_time.sh', ['run_and_time.sh'] + sys.argv[1:])",
        *QUICK,
        "--accuracy-threshold",
        "0",
        env=env,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RESULT,IMAGE_CLASSIFICATION") == 1 and "2 x cpu" in done.stderr
    assert len(list((tmp_path / "results").iterdir())) == 1


def ranks_of(log_folder):
    return subprocess.run(
        ["pgrep", "-f", f"{log_folder}|-m mxresnet --num-epochs 77"], text=True, capture_output=True
    ).stdout.split()


@pytest.mark.parametrize("number, to_group", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_ends_every_rank(few, tmp_path, number, to_group):
    """SIGTERM as a scheduler sends it to the script, SIGINT as a terminal sends it to all."""
    process = subprocess.Popen(
        ["./run_and_time.sh", "--num-epochs", "77"],
        cwd=ROOT,
        text=True,
        env=environment(few, tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    for line in process.stderr:
        if "epoch" in line and "images/s" in line:
            break
    assert len(ranks_of(tmp_path)) >= 3
    (os.killpg if to_group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "stopped by SIG" in err and out == ""
    time.sleep(1)
    assert ranks_of(tmp_path) == []
