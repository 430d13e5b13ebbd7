# SPDX-License-Identifier: Apache-2.0
"""Variables of libraries, limits of the shell and PYTHONPATH that would end a run with a crash."""

import errno
import os
import resource
import subprocess
import sys

import pytest
from support.commands import ROOT, python
from support.launchers import exported

from mxresnet import environment
from mxresnet.environment import (
    check_environment,
    check_python_path,
    check_temporary_folder,
    explain,
)
from mxresnet.errors import UserError
from mxresnet.launch.system_config import systems

THREADS = ["OMP_NUM_THREADS", "MXNET_CPU_WORKER_NTHREADS", "MXNET_MP_WORKER_NTHREADS"]
NUMBERS = [
    "MXNET_SUBGRAPH_VERBOSE",
    "MXNET_EXEC_BULK_EXEC_MAX_NODE_TRAIN",
    "MXNET_BACKWARD_DO_MIRROR",
    "MXNET_OPTIMIZER_AGGREGATION_SIZE",
    "MXNET_CUDNN_AUTOTUNE_DEFAULT",
    "HOROVOD_CYCLE_TIME",
    "HOROVOD_FUSION_THRESHOLD",
]


@pytest.mark.parametrize("name", THREADS + NUMBERS)
@pytest.mark.parametrize("value", ["abc", "inf", "nan", "1e12", "-5", "4,2", "9" * 30, "0x2", " "])
def test_a_value_on_which_a_library_aborts_is_refused(name, value):
    with pytest.raises(UserError, match=f"variable {name}=.* must be a") as caught:
        check_environment({name: value})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", THREADS)
def test_more_threads_than_can_start_are_refused(name):
    with pytest.raises(UserError, match="from [01] to 1024"):
        check_environment({name: "100000"})


@pytest.mark.parametrize("system", systems())
def test_the_variables_of_every_configuration_are_accepted(system):
    check_environment(exported(system))


def test_text_and_unknown_variables_are_accepted():
    check_environment(
        {
            "MXNET_ENGINE_TYPE": "NaiveEngine",
            "MXNET_SAFE_ACCUMULATION": "true",
            "MXNET_VERSION": "1.9.1",
            "MXNET_HOME": "/x",
            "OMP_NUM_THREADS": "",
            "NCCL_DEBUG": "WARN",
        }
    )


def run_under_limit(limit, soft, *arguments):
    """Run python -m mxresnet --print-config with a lower limit."""
    return subprocess.run(
        [sys.executable, "-m", "mxresnet", "--print-config", *arguments],
        cwd=ROOT,
        text=True,
        capture_output=True,
        preexec_fn=lambda: resource.setrlimit(limit, (soft, soft)),
    )


@pytest.mark.parametrize(
    "limit, soft, name",
    [(resource.RLIMIT_AS, 2**30, "ulimit -v"), (resource.RLIMIT_NOFILE, 20, "ulimit -n")],
)
def test_a_limit_that_is_too_small_is_named(limit, soft, name):
    done = run_under_limit(limit, soft)
    assert done.returncode == 2 and name in done.stderr and done.stderr.count("\n") == 1


def test_a_folder_for_temporary_files_is_checked(tmp_path, monkeypatch):
    check_temporary_folder({"TMPDIR": "", "TEMP": str(tmp_path)})
    (tmp_path / "file").write_text("")
    for path, words in (("none", "No such file"), ("file/x", "Not a directory")):
        with pytest.raises(UserError, match=f"TMPDIR={tmp_path}/{path} cannot be used .{words}"):
            check_temporary_folder({"TMPDIR": str(tmp_path / path)})
    monkeypatch.setattr(environment, "_TEMPORARY_BYTES", 2**80)
    with pytest.raises(UserError, match=f"TMPDIR={tmp_path} has [0-9]+ MiB of free space"):
        check_temporary_folder({"TMPDIR": str(tmp_path)})


@pytest.mark.parametrize("module", ["numpy", "mxnet", "json", "logging", "nvidia"])
@pytest.mark.parametrize("package", [False, True])
def test_a_folder_in_pythonpath_that_hides_a_module_is_named(tmp_path, module, package):
    path = tmp_path / module / "__init__.py" if package else tmp_path / f"{module}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text("raise RuntimeError('not the module you want')\n")
    environ = {**os.environ, "PYTHONPATH": f"/nonexistent:{tmp_path}"}
    done = python("-m", "mxresnet", "--print-config", env=environ)
    assert done.returncode == 2, done.stderr
    assert f"the module {module} in {tmp_path} hides that of" in done.stderr
    assert done.stderr.count("\n") == 1


def test_other_folders_in_pythonpath_are_accepted(tmp_path):
    for name in ("sitecustomize.py", "other.py", "numpy_extra.py", "json.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "numpy").mkdir()  # without __init__.py, Python prefers the package
    check_python_path({"PYTHONPATH": f"{ROOT}:{tmp_path}:/nonexistent::"})


def test_a_package_that_cannot_be_imported_is_named(tmp_path):
    """As after an update of the system or an installation that was interrupted."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mlperf_logging'] = None\n")
    environ = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = python("-m", "mxresnet", env=environ)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "the environment is damaged: import of mlperf_logging" in done.stderr


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (OSError(errno.ENOSPC, "No space left on device", "/tmp/x"), "no space left .*/tmp/x"),
        (MemoryError(), "out of memory"),
        (RuntimeError("x\nstd::bad_alloc"), "out of memory .*bad_alloc"),
        (RuntimeError("thread: Resource temporarily unavailable"), "no more threads"),
        (OSError("libcuda.so.1: cannot open shared object file"), "docker run --gpus all"),
        (ImportError("libnuma.so.1: cannot open", name="nvidia.dali"), "libnuma.so.1"),
    ],
)
def test_errors_of_the_environment_are_explained(error, words):
    reason = explain(error)
    with pytest.raises(UserError, match=words):
        raise UserError(reason)
    assert "\n" not in reason


def test_other_errors_are_not_explained():
    for error in (
        RuntimeError("bad luck"),
        OSError(errno.EIO, "I/O"),
        ImportError(name="mxresnet"),
    ):
        assert explain(error) is None
