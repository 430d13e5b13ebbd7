# SPDX-License-Identifier: Apache-2.0
"""Test the commands without a usable output, memory, storage or locale: the status stays true."""

import errno
import os
import shutil
import signal
import subprocess
import sys

import pytest
from support.image_fixtures import (
    CLASSES,
    REPOSITORY,
    read_files,
    run_im2rec,
    run_prepare,
    run_program,
    small_dataset,
    write_devkit,
    write_files,
)
from support.locales import ASCII_ENVIRONMENT, latin1_environment

from prepare.storage_errors import describe

VERIFY = "prepare.verify out"
CONVERT = "prepare.imagenet in new"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder with a source in in/ and its records in out/."""
    folder = tmp_path_factory.mktemp("converted")
    write_files(folder / "in", small_dataset())
    assert run_prepare(folder / "in", folder / "out").returncode == 0
    return folder


def run_line(folder, command, redirections, limit=""):
    """Run a command of this package in a shell, in `folder`; return its status and output."""
    line = f"{limit} {sys.executable} -m {command} {redirections}"
    if redirections.endswith("true"):
        line = f"set -o pipefail; {line}"
    return subprocess.run(
        ["bash", "-c", line],
        cwd=folder,
        capture_output=True,
        text=True,
        env=dict(os.environ, PYTHONPATH=REPOSITORY),
    )


@pytest.mark.parametrize("command", [VERIFY, CONVERT])
@pytest.mark.parametrize(
    "redirections,reason",
    [
        ("2>&-", None),
        ("<&- >&- 2>&-", None),
        (">/dev/full", "No space left on device"),
        ("| true", "Broken pipe"),
        (">/dev/full 2>/dev/full", None),
    ],
)
def test_output_that_cannot_be_written(tmp_path, converted, command, redirections, reason):
    for name in ("in", "out"):
        os.symlink(converted / name, tmp_path / name)
    result = run_line(tmp_path, command, redirections)
    assert result.returncode == 0, result.stderr
    if reason is None:
        assert result.stderr == ""
    elif result.stderr or reason != "Broken pipe":  # `true` may end after the last line
        assert f"standard output: {reason}" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    if command == CONVERT:
        assert read_files(tmp_path / "new") == read_files(converted / "out")


def test_the_digits_without_output(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("cv2")
    assert run_line(tmp_path, "prepare.digits new", "2>&- >/dev/full").returncode == 0
    assert len(os.listdir(tmp_path / "new" / "train")) == 10


@pytest.mark.parametrize("kilobytes", [60000, 110000])
@pytest.mark.parametrize("command", [VERIFY, "prepare.imagenet in out"])
def test_little_memory_is_no_damage(converted, command, kilobytes):
    result = run_line(converted, command, "", limit=f"ulimit -v {kilobytes};")
    assert result.returncode in (0, 4, 70), result.stderr
    assert len(result.stderr.splitlines()) == (result.returncode != 0)


FAULTY_READ = """
import errno, os, sys
from prepare import verify
NAME = sys.argv.pop(1)
def is_faulty(descriptor):
    return os.readlink(f"/proc/self/fd/{descriptor}").endswith(NAME)
def fail(function):
    def read(stream, *arguments):
        descriptor = stream if isinstance(stream, int) else stream.fileno()
        if is_faulty(descriptor):
            raise ERROR
        return function(stream, *arguments)
    return read
os.pread = fail(os.pread)
class File(io.FileIO):
    readinto = fail(io.FileIO.readinto)
io.FileIO = File
sys.exit(verify.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "error,status,reason",
    [
        ("OSError(errno.EIO, 'Input/output error')", 4, "out/train.rec: Input/output error"),
        ("MemoryError", 4, "not enough memory"),
        ("KeyboardInterrupt", 130, "interrupted"),
        ("""RuntimeError("can't start new thread")""", 4, "not enough memory"),
    ],
)
@pytest.mark.parametrize("options", [[], ["--fast"]])
def test_a_failure_of_verify_is_no_damage(converted, error, status, reason, options):
    program = "import io\n" + FAULTY_READ.replace("ERROR", error)
    result = run_program(program, "train.rec", converted / "out", *options)
    assert result.returncode == status, result.stderr
    assert reason in result.stderr and len(result.stderr.splitlines()) == 1


def test_interrupted_verification(tmp_path, converted):
    """Its standard error is a pipe that it cannot write to before it is interrupted."""
    program = """
import os, signal, sys
from prepare import record_check, verify
original = record_check.check_all_bytes
def interrupt(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    original(*arguments)
record_check.check_all_bytes = interrupt
sys.exit(verify.main(sys.argv[1:]))
"""
    result = run_program(program, converted / "out")
    assert result.returncode == 128 + signal.SIGINT
    assert result.stderr == "prepare.verify: interrupted; run the same command again\n"


