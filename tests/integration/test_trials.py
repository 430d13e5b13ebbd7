# SPDX-License-Identifier: Apache-2.0
"""run_trials.sh, run_with_docker.sh and run.sub: what they start in which order, and what they make of the outcome."""

import json
import os
import re
import signal
import subprocess
import time

import pytest
from support.commands import ROOT
from test_bind import stand_in
from test_system_configs import exported

QUICK = ["--batch-size", "16", "--num-epochs", "2"]
# A stand-in for a trial: PLAN has "status:minutes" for each; the log is that of a real run with another end.
TRIAL = """
one_trial() {
    local plan; read -ra plan <<<"$PLAN"; plan=${plan[TRIAL - 1]}
    echo "$TRIAL $SEED $CACHE_CLEARED" >>"$LOGDIR.trials"
    [ "$plan" != hang ] || exec sleep 60
    sed "s/STOP/$((1600000000000 + 60000 * ${plan#*:}))/; s/ACCURACY/${ACCURACY:-0.76}/; ${LEFT_OUT:+/$LEFT_OUT/d}" "$TEMPLATE" \\
        >"$LOGDIR/${DATESTAMP}_$TRIAL.log"
    exit "${plan%:*}"
}
"""
SCRIPT = f"source ./run_trials.sh; {TRIAL} show_settings() {{ :; }}; check_log() {{ grep -q 'eval_accuracy.*0.76' \"$1\"; }}; drop_caches() {{ $DROP; }}; trials"


def start(command, tmp_path, **environ):
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "LOGDIR": str(tmp_path / "results"),
        **environ,
    }
    return subprocess.Popen(
        command, cwd=ROOT, text=True, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process, timeout=120):
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def two_trials(few, tmp_path_factory):
    """A real run of two trials, to any accuracy."""
    folder = tmp_path_factory.mktemp("trials")
    process = start(
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
    """The log of a real trial, with STOP for the time of its end and ACCURACY for what it reached."""
    text = (two_trials[0] / "now_1.log").read_text()
    text = re.sub(r'"time_ms": \d+(.*"key": "run_start")', r'"time_ms": 1600000000000\1', text)
    text = re.sub(r'"time_ms": \d+(.*"key": "run_stop")', r'"time_ms": STOP\1', text)
    path = tmp_path_factory.mktemp("template") / "log"
    path.write_text(re.sub(r'("eval_accuracy", "value": )[\d.]+', r"\1ACCURACY", text))
    return path


@pytest.fixture
def trials(template, tmp_path):
    def run(plan, drop="true", script=SCRIPT, **environ):
        process = start(
            ["bash", "-c", script],
            tmp_path,
            PLAN=plan,
            DROP=drop,
            TEMPLATE=str(template),
            **{"NEXP": str(len(plan.split())), "DATESTAMP": "s", **environ},
        )
        return finish(process)

    return run


def rows(text):
    """The summary's lines by trial: seed, minutes, epochs, accuracy, checker, outcome."""
    return [line.split(maxsplit=6)[1:] for line in text.splitlines() if re.match(r"\d+ ", line)]


def test_two_trials_for_real(two_trials):
    results, done = two_trials
    # Nothing reaches 0.759 in two epochs on 100 images, so the official checker refuses what reached its target of 0.
    assert done.returncode == 4, done.stderr
    assert done.stdout.count("RESULT,IMAGE_CLASSIFICATION,,") == 2
    assert [(row[0], row[4], row[5]) for row in rows(done.stdout)] == [
        ("7", "REFUSES", "reached"),
        ("8", "REFUSES", "reached"),
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
    laid_out = [(system / "resnet" / f"result_{number}.txt").read_text() for number in (0, 1)]
    assert laid_out == [(results / f"now_{trial}.log").read_text() for trial in (1, 2)]
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
    script = SCRIPT.replace("check_log()", "unused()")
    done = trials("0:10", script=script)
    assert done.returncode == 0 and rows(done.stdout)[0][4:] == ["accepts", "reached"], done.stdout


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


def test_trials_that_evaluated_nothing_reached_nothing(trials):
    done = trials("0:1 0:2 0:3", LEFT_OUT="eval_accuracy")
    assert (
        done.returncode == 3
        and {row[5] for row in rows(done.stdout)} == {"nothing EVALUATED"}
        and "no Olympic mean" in done.stdout
    )


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--seed", "5"], "--seed: every trial"),
        (["--log-file=x"], "--log-file: the logs"),
        (["--print-config"], "./run_and_time.sh shows that"),
        (["--lr", "fast"], "--lr: 'fast'"),
    ],
)
def test_a_flag_that_is_wrong_for_trials_is_refused_before_anything_is_done(
    few, tmp_path, flags, words
):
    done = finish(
        start(
            ["./run_trials.sh", *flags],
            tmp_path,
            DATAROOT=str(few),
            DGXSYSTEM="CPU_digits",
            NEXP="1",
        )
    )
    assert (
        done.returncode == 2
        and words in done.stderr
        and "trial 1" not in done.stderr
        and done.stdout == ""
    ), done.stderr


