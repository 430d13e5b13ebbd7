# SPDX-License-Identifier: Apache-2.0
"""Trials on this machine: their order, seeds and logs, the summary, and the exit status."""

import json
import os
import re
import signal
import sys

import pytest
from support.commands import ROOT
from support.fake_programs import fake_program
from support.scripts import finish, start_script, wait_for

from mxresnet.launch import page_cache
from mxresnet.launch.page_cache import drop_page_cache

QUICK = ["--batch-size", "16", "--num-epochs", "2"]


@pytest.fixture(scope="module")
def two_trials(few, tmp_path_factory):
    """A real run of two trials, to any accuracy."""
    folder = tmp_path_factory.mktemp("trials")
    process = start_script(
        ["./run_trials.sh", *QUICK, "--accuracy-threshold", "0"],
        folder,
        DATAROOT=str(few),
        DGXSYSTEM="CPU_digits",
        NEXP="2",
        SEEDS="7,8",
        CLEAR_CACHES="0",
        DATESTAMP="now",
        SUBMISSION_ORG="Us",
    )
    return folder / "results", finish(process, 240)


@pytest.fixture(scope="module")
def template(two_trials, tmp_path_factory):
    """The log of a real trial, with STOP for the time of its end and ACCURACY for its accuracy."""
    text = (two_trials[0] / "now_1.log").read_text()
    text = re.sub(r'"time_ms": \d+(.*"key": "run_start")', r'"time_ms": 1600000000000\1', text)
    text = re.sub(r'"time_ms": \d+(.*"key": "run_stop")', r'"time_ms": STOP\1', text)
    path = tmp_path_factory.mktemp("template") / "log"
    path.write_text(re.sub(r'("eval_accuracy", "value": )[\d.]+', r"\1ACCURACY", text))
    return path


@pytest.fixture
def start_trials(template, tmp_path):
    """Start trials on the fake backend, by a plan; return the process."""

    def start(plan, **environ):
        defaults = {"NEXP": str(len(plan.split())), "DATESTAMP": "s", "CAN_DROP_CACHES": "1"}
        return start_script(
            [sys.executable, "-m", "support.fake_backend"],
            tmp_path,
            PYTHONPATH=str(ROOT / "tests"),
            PLAN=plan,
            TEMPLATE=str(template),
            **{**defaults, **environ},
        )

    return start


@pytest.fixture
def trials(start_trials):
    """Run trials on the fake backend, by a plan, to their end."""
    return lambda plan, **environ: finish(start_trials(plan, **environ))


def rows(text):
    """Return the rows of the summary: seed, minutes, epochs, accuracy, checker, outcome."""
    return [line.split(maxsplit=6)[1:] for line in text.splitlines() if re.match(r"\d+ ", line)]


def test_two_real_trials(two_trials):
    results, done = two_trials
    # Two epochs on 100 images do not reach 0.759: the official checker refuses both logs.
    assert done.returncode == 4, done.stderr
    assert done.stdout.count("RESULT,IMAGE_CLASSIFICATION,,") == 2
    assert [(row[0], row[4], row[5]) for row in rows(done.stdout)] == [
        ("7", "accuracy", "reached"),
        ("8", "accuracy", "reached"),
    ]
    assert sorted(path.name for path in results.iterdir()) == [
        "now_1.check",
        "now_1.log",
        "now_2.check",
        "now_2.log",
        "now_package",
        "now_summary.txt",
    ]
    (system,) = (results / "now_package" / "results").iterdir()
    copied = [(system / "resnet" / f"result_{number}.txt").read_text() for number in (0, 1)]
    assert copied == [(results / f"now_{trial}.log").read_text() for trial in (1, 2)]
    assert (results / "now_package" / "systems" / f"{system.name}.json").exists()
    for trial, seed in ((1, 7), (2, 8)):
        events = [
            json.loads(line[9:])
            for line in (results / f"now_{trial}.log").read_text().splitlines()
            if line.startswith(":::MLLOG ")
        ]
        values = {event["key"]: event["value"] for event in events}
        assert (values["seed"], values["cache_clear"], values["submission_org"]) == (
            seed,
            False,
            "Us",
        )
        times = {event["key"]: event["time_ms"] for event in events}
        minutes = (times["run_stop"] - times["run_start"]) / 60000
        assert float(rows(done.stdout)[trial - 1][1]) == pytest.approx(minutes, abs=1e-3)
        assert rows(done.stdout)[trial - 1][2:4] == ["1", f"{values['eval_accuracy']:.5f}"]
    assert done.stdout.endswith((results / "now_summary.txt").read_text())
    assert "eval_accuracy" in (results / "now_1.check").read_text()


