# SPDX-License-Identifier: Apache-2.0
"""Trials in a container, with a fake docker: its arguments, the environment of a trial, signals."""

import json
import os
import signal
import subprocess

import pytest
from support.commands import ROOT
from support.fake_programs import fake_program
from support.scripts import finish, start_script, wait_for

import mxresnet.launch.backends.docker as docker_backend
from mxresnet.errors import UserError
from mxresnet.launch.backends.slurm import SlurmBackend

LOG = "".join(
    ":::MLLOG "
    + json.dumps({"key": key, "value": value, "time_ms": time_ms, "metadata": metadata})
    + "\n"
    for key, value, time_ms, metadata in (
        ("run_start", None, 1600000000000, {}),
        ("eval_accuracy", 0.76, 1600000500000, {"epoch_num": 35}),
        ("run_stop", None, 1600000600000, {"status": "success"}),
    )
)
# Records its arguments; a trial leaves a log.
DOCKER = """
[ "$1" != info ] || { echo "${INFO:-}"; exit; }
printf '%s\\037' "$@" >>"$CALLS"; echo >>"$CALLS"
case "$*" in
    *--print-config*) [ -z "${WRONG:-}" ] || { echo "mxresnet: $WRONG" >&2; exit 2; } ;;
    *" ./run_and_time.sh"*)
        for word do
            case $word in TRIAL=*) n=${word#*=} ;; DATESTAMP=*) stamp=${word#*=} ;; esac
        done
        [ -z "${HANG:-}" ] || exec sleep 60
        printf '%s' "$LOG" >"$LOGDIR/${stamp}_$n.log" ;;
esac
"""


@pytest.fixture
def docker(tmp_path):
    fake_program(tmp_path / "bin", "docker", DOCKER)
    (tmp_path / "data").mkdir()

    def run(*flags, **environ):
        return start_script(
            ["./run_with_docker.sh", *flags],
            tmp_path,
            **{
                "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
                "CALLS": str(tmp_path / "calls"),
                "LOG": LOG,
                "CONT": "image:1",
                "DATADIR": str(tmp_path / "data"),
                "NEXP": "2",
                "DATESTAMP": "s",
                "CLEAR_CACHES": "0",
                **environ,
            },
        )

    return run


def docker_calls(tmp_path):
    """Return the arguments of each call of docker."""
    return [call.split("\037")[:-1] for call in (tmp_path / "calls").read_text().splitlines()]


def exported(system):
    """Return what a configuration exports in an empty environment."""
    command = f"set -euo pipefail; source ./config_{system}.sh; env -0"
    output = subprocess.check_output(
        ["bash", "-c", command], cwd=ROOT, text=True, env={"PATH": os.environ["PATH"]}
    )
    values = dict(item.split("=", 1) for item in output.split("\0") if item)
    of_bash = ("PATH", "PWD", "SHLVL", "_", "OLDPWD")
    return {name: value for name, value in values.items() if name not in of_bash}


@pytest.mark.parametrize("variable", ["DATADIR", "LOGDIR"])
def test_a_folder_that_docker_cannot_mount_is_named(docker, tmp_path, variable):
    folder = tmp_path / "12:30"
    folder.mkdir()
    done = finish(docker(DGXSYSTEM="CPU", **{variable: str(folder)}))
    message = f"run_with_docker.sh: {variable}: {folder} has a ':', and cannot be mounted in a"
    assert done.returncode == 2 and done.stderr.startswith(message), done.stderr
    assert done.stderr.count("\n") == 1 and not (tmp_path / "calls").exists()


def test_a_folder_that_pyxis_cannot_mount_is_named(tmp_path):
    (tmp_path / "a,b").mkdir()
    environ = {"DGXSYSTEM": "CPU", "CONT": "image", "DATADIR": str(tmp_path / "a,b")}
    with pytest.raises(UserError, match="^DATADIR: .*/a,b has a ',', and cannot be mounted"):
        SlurmBackend(environ).prepare([])


