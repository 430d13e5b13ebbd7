# SPDX-License-Identifier: Apache-2.0
"""Configurations that were not published, and which GPUs get which configuration."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from support.commands import ROOT
from support.fake_programs import fake_program
from support.launchers import exported
from support.scripts import copy_setup_env

from mxresnet.config_parser import parse
from mxresnet.errors import UserError
from mxresnet.launch import hardware
from mxresnet.run_plan import make_plan

PUBLISHED = json.loads((ROOT / "tests" / "golden" / "published_configs.json").read_text())
OURS = {
    "V100-32GB_8gpu": 1024,
    "V100-16GB_8gpu": 816,
    "T4_4gpu": 408,
    "CPU": 408,
    "CPU_digits": 128,
}
# Global batch: peak learning rate, weight decay, epochs of warm-up, epochs. All of these ran in the
# v2.1 round and reached the target.
RAN = {408: (3.0, 5e-5, 2, 37), 816: (5.3, 5e-5, 2, 37), 1024: (6.0, 2.5e-5, 2, 37)}


def plan_of(values):
    config, _ = parse([], values)
    return config, make_plan(config, 1281167, int(values["DGXNGPU"]))


def test_every_configuration_is_known_here():
    systems = {path.name[len("config_") : -len(".sh")] for path in ROOT.glob("config_*.sh")}
    assert {name for name in systems if not name.endswith("common")} == {*PUBLISHED, *OURS}


@pytest.mark.parametrize("system", sorted(OURS))
def test_an_unpublished_configuration_is_marked_and_has_values_of_published_runs(system):
    values = exported(system)
    config, plan = plan_of(values)
    assert config.batch_size * int(values["DGXNGPU"]) == OURS[system]
    if system != "CPU_digits":
        assert (
            config.lr,
            config.wd,
            plan.schedule.warmup_steps // plan.steps_per_epoch,
            config.num_epochs,
        ) == RAN[OURS[system]]
        assert (
            config.accuracy_threshold == 0.759
            and config.optimizer == "sgdwfastlars"
            and config.label_smoothing == 0.1
        )
        assert "not from a published run" in (ROOT / f"config_{system}.sh").read_text().lower()


@pytest.mark.parametrize("system", ["CPU", "CPU_digits"])
def test_ranks_of_a_cpu_configuration_divide_the_cores(system):
    cores = len(os.sched_getaffinity(0))
    values = exported(system, DGXNGPU="2")
    assert values["DGXNGPU"] == "2" and int(values["OMP_NUM_THREADS"]) == max(1, cores // 2)
    config, _ = parse([], values)
    assert config.conv_layout == "NCHW" and values["MXNET_ENGINE_TYPE"] == "NaiveEngine"
    flags = (
        (pathlib.Path("/proc/cpuinfo").read_text() + "flags:\n")
        .partition("flags")[2]
        .splitlines()[0]
        .split()
    )
    low = system == "CPU" and bool({"avx512_bf16", "amx_bf16"} & set(flags))
    assert (config.dtype, config.image_shape[0]) == (("bfloat16", 4) if low else ("float32", 3))
    assert exported(system, DGXNGPU="1000")["OMP_NUM_THREADS"] == "1"


def choice(tmp_path, answer="", status=0, **environ):
    """Return the messages of ./run_and_time.sh when nvidia-smi prints this answer.

    A wrong flag ends the run before any work. The script runs in a copy without .venv, where it
    uses the Python of this test: it would replace a .venv for the CPU by one for the GPUs.
    """
    checkout = tmp_path / "checkout"
    if not checkout.exists():
        kept_out = shutil.ignore_patterns(".*", "__pycache__", "tests", "docs", "results", "data")
        shutil.copytree(ROOT, checkout, ignore=kept_out)
    fake = tmp_path / "nvidia-smi"
    fake.write_text(
        "#!/bin/sh\n"
        f'[ "$1" != -i ] || echo "$2" > \'{tmp_path}/asked\'\n'
        f"printf '%s' '{answer}'\n"
        f"exit {status}\n"
    )
    fake.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), **environ}
    done = subprocess.run(
        ["./run_and_time.sh", "--lr", "zero"], cwd=checkout, text=True, capture_output=True, env=env
    )
    assert done.returncode == 2 and done.stdout == "", done.stderr
    return done.stderr


def gpus(count, name, mib):
    return f"{name}, {mib}\n" * count


@pytest.mark.parametrize(
    "answer, system",
    [
        (gpus(4, "NVIDIA A100-SXM4-40GB", 40960), "A100-40GB_4gpu"),
        (gpus(4, "A100-SXM4-40GB", 40537), "A100-40GB_4gpu"),
        (gpus(4, "NVIDIA A100-PCIE-40GB", 40960), "A100-40GB_4gpu"),
        (gpus(8, "NVIDIA A100-SXM4-40GB", 40536), "A100-40GB_8gpu"),
        (gpus(4, "NVIDIA A100-SXM4-80GB", 81920), "A100-80GB_4gpu"),
        (gpus(8, "NVIDIA A100-SXM4-80GB", 81251), "DGXA100"),
        (gpus(8, "NVIDIA A100 80GB PCIe", 80994), "DGXA100"),
        (gpus(4, "NVIDIA A100 80GB PCIe", 81920), "A100-PCIe-80GB_4gpu"),
        (gpus(2, "NVIDIA A30", 24258), "A30_1x2x204"),
        (gpus(2, "NVIDIA RTX A5000", 24564), "A30_1x2x204"),
        (gpus(8, "Tesla V100-SXM2-16GB", 16160), "V100-16GB_8gpu"),
        (gpus(8, "Tesla V100-SXM3-32GB", 32480), "V100-32GB_8gpu"),
        (gpus(4, "Tesla T4", 15079), "T4_4gpu"),
    ],
)
def test_the_system_is_chosen_from_the_gpus_and_reported(tmp_path, answer, system):
    messages = choice(tmp_path, answer)
    assert messages.startswith(f"Configuration {system}, chosen from the hardware found: ")
    assert answer.splitlines()[0] + " MiB" in messages and f"{answer.count(chr(10))} x " in messages


@pytest.mark.parametrize(
    "answer",
    [
        gpus(1, "NVIDIA A100-SXM4-40GB", 40960),
        gpus(6, "NVIDIA A100-SXM4-80GB", 81920),
        gpus(8, "NVIDIA H100 80GB HBM3", 81559),
        gpus(4, "NVIDIA A30", 24576),
        gpus(2, "NVIDIA A300", 24576),
        gpus(4, "NVIDIA A100-SXM4-40GB", "[N/A]"),
        gpus(2, "NVIDIA A100-SXM4-80GB", 81920) + gpus(2, "NVIDIA H100 PCIe", 81559),
    ],
)
def test_gpus_without_a_configuration_are_refused_with_the_list(tmp_path, answer):
    messages = choice(tmp_path, answer)
    assert messages.count("\n") == 1 and messages.startswith(
        "run_and_time.sh: no configuration is known for the GPUs"
    )
    assert (
        answer.splitlines()[-1] in messages
        and "DGXA100_4gpu" in messages
        and "common" not in messages
    )


def test_setup_device_cpu_chooses_the_configuration_of_a_cpu(tmp_path):
    messages = choice(tmp_path, gpus(4, "NVIDIA A100-SXM4-40GB", 40960), SETUP_DEVICE="cpu")
    assert messages.startswith("Configuration CPU_digits, chosen")
    assert "SETUP_DEVICE" in messages.splitlines()[0]


def test_the_smallest_gpu_memory_decides(tmp_path):
    assert "Configuration A100-40GB_4gpu" in choice(
        tmp_path, gpus(3, "A100", 81920) + gpus(1, "A100", 40960)
    )


@pytest.mark.parametrize(
    "answer, status, environ",
    [
        ("No devices were found\n", 6, {}),
        (gpus(4, "Tesla T4", 15079), 0, {"CUDA_VISIBLE_DEVICES": ""}),
        (gpus(4, "Tesla T4", 15079), 0, {"CUDA_VISIBLE_DEVICES": "-1"}),
    ],
)
def test_without_gpus_the_cpu_configuration_is_chosen(tmp_path, answer, status, environ):
    assert choice(tmp_path, answer, status, **environ).startswith(
        "Configuration CPU_digits, chosen from the hardware found: no GPU ("
    )


def test_a_broken_driver_does_not_select_the_cpu_configuration(tmp_path):
    messages = choice(tmp_path, "Failed to initialize NVML: Driver/library version mismatch\n", 18)
    assert (
        messages.startswith("run_and_time.sh: nvidia-smi fails (Failed to initialize NVML")
        and messages.count("\n") == 1
    )


def test_gpus_that_nvidia_smi_does_not_know_are_not_taken_for_none(tmp_path):
    fake_program(
        tmp_path,
        "nvidia-smi",
        'case "$1" in -i) echo No devices were found; exit 6 ;; esac; echo "NVIDIA A30, 24258"\n',
    )
    environ = {"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "MIG-8a3e"}
    with pytest.raises(UserError, match="it knows no GPU of CUDA_VISIBLE_DEVICES=MIG-8a3e"):
        hardware.choose_system(environ)


@pytest.mark.parametrize("content", ["", "garbage", "#!/no/such/shell\n"])
def test_a_tool_that_cannot_be_started_is_reported(tmp_path, content):
    program = tmp_path / "nvidia-smi"
    program.write_text(content)
    program.chmod(0o755)
    with pytest.raises(
        UserError, match=f"nvidia-smi fails \\({program}: .* set DGXSYSTEM to one of"
    ):
        hardware.choose_system({"PATH": str(tmp_path)})


def test_only_visible_gpus_are_used(tmp_path):
    choice(tmp_path, gpus(4, "NVIDIA A100-SXM4-40GB", 40960), CUDA_VISIBLE_DEVICES="0,1,2,3")
    assert (tmp_path / "asked").read_text() == "0,1,2,3\n"


@pytest.mark.parametrize(
    "environ",
    [
        {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_SIZE": "4"},
        {"SLURM_JOB_NUM_NODES": "2"},
    ],
)
def test_a_job_on_several_machines_needs_dgxsystem(tmp_path, environ):
    assert "several machines" in choice(
        tmp_path, gpus(4, "NVIDIA A100-SXM4-40GB", 40960), **environ
    )


def test_a_configuration_of_several_machines_is_not_started_on_one():
    env = {"PATH": os.environ["PATH"], "DGXSYSTEM": "DGXA100_multi_8x8x51"}
    done = subprocess.run(["./run_and_time.sh"], cwd=ROOT, text=True, capture_output=True, env=env)
    assert (
        done.returncode == 2 and "is for 8 machines" in done.stderr and done.stderr.count("\n") == 1
    )


def launcher_python(path, root=ROOT):
    return subprocess.run(
        [root / "setup_env.sh", "--launcher-python"],
        text=True,
        capture_output=True,
        env={"PATH": f"{path}:/usr/bin:/bin"},
    )


def test_launchers_run_on_any_python_from_3_8_on(tmp_path):
    (tmp_path / "python").symlink_to("/usr/bin/false")  # as a Python 2
    (tmp_path / "python3").symlink_to(sys.executable)
    done = launcher_python(tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}/python3\n", "")


def test_launchers_without_a_python_end_with_advice(tmp_path):
    for name in ("python", "python3", *(f"python3.{minor}" for minor in range(8, 13))):
        (tmp_path / name).symlink_to("/usr/bin/false")
    # Without .venv, whose Python the launchers would use.
    copy_setup_env(tmp_path)
    done = launcher_python(tmp_path, tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Python 3.9, 3.10, 3.11 or 3.12" in done.stderr