@pytest.mark.parametrize(
    "system, words",
    [("DGXA100_multi_8x8x51", "is for 8 machines"), ("PDP11", "DGXSYSTEM=PDP11 has no")],
)
def test_a_configuration_for_other_machines_is_refused_before_anything_is_done(
    tmp_path, system, words
):
    done = finish(start(["./run_trials.sh"], tmp_path, DGXSYSTEM=system))
    assert (
        done.returncode == 2
        and words in done.stderr
        and done.stderr.count("\n") == 1
        and not (tmp_path / "results").exists()
    )


def test_two_missed_targets_leave_no_mean(trials):
    done = trials("0:12 3:5 0:10 3:5 0:13")
    assert (
        done.returncode == 3 and "no Olympic mean" in done.stdout and "dropped" not in done.stdout
    )


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


def test_a_refused_log_is_not_a_success(trials):
    done = trials("0:12", ACCURACY="0.75")
    assert done.returncode == 4 and rows(done.stdout)[0][4] == "REFUSES"


@pytest.mark.parametrize(
    "drop, wanted, told, said",
    [("true", "1", "1", False), ("false", "1", "0", True), ("true", "0", "0", False)],
)
def test_the_log_says_of_the_cache_what_was_done(trials, tmp_path, drop, wanted, told, said):
    done = trials("0:12 0:12", drop=drop, CLEAR_CACHES=wanted)
    assert [line.split()[2] for line in (tmp_path / "results.trials").read_text().splitlines()] == [
        told,
        told,
    ]
    assert ("could not be dropped" in done.stderr) == said


def test_without_root_the_cache_is_not_dropped():
    user = ["setpriv", "--reuid=65534", "--clear-groups"] if os.getuid() == 0 else []
    (function,) = re.findall(r"^drop_caches\(\) .*", (ROOT / "run_trials.sh").read_text(), re.M)
    done = subprocess.run(
        [*user, "bash"],
        input=f"set -euo pipefail; {function}\ndrop_caches",
        text=True,
        capture_output=True,
        cwd="/",
    )
    assert done.returncode != 0 and done.stderr == ""


def test_seeds_are_drawn_different_or_counted_up(trials, tmp_path):
    trials("0:1 0:1 0:1 0:1 0:1", DATESTAMP="a")
    trials("0:1 0:1 0:1", SEED="41", DATESTAMP="b")
    seeds = [
        int(line.split()[1]) for line in (tmp_path / "results.trials").read_text().splitlines()
    ]
    assert len(set(seeds[:5])) == 5 and max(seeds[:5]) < 65536 and seeds[5:] == [41, 42, 43]