def test_a_trial_gets_the_configuration_and_the_container_is_removed(docker, tmp_path):
    done = finish(
        docker(
            "--lr",
            "3",
            DGXSYSTEM="A100-40GB_4gpu",
            SUBMISSION_ORG="My Org",
            LR="1",
            DISP_BATCHES="7",
            NCCL_DEBUG="INFO",
            NCCL_SOCKET_IFNAME="ib0",
            SOMETHING="else",
        )
    )
    assert done.returncode == 0, done.stderr
    calls = docker_calls(tmp_path)
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
    forwarded = dict(
        calls[2][i + 1].split("=", 1) for i, word in enumerate(calls[2]) if word == "-e"
    )
    own = {
        "DGXSYSTEM": "A100-40GB_4gpu",
        "CHECKPOINTS": "0",
        "CONFIG_LOADED": "A100-40GB_4gpu",
        "DATAROOT": "/data",
        "LOGDIR": "/results",
        "SUBMISSION_ORG": "My Org",
        "DISP_BATCHES": "7",
        "NCCL_DEBUG": "INFO",
        "TRIAL": "1",
        "DATESTAMP": "s",
        "SERIES_STAMP": "s",
        "CACHE_CLEARED": "0",
        "SEED": forwarded["SEED"],
        "BIND": "--cpu=exclusive --ib=single --ib=off",
        "OMPI_MCA_btl_vader_single_copy_mechanism": "none",
    }
    assert forwarded == {**exported("A100-40GB_4gpu"), **own}
    assert "from the environment" not in done.stderr  # LR is given as a flag


def test_a_variable_that_the_configuration_overrides_is_reported_once(docker):
    done = finish(docker(DGXSYSTEM="DGXA100", MOM="0.951807", NUMEPOCHS="90"))
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.splitlines() if "from the environment" in line]
    assert len(notes) == 2 and notes[0].startswith(
        "note: MOM=0.951807 from the environment is over"
    )
    assert notes[1].startswith("note: NUMEPOCHS=90 from the environment replaces NUMEPOCHS=37")


def test_wrong_settings_are_refused_before_the_first_trial(docker, tmp_path):
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
        and [call[0] for call in docker_calls(tmp_path)] == ["run", "exec", "exec", "rm"]
    )


def test_a_cpu_configuration_needs_no_gpus(docker, tmp_path):
    assert finish(docker(DGXSYSTEM="CPU_digits")).returncode == 0
    first = docker_calls(tmp_path)[0]
    assert "--gpus" not in first and f"{tmp_path}/data:/data:rw" in first


@pytest.mark.parametrize(
    "system, capabilities", [("DGXA100", ["DAC_OVERRIDE", "SYS_NICE"]), ("CPU_digits", None)]
)
def test_the_container_has_no_more_rights_than_it_needs(docker, tmp_path, system, capabilities):
    assert finish(docker(DGXSYSTEM=system)).returncode == 0
    options = docker_calls(tmp_path)[0]
    options = options[: options.index("image:1")]
    values = [(options[i], options[i + 1]) for i in range(len(options) - 1)]
    added = [value for flag, value in values if flag == "--cap-add"]
    if os.getuid() != 0:
        capabilities = [name for name in capabilities or [] if name != "DAC_OVERRIDE"]
    assert added == (capabilities or added) and set(added) <= {"DAC_OVERRIDE", "SYS_NICE"}
    assert ("--cap-drop", "ALL") in values and ("--network", "none") in values
    assert [value for flag, value in values if flag == "--security-opt"] == ["no-new-privileges"]
    flags = {word.partition("=")[0] for word in options}
    assert not flags & {"--privileged", "--ipc", "--pid", "--uts", "--device"}


@pytest.mark.parametrize(
    "uid, info, user",
    [
        (1234, '{"SecurityOptions":["name=seccomp"]}', "1234:5678"),
        (1234, '{"host":{"security":{"rootless":false}}}', "1234:5678"),
        (1234, "", "1234:5678"),
        (0, "", "0:5678"),
        # The root user of the container is the caller.
        (1234, '{"SecurityOptions":["name=seccomp","name=rootless"]}', "0:0"),
        (1234, '{"host":{"security":{"rootless": true}}}', "0:0"),
    ],
)
def test_the_container_runs_as_the_caller(tmp_path, monkeypatch, uid, info, user):
    fake_program(tmp_path, "docker", f"echo '{info}'")
    monkeypatch.setattr(os, "getuid", lambda: uid)
    monkeypatch.setattr(os, "getgid", lambda: 5678)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "DGXSYSTEM": "CPU_digits"}
    options = docker_backend.DockerBackend(environ)._run_options(str(tmp_path))
    assert options[options.index("--user") + 1] == user
    assert ("DAC_OVERRIDE" in options) == user.startswith("0:")


