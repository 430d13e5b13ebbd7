# SPDX-License-Identifier: Apache-2.0
"""A library of cudnn_bn that cannot be used is rejected, and the process continues without it."""

import os
import pathlib
import re
import subprocess
import sys
import time

import mxnet as mx
import numpy as np
import pytest
from support.commands import python
from support.cudnn_bn import copy_package, python_in, unavailable_reasons

from mxresnet.model.cudnn_bn import build, runtime, self_test

# Inserted into the backward pass: a fault that the environment variable INJECTED_FAULT selects.
FAULTS = """
  const char *fault = std::getenv("INJECTED_FAULT") ? std::getenv("INJECTED_FAULT") : "";
  if (!std::strcmp(fault, "crash")) std::abort();
  while (!std::strcmp(fault, "hang")) pause();
  const double zero_if_wrong = std::strcmp(fault, "wrong") ? 1 : 0;
"""
FAULT_INCLUDES = "#include <cmath>\n#include <cstdlib>\n#include <cstring>\n#include <unistd.h>"
UNAVAILABLE_REASON = (
    "import mxnet as mx; from mxresnet.model.cudnn_bn import runtime; "
    "runtime.unavailable_reason(mx.cpu())"
)


def wait_for(condition, timeout_seconds=100):
    end = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
    return condition()


def inject_faults(text):
    text = text.replace("#include <cmath>", FAULT_INCLUDES)
    backward = text.index("int mxresnet_batch_norm_backward")
    body = text.index("{", backward) + 1
    faulty = text[body:].replace("normalized * dgamma", "zero_if_wrong * normalized * dgamma")
    assert faulty != text[body:]
    return text[:body] + FAULTS + faulty


def self_test_processes(parent):
    command = ["pgrep", "-P", str(parent.pid), "-f", "mxresnet.model.cudnn_bn test"]
    return subprocess.run(command, text=True, capture_output=True).stdout.split()


def has_ended(pid):
    stat = pathlib.Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_faulty_library_is_rejected_and_the_process_continues(tmp_path):
    """Wrong numbers, a crash and a hang."""
    path = copy_package(tmp_path) / "csrc" / "batch_norm_cpu.cc"
    path.write_text(inject_faults(path.read_text()))
    python_in(tmp_path, "-m", "mxresnet.model.cudnn_bn", "build", "--cpu")
    crash, hang, wrong, good = unavailable_reasons(tmp_path, "crash", "hang", "wrong", "none")
    assert crash == "its self-test was killed by signal 6"
    assert hang == "its self-test did not end within 6 s"
    assert good == "None"
    expected = r"mxresnet_batch_norm computes data with an error of 0.\d+ \(at most 0.0001\)"
    assert re.fullmatch(expected, wrong)
    # The self-test ends with a rank that is killed while it waits for it.
    rank = subprocess.Popen(
        [sys.executable, "-c", UNAVAILABLE_REASON],
        cwd=tmp_path,
        env={**os.environ, "INJECTED_FAULT": "hang", "PYTHONPATH": str(tmp_path)},
    )
    try:
        pid = wait_for(lambda: self_test_processes(rank))[0]
        wait_for(lambda: "libmxresnet_cpu" in pathlib.Path(f"/proc/{pid}/maps").read_text())
    finally:
        rank.kill()
        rank.wait()
    wait_for(lambda: has_ended(pid))


def test_library_loads_after_horovod(cpu_library):
    """Horovod makes MXNet's symbols visible to later libraries, and names of this one are equal."""
    code = (
        "import mxnet as mx, horovod.mxnet; from mxresnet.model.cudnn_bn import self_test; "
        "self_test.run(mx.cpu()); print('passed')"
    )
    done = python("-c", code)
    assert done.returncode == 0 and done.stdout == "passed\n", done.stdout + done.stderr


