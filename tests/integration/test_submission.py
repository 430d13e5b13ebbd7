# SPDX-License-Identifier: Apache-2.0
"""Submissions written from logs of the real RunLog, and the verdicts of MLPerf's own tools."""

import json
import os
import re
import subprocess
import sys

import pytest
from support.commands import ROOT, python

from mxresnet.model.resnet import parameter_names
from mxresnet.results import submission

WRITE = """
import json, sys, time
from mlperf_logging.mllog import mllog as clock
from mxresnet import mllog
from mxresnet.config_parser import parse
from mxresnet.run_plan import make_plan
path, seed, accuracy, *flags = sys.argv[1:]
config, _ = parse([*flags, "--seed", seed, "--log-file", path], {})
now = [1_700_000_000_000]
clock._current_time_ms = lambda: now[0]
plan = make_plan(config, 1281167, 4)
mllog.open_file(path)
mllog.header(config)
mllog.init_start()
log = mllog.RunLog(0)
log.initialization(config.seed, config.batch_size, json.load(sys.stdin))
now[0] += 20_000
log.init_stop()
log.hyperparameters(config, plan, 4)
with log.run() as outcome:
    log.samples(1281167, 50000)
    for block in plan.blocks:
        with log.block(block):
            for epoch in block.epochs:
                with log.epoch(epoch):
                    now[0] += 105_000
                log.throughput(12100.0, epoch)
            if block.evaluated:
                with log.evaluation(epoch):
                    now[0] += 3_000
                value = float(accuracy) if epoch == 35 else 0.2 + 0.015 * epoch
                log.accuracy(value, epoch)
        if epoch == 35 and float(accuracy) > config.accuracy_threshold:
            outcome.succeed()
            break
"""
FLAGS = [
    "--optimizer",
    "sgdwfastlars",
    "--batch-size",
    "408",
    "--lr",
    "7.5",
    "--wd",
    "5e-5",
    "--lr-step-epochs",
    "pow2",
    "--num-epochs",
    "37",
    "--warmup-epochs",
    "2",
    "--label-smoothing",
    "0.1",
    "--submission-org",
    "Us",
    "--submission-platform",
    "four-gpus",
]


def write_logs(folder, accuracies):
    logs = []
    for number, accuracy in enumerate(accuracies):
        logs.append(folder / f"trial_{number}.log")
        done = python(
            "-c",
            WRITE,
            logs[-1],
            100 + number,
            accuracy,
            *FLAGS,
            input=json.dumps(parameter_names(50)),
        )
        assert done.returncode == 0, done.stderr
    return logs


def tool(name, *arguments):
    done = python("-m", f"mlperf_logging.{name}", *arguments)
    return done.returncode, done.stdout + done.stderr


def write_submission(folder, logs):
    done = python("-m", "mxresnet.results.submission", folder, *logs, "--system", "four-gpus")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_official_tools_accept_five_good_trials(tmp_path):
    package = tmp_path / "package"
    results = write_submission(
        package, write_logs(tmp_path, [0.7605, 0.7601, 0.7599, 0.7611, 0.7592])
    )
    assert results == str(package / "results" / "four-gpus" / "resnet")
    status, output = tool(
        "rcp_checker",
        "--rcp_usage",
        "training",
        "--rcp_version",
        "2.1.0",
        "--log_output",
        tmp_path / "rcp.log",
        results,
    )
    assert status == 0, output
    status, output = tool(
        "system_desc_checker",
        package / "systems" / "four-gpus.json",
        "training",
        "2.1.0",
        "--log_output",
        tmp_path / "system.log",
    )
    assert "passed" in output
    status, output = tool(
        "package_checker", package, "training", "2.1.0", "--log_output", tmp_path / "package.log"
    )
    assert "PACKAGE CHECKER FOUND NO ERRORS" in output, output
    status, output = tool(
        "result_summarizer", package, "training", "2.1.0", "--csv", tmp_path / "summary.csv"
    )
    assert status == 0, output
    table = (tmp_path / "summary.csv").read_text()
    # 35 epochs of 105 s and 9 evaluations of 3 s. At this batch size, runs that are faster than the
    # reference are not scaled.
    assert "four-gpus" in table and re.search(r"6[12]\.\d", table), table