def test_the_cache_is_dropped_by_a_container_of_a_named_image_only(tmp_path, monkeypatch):
    fake_program(tmp_path, "docker", 'printf "%s\\037" "$@" >>"$CALLS"; echo >>"$CALLS"')
    monkeypatch.setattr(docker_backend, "drop_page_cache", lambda environ: False)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CALLS": str(tmp_path / "calls")}
    environ["CONT"] = "image:1"
    assert not docker_backend.DockerBackend(environ).drop_caches()
    assert not (tmp_path / "calls").exists()
    environ["CLEAR_CACHES_IMAGE"] = "helper:2"
    assert docker_backend.DockerBackend(environ).drop_caches()
    (call,) = docker_calls(tmp_path)
    assert "helper:2" in call and "image:1" not in call and "--privileged" not in call
    assert "/proc/sys/vm/drop_caches:/drop_caches" in call


def test_a_signal_removes_the_container(docker, tmp_path):
    process = docker(DGXSYSTEM="DGXA100", HANG="1")
    wait_for(lambda: "run_and_time" in (tmp_path / "calls").read_text())
    process.send_signal(signal.SIGTERM)
    done = finish(process, 10)
    assert done.returncode == 143 and docker_calls(tmp_path)[-1][:2] == ["rm", "--force"]


def test_a_killed_script_leaves_no_container(docker, tmp_path):
    process = docker(DGXSYSTEM="DGXA100", HANG="1")
    wait_for(lambda: "run_and_time" in (tmp_path / "calls").read_text())
    process.kill()
    process.wait()
    wait_for(lambda: docker_calls(tmp_path)[-1][:2] == ["rm", "--force"], seconds=3)
    process.communicate()


@pytest.mark.parametrize(
    "environ, message",
    [
        ({"CONT": ""}, "CONT is not set"),
        ({"DATADIR": "/nowhere"}, "DATADIR=/nowhere"),
        ({"DGXSYSTEM": ""}, "DGXSYSTEM is not set"),
        ({"DGXSYSTEM": "PDP11"}, "PDP11"),
    ],
)
def test_a_wrong_variable_starts_no_container(docker, tmp_path, environ, message):
    done = finish(docker(**{"DGXSYSTEM": "DGXA100", **environ}))
    assert (
        done.returncode == 2
        and message in done.stderr
        and done.stderr.count("\n") == 1
        and not (tmp_path / "calls").exists()
    )


def test_copy_dataset_fills_datadir_before_the_container_starts(docker, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("train.rec", "train.idx", "val.rec", "val.idx"):
        (source / name).write_text(name)
    done = finish(docker(DGXSYSTEM="DGXA100", COPY_DATASET=str(source), NEXP="1"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "val.rec").read_text() == "val.rec"
    assert f"{tmp_path}/data:/data:ro" in docker_calls(tmp_path)[0]


def test_copy_dataset_from_a_folder_without_records_starts_no_container(docker, tmp_path):
    done = finish(docker(DGXSYSTEM="DGXA100", COPY_DATASET=str(tmp_path)))
    assert done.returncode == 2 and f"COPY_DATASET={tmp_path} has no train.rec" in done.stderr
    assert not (tmp_path / "calls").exists()


def trials_of(calls):
    """Return the variables of each call of run_and_time.sh that is not a check of the settings."""
    runs = [call for call in calls if "./run_and_time.sh" in call and "--print-config" not in call]
    return [
        dict(call[i + 1].split("=", 1) for i, word in enumerate(call) if word == "-e")
        for call in runs
    ]


def test_the_bandwidth_is_measured_once_before_the_trials(docker, tmp_path):
    done = finish(docker(DGXSYSTEM="DGXA100", NCCL_TEST="1"))
    assert done.returncode == 0, done.stderr
    bandwidth, *trials = trials_of(docker_calls(tmp_path))
    assert bandwidth["NCCL_TEST"] == "1" and len(trials) == 2
    assert not any("NCCL_TEST" in variables for variables in trials)