def test_the_official_checker_accepts_a_good_log(trials):
    done = trials("0:10", CHECKER="real")
    assert done.returncode == 0 and rows(done.stdout)[0][4:] == ["accepts", "reached"], done.stdout


@pytest.mark.parametrize("key, verdict", [("", "accuracy"), ("lars_epsilon", "REJECTS")])
def test_the_summary_tells_a_missed_target_from_a_faulty_log(trials, tmp_path, key, verdict):
    done = trials("3:10", CHECKER="real", ACCURACY="0.7", WITHOUT_KEY=key)
    assert done.returncode == 3 and rows(done.stdout)[0][4:] == [verdict, "target MISSED"]
    assert ("accuracy: the checker rejects" in done.stdout) == (not key)
    assert not list((tmp_path / "results").glob("*.accuracy"))


def test_the_mean_drops_the_fastest_and_the_slowest(trials):
    done = trials("0:12 0:10 0:99 0:11 0:13")
    assert done.returncode == 0 and [row[1] for row in rows(done.stdout)] == [
        "12.000",
        "10.000",
        "99.000",
        "11.000",
        "13.000",
    ]
    assert "Olympic mean of 5 trials, fastest and slowest dropped: 12.000 minutes" in done.stdout


def test_one_missed_target_is_the_slowest_and_does_not_stop_the_rest(trials):
    done = trials("0:12 3:5 0:10 0:11 0:13")
    assert done.returncode == 3 and rows(done.stdout)[1][5] == "target MISSED"
    assert "dropped: 12.000 minutes" in done.stdout


def test_trials_without_an_evaluation_did_not_reach_the_target(trials):
    done = trials("0:1 0:2 0:3", WITHOUT_KEY="eval_accuracy")
    assert (
        done.returncode == 3
        and {row[5] for row in rows(done.stdout)} == {"nothing EVALUATED"}
        and "no Olympic mean" in done.stdout
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seed", "5"], "--seed: every trial"),
        (["--log-file=x"], "--log-file: the logs"),
        (["--print-config"], "use ./run_and_time.sh --print-config"),
        (["--lr", "fast"], "--lr: 'fast'"),
    ],
)
def test_a_wrong_flag_is_refused_before_the_first_trial(few, tmp_path, flags, message):
    done = finish(
        start_script(
            ["./run_trials.sh", *flags],
            tmp_path,
            DATAROOT=str(few),
            DGXSYSTEM="CPU_digits",
            NEXP="1",
        )
    )
    assert (
        done.returncode == 2
        and message in done.stderr
        and "trial 1" not in done.stderr
        and done.stdout == ""
    ), done.stderr


@pytest.mark.parametrize(
    "system, message",
    [("DGXA100_multi_8x8x51", "is for 8 machines"), ("PDP11", "DGXSYSTEM=PDP11 has no")],
)
def test_a_configuration_for_other_machines_is_refused_before_the_first_trial(
    tmp_path, system, message
):
    done = finish(start_script(["./run_trials.sh"], tmp_path, DGXSYSTEM=system))
    assert (
        done.returncode == 2
        and message in done.stderr
        and done.stderr.count("\n") == 1
        and not (tmp_path / "results").exists()
    )


def test_two_missed_targets_leave_no_mean(trials):
    done = trials("0:12 3:5 0:10 3:5 0:13")
    assert (
        done.returncode == 3 and "no Olympic mean" in done.stdout and "dropped" not in done.stdout
    )


def test_the_report_is_made_at_the_end_unless_it_is_unwanted(trials, tmp_path):
    done = trials("0:1 0:2 0:3", REPORT="1")
    page = tmp_path / "results/s_report.html"
    assert done.returncode == 0 and f"report: {page}\n" in done.stderr
    assert "Official score" in page.read_text() and "s_1.log" not in done.stdout
    assert (tmp_path / "results/s_package").is_dir()


def test_a_report_that_cannot_be_made_does_not_fail_the_trials(trials, tmp_path):
    blocked = "mkdir -p $LOGDIR/s_report.html/x"
    done = trials("0:1 0:2 0:3", REPORT="1", AFTER=blocked)
    assert done.returncode == 0 and "report:" not in done.stderr


def test_a_failed_trial_stops_the_rest_and_is_reported(trials, tmp_path):
    done = trials("0:12 137:5 0:10")
    assert done.returncode == 137 and [row[5] for row in rows(done.stdout)] == [
        "reached",
        "FAILED (status 137)",
        "NOT RUN",
    ]
    assert (
        len((tmp_path / "results.trials").read_text().splitlines()) == 2
        and "mean" not in done.stdout
    )


