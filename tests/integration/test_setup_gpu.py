# SPDX-License-Identifier: Apache-2.0
"""setup_env.sh on machines with GPUs: which environment it makes, and why it cannot.

The programs of NVIDIA are fakes. tests/cluster/test_images.py makes the environment with real ones.
"""

import os
import re
import subprocess

import pytest
from support.commands import ROOT
from support.fake_programs import fake_program
from support.fake_setup import Environment

SCRIPT = ROOT / "mxresnet" / "launch" / "setup_gpu.sh"
CPU, GPU = ["build", "cpu", "horovod"], ["cuda", "gpu", "horovod"]
A100 = "NVIDIA A100-SXM4-80GB, 535.161.08"
# Answers each query with a variable of the caller.
NVIDIA_SMI = """
case "$*" in
    *name,driver_version*) printf '%s\\n' "$GPUS" ;;
    *compute_cap*) printf '%s\\n' "${CAPABILITY:-8.0}" ;;
esac
exit ${NVIDIA_SMI_STATUS:-0}
"""
# Accepts the C++ compilers in the variable ACCEPTED.
NVCC = """
case $1 in
    --version) echo "Cuda compilation tools, release ${NVCC_VERSION:-11.8}, V11.8.89" ;;
    -ccbin)
        case " ${ACCEPTED:-c++} " in *" $2 "*) exit 0 ;; esac
        echo "host_config.h:132:2: error: unsupported GNU version $2!" >&2
        exit 1
        ;;
esac
"""
# What Horovod's build gets.
SHOW_BUILD = "env | grep -E '^(CUDACXX|CXX|HOROVOD_GPU|HOROVOD_NCCL|LD_LIBRARY)' >build_variables"


@pytest.fixture
def machine(tmp_path):
    """A machine with two GPUs and CUDA 11.8, without CUDA libraries and without a driver's."""
    machine = Environment(tmp_path)
    fake_program(tmp_path / "bin", "nvidia-smi", NVIDIA_SMI)
    fake_program(tmp_path / "bin", "nvcc", NVCC)
    fake_program(tmp_path / "bin", "ldconfig", "")
    machine.environ["GPUS"] = f"{A100}\n{A100}"
    return machine


def build_variables(machine):
    text = (machine.folder / "build_variables").read_text()
    return dict(line.split("=", 1) for line in text.splitlines())


def refusal(machine, **environ):
    """Return the one line with which setup_env.sh refuses."""
    status, out, err = machine.run(**environ)
    assert (status, out) == (1, ""), err
    assert err.startswith("setup_env.sh: ") and err.count("\n") == 1, err
    assert machine.calls.read_text() == ""
    return err


def test_a_machine_with_gpus_gets_an_environment_for_them(machine):
    status, out, err = machine.run(BUILD=SHOW_BUILD)
    assert (status, out) == (0, f"{machine.folder}/.venv/bin/python\n"), err
    assert machine.installed() == GPU
    assert "for the GPU" in err and "about 5 GB" in err
    assert "-m mxresnet.model.cudnn_bn build --gpu --cuda lib --cuda" in machine.calls.read_text()
    variables = build_variables(machine)
    nccl = "lib/nvidia/nccl"
    assert variables["HOROVOD_GPU_OPERATIONS"] == "NCCL"
    assert variables["HOROVOD_NCCL_HOME"] == nccl and variables["HOROVOD_NCCL_LINK"] == "SHARED"
    assert variables["CUDACXX"] == f"{machine.folder}/bin/nvcc"
    for name in ("mxnet/libcudnn.so.8", "mxnet/libnccl.so.2", "nvidia/nccl/lib/libnccl.so"):
        assert (machine.folder / "lib" / name).exists(), name
    # The same environment is used where no GPU is seen, as in the launcher of a job.
    assert machine.run(GPUS="", NVIDIA_SMI_STATUS="9")[0] == 0
    assert machine.calls.read_text() == ""


