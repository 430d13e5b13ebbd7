# SPDX-License-Identifier: Apache-2.0
"""run_and_time.sh as a user starts it: results, exit statuses, messages, signals."""

import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import threading
import time

import pytest
from support.commands import ROOT, mpirun
from support.launchers import QUICK, QUICK_RESNET_50, environment, run_and_time
from support.mlperf_log import check_compliance, log_lines
from support.process_marks import marked_processes, new_mark, wait_until_gone

from mxresnet.launch import processes
from mxresnet.launch.builtin_data import make_builtin_data

PUBLISHED = json.loads((ROOT / "tests" / "golden" / "published_configs.json").read_text())


def test_a_run_to_its_target_ends_with_one_result_line_and_a_compliant_log(few, tmp_path):
    env = environment(few, tmp_path, SEED="3", DATESTAMP="today", TRIAL="7")
    started = time.time()
    done = run_and_time(*QUICK_RESNET_50, "--accuracy-threshold", "0", env=env)
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
    keys = [line["key"] for line in log_lines(text)]
    start = [key for key, _ in itertools.groupby(keys[: keys.index("epoch_start") + 1])]
    assert start == PUBLISHED["DGXA100"]["logs"][0]["start"].split()
    log.write_text(re.sub(r'("eval_accuracy", "value": )[\d.]+', r"\g<1>0.76", text))
    checked = check_compliance(log)
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
        ([], {"DATESTAMP": "/../../../dev/full"}, ["DATESTAMP=/../../../dev/full", "names"]),
        (["--log-file", "x"], {}, ["--log-file", "LOGDIR"]),
        ([], {"LOG_FILE": "x"}, ["LOG_FILE=x", "LOGDIR"]),
        ([], {"DGXSYSTEM": "CPU_common"}, ["DGXSYSTEM=CPU_common"]),
        ([], {"DGXSYSTEM": "", "CUDA_VISIBLE_DEVICES": ""}, ["DATAROOT=", "no GPU", "DGXSYSTEM"]),
    ],
)
def test_a_mistake_is_reported_once_and_has_status_2(few, tmp_path, flags, more, words):
    done = run_and_time(*flags, env=environment(few, tmp_path, **more))
    assert done.returncode == 2 and done.stdout == "", done.stderr
    lines = done.stderr.splitlines()
    causes = [line for line in lines if line.startswith(("mxresnet: ", "run_and_time.sh: "))]
    assert len(causes) == 1, done.stderr
    for word in words:
        assert word in causes[0]