def test_the_package_checker_refuses_two_missed_targets(tmp_path):
    package = tmp_path / "package"
    write_submission(package, write_logs(tmp_path, [0.7605, 0.7501, 0.7499, 0.7611, 0.7592]))
    _, output = tool(
        "package_checker", package, "training", "2.1.0", "--log_output", tmp_path / "package.log"
    )
    assert "PACKAGE CHECKER FOUND ERRORS" in output


def test_the_description_has_known_fields_and_is_not_overwritten(tmp_path):
    (log,) = write_logs(tmp_path, [0.7605])
    write_submission(tmp_path / "package", [log])
    path = tmp_path / "package" / "systems" / "four-gpus.json"
    description = json.loads(path.read_text())
    assert (
        description["submitter"] == "Us"
        and description["status"] == "Available on-premise"
        and len(description) == 33
    )
    assert (
        int(description["host_processor_vcpu_count"]) >= 1
        and "horovod 0.28.1" in description["other_software_stack"]
    )
    path.write_text(json.dumps({**description, "cooling": "air"}))
    done = python(
        "-m", "mxresnet.results.submission", tmp_path / "package", log, "--system", "four-gpus"
    )
    assert (
        done.returncode == 2
        and "holds results already" in done.stderr
        and done.stderr.count("\n") == 1
    )
    assert json.loads(path.read_text())["cooling"] == "air"


@pytest.mark.parametrize("system", ["..", ".", "../x", "-x", "/x", "a b", "", "x" * 201])
def test_a_system_name_that_is_no_file_name_is_refused(tmp_path, capsys, system):
    (log,) = write_logs(tmp_path, [0.7605])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as end:
        submission.main([str(tmp_path / "a" / "b"), str(log), f"--system={system}"])
    assert end.value.code == 2 and "is part of file names" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("content", ["", "hello\n"])
def test_a_file_that_is_not_a_log_is_refused(tmp_path, content):
    (tmp_path / "other.log").write_text(content)
    done = python("-m", "mxresnet.results.submission", tmp_path / "package", tmp_path / "other.log")
    assert (
        done.returncode == 2
        and "other.log is not the log of a run" in done.stderr
        and not (tmp_path / "package").exists()
    )


def event(key, value=None, time_ms=1.0):
    return f":::MLLOG {json.dumps({'key': key, 'value': value, 'time_ms': time_ms})}\n"


ORG, START, STOP = event("submission_org", "Us"), event("run_start"), event("run_stop", time_ms=2)


def refused(capsys, tmp_path, *logs):
    """Call the command with logs of this content, which it must refuse; return its message."""
    paths = [tmp_path / f"{number}.log" for number in range(len(logs))]
    for path, content in zip(paths, logs):
        path.write_text(content)
    assert submission.main([str(tmp_path / "package"), *map(str, paths)]) == 2
    assert not (tmp_path / "package").exists()
    message = capsys.readouterr().err
    assert message.count("\n") == 1, message
    return message


@pytest.mark.parametrize(
    "content, words",
    [
        ('hello\n:::MLLOG {"key": "submission_org", "val', "cannot be read: line 2 is damaged"),
        (ORG + START + ":::MLLOG {\n" + STOP, "cannot be read: line 3 is damaged"),
        (ORG, "was cut off: it has no run_start"),
        (ORG + START, "was cut off: it has no run_stop"),
        (START + STOP, "is not the log of a run: it has no submission_org"),
        (ORG + START + STOP + ORG + START + STOP, "is not the log of one run: it has 2 subm"),
        (ORG + STOP + START + START, "is not the log of one run: it has 2 run_start"),
        (ORG + START + event("run_stop", time_ms="x"), "have no valid times"),
        (ORG + event("run_start", time_ms=9) + STOP, "have no valid times"),
    ],
)
def test_a_log_that_is_not_that_of_one_whole_run_is_refused(tmp_path, capsys, content, words):
    assert words in refused(capsys, tmp_path, content)