@pytest.mark.parametrize(
    "environ",
    [
        {"SETUP_DEVICE": "cpu"},
        {"DGXSYSTEM": "CPU_digits"},
        {"CUDA_VISIBLE_DEVICES": ""},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {"GPUS": "No devices were found", "NVIDIA_SMI_STATUS": "6"},
    ],
)
def test_an_environment_for_the_cpu_where_it_is_asked_for_or_there_is_no_gpu(machine, environ):
    assert machine.run(**environ)[0] == 0
    assert machine.installed() == CPU


def test_no_nvidia_smi_means_no_gpu(machine):
    (machine.folder / "bin" / "nvidia-smi").unlink()
    assert machine.run()[0] == 0
    assert machine.installed() == CPU


def test_an_image_for_gpus_is_built_without_one(machine):
    (machine.folder / "bin" / "nvidia-smi").unlink()
    assert machine.run(SETUP_DEVICE="gpu")[0] == 0
    assert machine.installed() == GPU


def test_an_environment_for_another_device_is_made_anew(machine):
    machine.run(SETUP_DEVICE="cpu")
    (machine.folder / ".venv" / "lib").mkdir()
    status, _, err = machine.run()
    assert status == 0 and "is for the cpu: it is removed" in err
    assert machine.installed() == GPU and not (machine.folder / ".venv" / "lib").exists()
    assert machine.run(SETUP_DEVICE="cpu")[0] == 0
    assert machine.installed() == CPU


@pytest.mark.parametrize("value", ["cuda", "GPU", "0", " "])
def test_other_devices_are_refused(machine, value):
    status, out, err = machine.run(SETUP_DEVICE=value)
    assert (status, out) == (2, "")
    assert err.startswith(f"setup_env.sh: SETUP_DEVICE={value}: use cpu or gpu")
    assert err.count("\n") == 1


@pytest.mark.parametrize("version", ["13.0", "12.4", "11.0", "10.2", None])
def test_a_missing_toolkit_is_named_with_three_ways_out(machine, version):
    if version is None:
        (machine.folder / "bin" / "nvcc").unlink()
    message = refusal(machine, NVCC_VERSION=version or "")
    assert "2 x NVIDIA A100-SXM4-80GB, but no CUDA 11 toolkit" in message
    assert version is None or f"found: CUDA {version} in {machine.folder}/bin/nvcc" in message
    assert "apt-get install nvidia-cuda-toolkit" in message
    assert "CONT=mxresnet:gpu ./run_with_docker.sh" in message
    assert "SETUP_DEVICE=cpu" in message


def test_cuda_home_is_preferred(machine):
    (machine.folder / "cuda").mkdir()
    fake_program(machine.folder / "cuda" / "bin", "nvcc", NVCC)
    assert machine.run(CUDA_HOME=f"{machine.folder}/cuda", BUILD=SHOW_BUILD)[0] == 0
    assert build_variables(machine)["CUDACXX"] == f"{machine.folder}/cuda/bin/nvcc"


def test_a_compiler_that_nvcc_accepts_is_used_for_horovod(machine):
    fake_program(machine.folder / "bin", "g++-10", "")
    status, _, err = machine.run(ACCEPTED="g++-10 g++-9", BUILD=SHOW_BUILD)
    assert status == 0, err
    assert build_variables(machine)["CXX"] == "g++-10"


def test_no_compiler_that_nvcc_accepts(machine):
    message = refusal(machine, ACCEPTED="none")
    assert "error: unsupported GNU version c++!" in message and "g++-11" in message