def test_self_test_ends_before_mxnet_releases_the_device(cpu_library, tmp_path):
    """MXNet 1.9.1 may crash then: here a library crashes when the process ends normally."""
    source, library = tmp_path / "crash.cc", tmp_path / "libcrash.so"
    source.write_text(
        "#include <csignal>\n__attribute__((destructor)) void crash() { std::raise(SIGSEGV); }\n"
    )
    build.compile_library([source], library, [])
    code = (
        f"import ctypes, runpy, sys; ctypes.CDLL({str(library)!r}); "
        "sys.argv[1:] = ['test', '--cpu']; "
        "runpy.run_module('mxresnet.model.cudnn_bn', run_name='__main__')"
    )
    done = python("-c", code)
    assert (done.returncode, done.stdout) == (0, "all operators agree with MXNet's own\n")


def test_library_that_does_not_match_is_rejected(cpu_library, tmp_path, monkeypatch):
    path = tmp_path / "libmxresnet_cpu.so"
    original = build.BUILD / path.name
    monkeypatch.setattr(build, "library_path", lambda kind: path)
    library, metadata = original.read_bytes(), build.read_build_metadata(original)
    sources = build.source_hash()
    assert metadata == {
        "kind": "cpu",
        "mxnet": mx.__version__,
        "interface": "11",
        "sources": sources,
    }

    def reason(content):
        path.write_bytes(content)
        runtime.unavailable_reason.cache_clear()
        return runtime.unavailable_reason(mx.cpu())

    command = "run python -m mxresnet.model.cudnn_bn build --cpu"
    with pytest.raises(runtime.UnavailableError, match=f"{path.name} is not built: {command}"):
        runtime.check_and_load(mx.cpu())
    assert "was not built by python -m mxresnet.model.cudnn_bn build --cpu" in reason(b"\177ELF")
    assert "was not built by" in reason(library.replace(b'"kind": "cpu"', b'"kind": "gpu"'))
    other_mxnet = library.replace(b'"mxnet": "1.9.1"', b'"mxnet": "1.8.0"')
    assert "was built for MXNet 1.8.0 and this is 1.9.1" in reason(other_mxnet)
    assert "was built from other sources" in reason(library.replace(sources.encode(), b"0" * 16))
    monkeypatch.setenv("MXNET_EXEC_INPLACE_GRAD_SUM_CAP", "2")
    assert reason(library).startswith("MXNET_EXEC_INPLACE_GRAD_SUM_CAP=2 is set: below its default")
    monkeypatch.setenv("MXNET_EXEC_INPLACE_GRAD_SUM_CAP", "8")
    monkeypatch.setenv("MXNET_BACKWARD_DO_MIRROR", "1")
    assert reason(library).startswith("MXNET_BACKWARD_DO_MIRROR=1 is set: forward would run twice")
    monkeypatch.setenv("MXNET_BACKWARD_DO_MIRROR", "0")
    assert reason(library) is None
    runtime.unavailable_reason.cache_clear()


def test_library_that_cannot_be_loaded_is_rejected(cpu_library, tmp_path):
    """A file with correct metadata whose first page is zeroed."""
    path = copy_package(tmp_path) / "csrc" / "build" / "libmxresnet_cpu.so"
    path.parent.mkdir()
    path.write_bytes(b"\0" * 4096 + build.library_path("cpu").read_bytes()[4096:])
    (reason,) = unavailable_reasons(tmp_path, "none")
    expected = "libmxresnet_cpu.so cannot be loaded: .*(invalid ELF header|file too short)"
    assert re.search(expected, reason)


def test_sizes_of_resnet_50_are_tested(cpu_library, monkeypatch):
    self_test.check_resnet50_sizes(mx.cpu(), 2)
    batch_norm = self_test.batch_norm

    def faulty_batch_norm(data, name, channels, **fusion):
        return batch_norm(data, name, channels, **fusion) * (np.nan if channels == 2048 else 1)

    monkeypatch.setattr(self_test, "batch_norm", faulty_batch_norm)
    message = "output is not finite for data of 2 x 7 x 7 x 2048"
    with pytest.raises(runtime.UnavailableError, match=message):
        self_test.check_resnet50_sizes(mx.cpu(), 2)
    assert runtime.unavailable_reason(mx.cpu(), 1) is None