@pytest.mark.parametrize(
    "key, value",
    [
        ("submission_org", '["Us"]'),
        ("submission_org", "null"),
        ("submission_status", "{}"),
        ("submission_status", '"elsewhere"'),
        ("submission_division", '"ajar"'),
        ("submission_org", "1e999"),
        ("submission_org", "9" * 5000),
        ("submission_org", "[" * 5000),
        ("eval_accuracy", "NaN"),
        ("eval_accuracy", '"0.76"'),
        ("eval_accuracy", "75.9"),
        ("eval_accuracy", "true"),
    ],
    ids=range(12),
)
def test_a_log_with_odd_values_is_refused(tmp_path, capsys, key, value):
    line = f':::MLLOG {{"key": "{key}", "value": {value}}}\n'
    org = "" if key == "submission_org" else ORG
    message = refused(capsys, tmp_path, org + line + START + STOP)
    assert "0.log" in message and (key in message or "is damaged" in message)


def test_logs_of_one_run_or_of_several_systems_are_refused(tmp_path, capsys):
    log, seed = ORG + START + STOP, event("seed", 3)
    message = refused(capsys, tmp_path, log, log)
    assert "0.log and" in message and "1.log are of the same run" in message
    message = refused(capsys, tmp_path, log, log + seed, "note\n" + log)
    assert "0.log and" in message and "2.log are of the same run" in message
    message = refused(capsys, tmp_path, log, log.replace("Us", "You") + seed)
    assert 'differ in submission_org ("Us", "You")' in message


def test_a_failed_copy_leaves_nothing_that_the_next_call_refuses(tmp_path, capsys, monkeypatch):
    (log,) = write_logs(tmp_path, [0.7605])
    arguments = [str(tmp_path / "package"), str(log), "--system=s"]

    def no_space(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(submission.shutil, "copyfile", no_space)
        assert submission.main(arguments) == 2
    assert "No space left" in capsys.readouterr().err
    assert submission.main(arguments) == 0
    assert os.listdir(tmp_path / "package" / "results" / "s") == ["resnet"]


def test_a_log_that_is_a_named_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    done = python("-m", "mxresnet.results.submission", tmp_path / "package", tmp_path / "pipe")
    assert done.returncode == 2 and "pipe is not a regular file" in done.stderr


@pytest.mark.parametrize("nodes", ["0", "-1", "1e12", "9" * 30, "inf", "abc"])
def test_a_wrong_number_of_nodes_is_refused(tmp_path, nodes):
    done = python("-m", "mxresnet.results.submission", tmp_path, "a.log", f"--nodes={nodes}")
    assert done.returncode == 2 and "--nodes" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and len(done.stderr) < 500


@pytest.mark.parametrize(
    "redirection, status, words",
    [
        (">&-", 0, ""),
        ("| true", 0, ""),
        (">/dev/full", 2, "standard output cannot be written (No space left on device)"),
    ],
)
def test_a_submission_is_written_without_standard_output(tmp_path, redirection, status, words):
    (tmp_path / "run.log").write_text(ORG + START + STOP)
    command = f"{sys.executable} -m mxresnet.results.submission {tmp_path}/p {tmp_path}/run.log"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} --system=s {redirection}"],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == status and words in done.stderr
    assert done.stderr.count("\n") == bool(words), done.stderr
    assert (tmp_path / "p" / "results" / "s" / "resnet" / "result_0.txt").exists()


def test_a_folder_without_a_name_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        submission.main(["", str(tmp_path / "run.log")])
    assert end.value.code == 2 and "FOLDER: the name is empty" in capsys.readouterr().err