@pytest.mark.parametrize(
    "driver, outcome",
    [("440.33", "needs 450 or newer"), ("390.157", "needs 450 or newer"), ("470.82", "note: ")],
)
def test_an_old_driver_is_named(machine, driver, outcome):
    gpus = f"NVIDIA A30, {driver}"
    if outcome == "note: ":
        status, _, err = machine.run(GPUS=gpus)
        assert status == 0 and f"note: with the NVIDIA driver {driver}, operators are not" in err
    else:
        message = refusal(machine, GPUS=gpus)
        assert f"the NVIDIA driver of this machine is {driver}" in message and outcome in message


@pytest.mark.parametrize("capability", ["9.0", "10.0", "12.0", "3.7"])
def test_a_gpu_that_mxnet_has_no_code_for_is_named(machine, capability):
    message = refusal(machine, CAPABILITY=f"8.0\n{capability}", GPUS=A100)
    assert f"1 x NVIDIA A100-SXM4-80GB: compute capability {capability}, and" in message
    assert "mxnet-cu112 1.9.1" in message and "SETUP_DEVICE=cpu" in message


def test_a_driver_that_does_not_know_compute_capabilities(machine):
    """Before 470, nvidia-smi has no such field."""
    script = 'case "$*" in *compute_cap*) echo "Field is not valid"; exit 2 ;; esac\n'
    fake_program(machine.folder / "bin", "nvidia-smi", script + NVIDIA_SMI)
    assert machine.run()[0] == 0
    assert machine.installed() == GPU


def test_gpus_that_cannot_be_queried_are_not_taken_for_none(machine):
    reason = "Failed to initialize NVML: Driver/library version mismatch"
    message = refusal(machine, GPUS=reason, NVIDIA_SMI_STATUS="18")
    assert f"nvidia-smi fails ({reason})" in message and "SETUP_DEVICE=cpu" in message


def test_only_the_visible_gpus_count(machine):
    script = 'case "$*" in *"-i 1,3"*) ;; *) exit 7 ;; esac\n'
    fake_program(machine.folder / "bin", "nvidia-smi", script + NVIDIA_SMI)
    assert machine.run(CUDA_VISIBLE_DEVICES="1,3")[0] == 0


def test_names_that_nvidia_smi_does_not_know_hide_no_gpu(machine):
    """It takes numbers and identities of whole GPUs, CUDA those of their parts (MIG) as well."""
    script = 'case "$*" in *"-i "*) echo No devices were found; exit 6 ;; esac\n'
    fake_program(machine.folder / "bin", "nvidia-smi", script + NVIDIA_SMI)
    environ = {"CUDA_VISIBLE_DEVICES": "MIG-8a3e"}
    message = refusal(machine, CAPABILITY="9.0", **environ)
    assert message.startswith("setup_env.sh: 2 x NVIDIA A100-SXM4-80GB: compute capability 9.0")
    assert machine.run(**environ)[0] == 0
    assert machine.installed() == GPU


def test_libraries_of_the_machine_are_used_only_if_none_is_missing(tmp_path):
    text = SCRIPT.read_text()
    names = " ".join(re.findall(r"^cuda_libraries\+?=\"(.*)\"", text, re.M)).split()
    headers = re.search(r'^cuda_headers="(.*)"', text, re.M).group(1).split()
    assert "libcudnn.so.8" in names and "libnccl.so.2" in names and len(names) == 10
    include = tmp_path / "cuda" / "include"
    include.mkdir(parents=True)
    for header in headers:
        (include / header).touch()
    script = f'log() {{ :; }}; venv=/; source "{SCRIPT}"; has_cuda_libraries'

    def found(libraries):
        listed = "".join(f"echo '{name} (libc6,x86-64) => /x/{name}'\n" for name in libraries)
        fake_program(tmp_path / "bin", "ldconfig", listed)
        environ = {
            "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
            "CUDACXX": f"{tmp_path}/cuda/bin/nvcc",
        }
        return subprocess.run(["bash", "-c", script], env=environ).returncode == 0

    assert found(names)
    assert not any(found([name for name in names if name != one]) for one in names)
    (include / "nccl.h").unlink()
    assert not found(names)