def test_two_runs_that_start_together_create_the_data_once(tmp_path, monkeypatch):
    calls = []

    def run_to_end(command, **options):
        calls.append(command[2])
        time.sleep(0.5)  # the other run comes meanwhile
        if command[2] == "prepare.imagenet":
            for split in ("train", "val"):
                pathlib.Path(command[4], f"{split}.json").write_text("{}")
        return 0

    (tmp_path / "digits").mkdir()
    monkeypatch.setattr(processes, "run_to_end", run_to_end)
    environ = {"BUILTIN_DATA": "digits", "DATAROOT": str(tmp_path / "digits")}
    arguments = ("run_and_time.sh", "python", environ)
    threads = [threading.Thread(target=make_builtin_data, args=arguments) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["prepare.digits", "prepare.imagenet"]


def test_a_variable_that_the_configuration_overrides_is_reported(few, tmp_path):
    env = environment(few, tmp_path, LR="3", DGXNGPU="1")
    done = run_and_time("--print-config", env=env)
    note = (
        "note: LR=3 from the environment is overridden by config_CPU_digits.sh (LR=4): use --lr 3\n"
    )
    assert (done.returncode, done.stderr) == (0, note) and '"lr": 4.0' in done.stdout
    done = run_and_time("--print-config", "--lr", "3", env=env)
    assert (done.returncode, done.stderr) == (0, "") and '"lr": 3.0' in done.stdout
    # Every rank finds it, rank 0 reports it.
    rank = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    assert run_and_time("--print-config", env={**env, **rank}).stderr == ""


@pytest.mark.parametrize("ranks", ["0", "many"])
def test_an_impossible_number_of_ranks_is_refused(few, tmp_path, ranks):
    done = run_and_time(env=environment(few, tmp_path, DGXNGPU=ranks))
    assert (
        done.returncode == 2
        and f"DGXNGPU={ranks}" in done.stderr
        and done.stderr.count("\n") == 1
        and done.stdout == ""
    )


def test_built_in_data_is_not_written_over_other_data(few, tmp_path):
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
    assert [path.name for path in tmp_path.iterdir() if path != records] == ["results"]
    assert list((tmp_path / "results").iterdir()) == []


@pytest.mark.parametrize(
    "flag, words", [("--help", "usage: python -m mxresnet"), ("--print-config", '"batch_size": 64')]
)
def test_help_and_print_config_start_no_run(few, tmp_path, flag, words):
    done = run_and_time(flag, env=environment(few, tmp_path))
    assert done.returncode == 0 and done.stdout.count(words) == 1 and "RESULT" not in done.stdout, (
        done.stderr
    )
    assert not (tmp_path / "results").exists()


def test_a_run_without_an_evaluation_prints_no_result(few, tmp_path):
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


@pytest.mark.parametrize("number, to_group", [(signal.SIGTERM, False), (signal.SIGINT, True)])
def test_a_signal_ends_every_rank(few, tmp_path, number, to_group):
    """SIGTERM as a scheduler sends it to the script, SIGINT as a terminal sends it to all."""
    mark = new_mark()
    process = subprocess.Popen(
        ["./run_and_time.sh", "--num-epochs", "77", "--num-layers", "18"],
        cwd=ROOT,
        text=True,
        env={**environment(few, tmp_path), **mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    for line in process.stderr:
        if "epoch" in line and "images/s" in line:
            break
    assert len(marked_processes(mark)) >= 3
    (os.killpg if to_group else os.kill)(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and "stopped by SIG" in err and out == ""
    assert wait_until_gone(mark, 1) == {}


def test_a_profiled_run_starts_every_rank_under_nsys_and_logs_the_times_of_all(few, tmp_path):
    """With a command named nsys that runs the rank."""
    program = tmp_path / "bin" / "nsys"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/bash\necho "$@" >>{tmp_path}/calls\n'
        'while [[ $1 = profile || $1 = --* ]]; do shift; done\nexec "$@"\n'
    )
    program.chmod(0o755)
    more = {"NVTX_FLAG": "1", "TIME_TAGS": "1", "DATESTAMP": "today", "SYNTH_DATA": "0"}
    env = environment(few, tmp_path, **more)
    env["PATH"] = f"{program.parent}:{env['PATH']}"
    done = run_and_time(*QUICK, "--accuracy-threshold", "0", env=env)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^STARTING TIMING RUN AT \d{4}-\d\d-\d\d \d\d:.*M$", done.stderr, re.M)
    assert re.search(r"^ENDING TIMING RUN AT \d{4}-\d\d-\d\d \d\d:.*M$", done.stderr, re.M)
    calls = (tmp_path / "calls").read_text().splitlines()
    name = f"{tmp_path}/results/image_classification_mxnet_1x2x64_today"
    for rank, call in enumerate(sorted(calls)):
        assert f"--output={name}_{rank}_0.nsys-rep " in call and " -m mxresnet " in call
    assert len(calls) == 2
    lines = log_lines((tmp_path / "results" / "today_1.log").read_text())
    for key in ("epoch_time", "eval_time", "iter_time_count"):
        assert [line["value"]["r"] for line in lines if line["key"] == key] == [0, 1], key


@pytest.mark.parametrize("name", ["PROFILE_EXCEL", "API_LOGGING"])
def test_a_variable_of_the_reference_that_is_not_supported_is_refused(few, tmp_path, name):
    done = run_and_time(env=environment(few, tmp_path, **{name: "1"}))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"run_and_time.sh: {name}=1 is not supported: ")
    assert done.stderr.count("\n") == 1