@pytest.mark.parametrize("label", ["nan", "-inf", "1e300", ""])
def test_a_label_that_is_no_number_is_named(tmp_path, converted, label):
    shutil.copytree(converted / "out", tmp_path / "out")
    lines = (tmp_path / "out" / "train.lst").read_text().splitlines()
    key, _, path = lines[4].split("\t")
    lines[4] = f"{key}\t{label}\t{path}"
    (tmp_path / "out" / "train.lst").write_text("\n".join(lines) + "\n")
    result = run_prepare(tmp_path / "out", module="prepare.verify")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert f"{tmp_path / 'out' / 'train.lst'}: line 5: " in result.stderr


@pytest.mark.parametrize("locale", ["latin1", "ascii"])
def test_names_do_not_depend_on_the_locale(tmp_path, locale):
    """A list holds the bytes of each name, as im2rec writes them; names are classes of labels."""
    settings = latin1_environment(tmp_path) if locale == "latin1" else ASCII_ENVIRONMENT
    environment = {**os.environ, **settings}
    files = {}
    for path, content in small_dataset(classes=("\u00e9", "\u4e2d"), train=3).items():
        files[path.replace("_", "_\u00fc", 1)] = content
    write_files(tmp_path / "in", files)
    folder = os.fsdecode(os.fsencode(tmp_path) + "/out\u00e9".encode())
    whole = tmp_path / "whole"
    assert run_prepare(tmp_path / "in", whole).returncode == 0
    result = run_prepare(tmp_path / "in", folder, env=environment, encoding="latin-1")
    assert result.returncode == 0, result.stderr
    assert read_files(folder) == read_files(whole)
    for arguments in ([tmp_path / "in", whole], [whole, "--against", tmp_path / "in"]):
        module = "prepare.imagenet" if len(arguments) == 2 else "prepare.verify"
        result = run_prepare(*arguments, module=module, env=environment, encoding="latin-1")
        assert result.returncode == 0, result.stderr
    assert b'"name": "\\u4e2d"' in (tmp_path / "out\u00e9" / "train.json").read_bytes()


@pytest.mark.slow
def test_lists_are_those_of_im2rec_in_a_latin1_locale(tmp_path, monkeypatch):
    pytest.importorskip("mxnet")
    settings = latin1_environment(tmp_path)
    files = {
        path.replace("_", "_\u00fc", 1): content
        for path, content in small_dataset(classes=("\u00e9", "f"), train=3).items()
    }
    write_files(tmp_path / "in", files)
    environment = {**os.environ, **settings}
    assert run_prepare(tmp_path / "in", tmp_path / "out", env=environment).returncode == 0
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    run_im2rec(tmp_path / "in", tmp_path / "reference")
    assert read_files(tmp_path / "out") == read_files(tmp_path / "reference")


@pytest.mark.parametrize(
    "command, module", [("imagenet", "traceback"), ("verify", "numpy"), ("digits", "traceback")]
)
def test_interrupted_while_a_module_is_imported(tmp_path, command, module):
    """As libraries do, the module turns the exception into an ImportError."""
    program = "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\n"
    program += "except KeyboardInterrupt: raise ImportError('not installed')\n"
    (tmp_path / f"{module}.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    result = run_prepare(
        tmp_path, tmp_path / "out", module=f"prepare.{command}", env=environment, cwd=tmp_path
    )
    assert (result.returncode, result.stderr) == (130, "prepare: interrupted; run it again\n")


def test_a_warning_of_a_library_is_no_error(tmp_path, converted):
    """The fake library warns; then it cannot be imported, for which there is a message."""
    warns = b"import warnings\nwarnings.warn('NumPy is too new')\nraise ModuleNotFoundError\n"
    write_files(tmp_path, {"packages/scipy/__init__.py": warns})
    shutil.copytree(converted / "in", tmp_path / "in")
    write_devkit(str(tmp_path / "in" / "ILSVRC2012_devkit_t12.tar.gz"), CLASSES, CLASSES)
    os.rename(
        tmp_path / "in" / "val" / CLASSES[0] / f"{CLASSES[0]}_0.JPEG",
        tmp_path / "in" / "val" / CLASSES[0] / "ILSVRC2012_val_00000001.JPEG",
    )
    path = f"{tmp_path}/packages:{REPOSITORY}"
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "error"}
    result = run_prepare(tmp_path / "in", tmp_path / "out", env=environment)
    assert result.returncode == 1 and "needs scipy: install it" in result.stderr, result.stderr
    assert "Warning" not in result.stderr


def test_limits_that_are_too_low_are_named(tmp_path, converted):
    command = f"prepare.imagenet in {tmp_path}/out"
    result = run_line(converted, command, "", limit="ulimit -f 4;")
    (line,) = result.stderr.splitlines()
    assert result.returncode == 4 and "out/val.part/val.rec: File too large (the limit of" in line
    # No file is at fault where the process has too many of them open.
    error = OSError(errno.EMFILE, "Too many open files")
    assert describe(error, "out") == "Too many open files (the limit of ulimit -n)"