@pytest.mark.parametrize(
    "environ, words",
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
def test_a_mistake_is_said_before_anything_runs(trials, tmp_path, environ, words):
    done = trials("0:1", **environ)
    assert (
        done.returncode == 2
        and words in done.stderr
        and done.stderr.count("\n") == 1
        and done.stdout == ""
    )
    assert not (tmp_path / "results.trials").exists()


def test_logs_are_never_mixed(trials):
    assert trials("0:1").returncode == 0
    done = trials("0:1")
    assert done.returncode == 2 and "has files of that stamp" in done.stderr


def test_a_signal_ends_the_trial_and_what_was_done_is_summed_up(template, tmp_path):
    process = start(
        ["bash", "-c", SCRIPT],
        tmp_path,
        PLAN="0:1 hang 0:1",
        NEXP="3",
        DROP="true",
        TEMPLATE=str(template),
    )
    wait_for(lambda: "2 " in (tmp_path / "results.trials").read_text())
    process.send_signal(signal.SIGTERM)
    done = finish(process, 10)
    assert done.returncode == 143 and [row[5] for row in rows(done.stdout)] == [
        "reached",
        "FAILED (status 143)",
        "NOT RUN",
    ]


def wait_for(condition, seconds=20):
    end = time.time() + seconds
    while time.time() < end:
        try:
            if condition():
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError("it did not come")


# Containers: a docker that writes down what it is asked to do, and runs the trial's stand-in.
DOCKER = """
printf '%s\\037' "$@" >>"$CALLS"; echo >>"$CALLS"
case "$*" in
    *--print-config*) [ -z "${WRONG:-}" ] || { echo "mxresnet: $WRONG" >&2; exit 2; } ;;
    *" ./run_and_time.sh"*)
        for word do case $word in TRIAL=*) n=${word#*=} ;; DATESTAMP=*) stamp=${word#*=} ;; esac; done
        [ -z "${HANG:-}" ] || exec sleep 60
        sed 's/STOP/1600000600000/; s/ACCURACY/0.76/' "$TEMPLATE" >"$LOGDIR/${stamp}_$n.log" ;;
esac
"""


@pytest.fixture
def docker(template, tmp_path):
    stand_in(tmp_path / "bin", "docker", DOCKER)
    (tmp_path / "data").mkdir()

    def run(*flags, **environ):
        return start(
            ["./run_with_docker.sh", *flags],
            tmp_path,
            **{
                "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
                "CALLS": str(tmp_path / "calls"),
                "TEMPLATE": str(template),
                "CONT": "image:1",
                "DATADIR": str(tmp_path / "data"),
                "NEXP": "2",
                "DATESTAMP": "s",
                "CLEAR_CACHES": "0",
                **environ,
            },
        )

    return run


def asked(tmp_path):
    """What docker was asked to do, word by word."""
    return [call.split("\037")[:-1] for call in (tmp_path / "calls").read_text().splitlines()]


def test_docker_gets_the_configuration_and_the_container_goes_away(docker, tmp_path):
    done = finish(
        docker(
            "--lr",
            "3",
            DGXSYSTEM="A100-40GB_4gpu",
            SUBMISSION_ORG="My Org",
            LR="1",
            DISP_BATCHES="7",
            NCCL_DEBUG="INFO",
            SOMETHING="else",
        )
    )
    assert done.returncode == 0, done.stderr
    calls = asked(tmp_path)
    assert [call[0] for call in calls] == ["run"] + ["exec"] * 7 + ["rm"]
    assert calls.pop(2)[-4:] == ["./run_and_time.sh", "--print-config", "--lr", "3"]
    assert (
        "mxresnet.results.submission" in calls[6]
        and "/results/s_package" in calls[6]
        and "/results/s_2.log" in calls[6]
    )
    assert (
        calls[0][calls[0].index("--gpus") + 1] == "all"
        and f"{tmp_path}/data:/data:ro" in calls[0]
        and "image:1" in calls[0]
    )
    assert (
        calls[2][-3:] == ["./run_and_time.sh", "--lr", "3"]
        and "mlperf_logging.compliance_checker" in calls[3]
    )
    handed_over = dict(
        calls[2][i + 1].split("=", 1) for i, word in enumerate(calls[2]) if word == "-e"
    )
    own = {
        "DGXSYSTEM": "A100-40GB_4gpu",
        "CONFIG_LOADED": "A100-40GB_4gpu",
        "DATAROOT": "/data",
        "LOGDIR": "/results",
        "SUBMISSION_ORG": "My Org",
        "DISP_BATCHES": "7",
        "NCCL_DEBUG": "INFO",
        "TRIAL": "1",
        "DATESTAMP": "s",
        "CACHE_CLEARED": "0",
        "SEED": handed_over["SEED"],
    }
    assert handed_over == {**exported("A100-40GB_4gpu"), **own}


def test_docker_hears_of_wrong_settings_before_a_trial(docker, tmp_path):
    done = finish(
        docker(
            "--lr",
            "fast",
            DGXSYSTEM="DGXA100",
            WRONG="--lr: 'fast' is not a value",
            CLEAR_CACHES="1",
        )
    )
    assert (
        done.returncode == 2
        and "'fast'" in done.stderr
        and [call[0] for call in asked(tmp_path)] == ["run", "exec", "exec", "rm"]
    )


def test_docker_for_the_cpu_asks_for_no_gpus(docker, tmp_path):
    assert finish(docker(DGXSYSTEM="CPU_digits")).returncode == 0
    first = asked(tmp_path)[0]
    assert "--gpus" not in first and f"{tmp_path}/data:/data:rw" in first


def test_a_signal_takes_the_container_away(docker, tmp_path):
    process = docker(DGXSYSTEM="DGXA100", HANG="1")
    wait_for(lambda: "run_and_time" in (tmp_path / "calls").read_text())
    process.send_signal(signal.SIGTERM)
    done = finish(process, 10)
    assert done.returncode == 143 and asked(tmp_path)[-1][:2] == ["rm", "--force"]


@pytest.mark.parametrize(
    "environ, words",
    [
        ({"CONT": ""}, "CONT is not set"),
        ({"DATADIR": "/nowhere"}, "DATADIR=/nowhere"),
        ({"DGXSYSTEM": ""}, "DGXSYSTEM is not set"),
        ({"DGXSYSTEM": "PDP11"}, "PDP11"),
    ],
)
def test_a_mistake_starts_no_container(docker, tmp_path, environ, words):
    done = finish(docker(**{"DGXSYSTEM": "DGXA100", **environ}))
    assert (
        done.returncode == 2
        and words in done.stderr
        and done.stderr.count("\n") == 1
        and not (tmp_path / "calls").exists()
    )