def test_a_trial_whose_log_is_lost_failed(trials):
    done = trials("0:12 lost 0:10")
    outcomes = [row[5] for row in rows(done.stdout)]
    assert (done.returncode, outcomes) == (1, ["reached", "FAILED (status 1)", "NOT RUN"])
    assert "s_2.log: No such file or directory: the file was removed" in done.stderr


def test_a_log_that_is_lost_after_its_trial_is_a_failure(trials):
    done = trials("0:12 0:10", AFTER='[ "$TRIAL" = 1 ] || rm "$LOGDIR/s_1.log"')
    assert done.returncode == 1 and len(rows(done.stdout)) == 2
    assert "s_1.log cannot be read" in done.stderr


def test_a_log_that_the_checker_refuses_has_a_status_of_its_own(trials):
    done = trials("0:12", ACCURACY="0.75")
    assert done.returncode == 4 and rows(done.stdout)[0][4] == "REJECTS"


@pytest.mark.parametrize(
    "can_drop, clear_caches, logged, noted",
    [("1", "1", "1", False), ("0", "1", "0", True), ("1", "0", "0", False)],
)
def test_the_log_has_whether_the_cache_was_dropped(
    trials, tmp_path, can_drop, clear_caches, logged, noted
):
    done = trials("0:12 0:12", CAN_DROP_CACHES=can_drop, CLEAR_CACHES=clear_caches)
    rows_of_trials = (tmp_path / "results.trials").read_text().splitlines()
    assert [row.split()[2] for row in rows_of_trials] == [logged, logged]
    assert ("could not be dropped" in done.stderr) == noted


def test_without_root_the_cache_is_not_dropped():
    child = os.fork()
    if child == 0:
        if os.getuid() == 0:
            os.setgroups([])
            os.setuid(65534)
        os._exit(int(drop_page_cache({})))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("clear_caches, dropped", [("1", False), ("sudo", True)])
def test_sudo_drops_the_cache_only_if_it_is_asked_for(tmp_path, monkeypatch, clear_caches, dropped):
    file = tmp_path / "of_root" / "drop_caches"
    fake_program(tmp_path, "sudo", f'mkdir -p {file.parent}; [ "$1" = -n ] && shift && exec "$@"')
    monkeypatch.setattr(page_cache, "DROP_CACHES_FILE", str(file))
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CLEAR_CACHES": clear_caches}
    assert drop_page_cache(environ) == dropped
    assert file.exists() == dropped


def test_seeds_are_random_and_different_or_count_up(trials, tmp_path):
    trials("0:1 0:1 0:1 0:1 0:1", DATESTAMP="a")
    trials("0:1 0:1 0:1", SEED="41", DATESTAMP="b")
    seeds = [
        int(line.split()[1]) for line in (tmp_path / "results.trials").read_text().splitlines()
    ]
    assert len(set(seeds[:5])) == 5 and max(seeds[:5]) < 65536 and seeds[5:] == [41, 42, 43]


@pytest.mark.parametrize(
    "environ, message",
    [
        ({"NEXP": "0"}, "NEXP=0"),
        ({"NEXP": "five"}, "NEXP=five"),
        ({"SEEDS": "1 2"}, "2 seeds for NEXP=1"),
        ({"SEEDS": "4 4", "NEXP": "2"}, "seed of its own"),
        ({"SEEDS": "x"}, "x is not"),
        ({"SEED": "-1"}, "SEED=-1"),
        ({"CLEAR_CACHES": "yes"}, "CLEAR_CACHES=yes"),
        ({"LOGDIR": "/proc/nothing"}, "LOGDIR=/proc/nothing"),
    ],
)
def test_a_wrong_setting_is_refused_before_the_first_trial(trials, tmp_path, environ, message):
    done = trials("0:1", **environ)
    assert (
        done.returncode == 2
        and message in done.stderr
        and done.stderr.count("\n") == 1
        and done.stdout == ""
    )
    assert not (tmp_path / "results.trials").exists()


def test_a_stamp_that_has_files_is_refused(trials):
    assert trials("0:1").returncode == 0
    done = trials("0:1")
    assert done.returncode == 2 and "has files of that stamp" in done.stderr


def test_a_signal_ends_the_trial_and_the_summary_is_written(start_trials, tmp_path):
    process = start_trials("0:1 hang 0:1")
    wait_for(lambda: "\n2 " in (tmp_path / "results.trials").read_text())
    process.send_signal(signal.SIGTERM)
    done = finish(process, 10)
    assert done.returncode == 143 and [row[5] for row in rows(done.stdout)] == [
        "reached",
        "FAILED (status 143)",
        "NOT RUN",
    ]
