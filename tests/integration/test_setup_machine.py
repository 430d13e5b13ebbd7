# SPDX-License-Identifier: Apache-2.0
"""setup_env.sh on machines that are not supported, or that have no suitable Python."""

import os
import shutil
import subprocess
import sys

import pytest
from support.commands import ROOT
from support.scripts import copy_setup_env

# python3 of a version that MXNet has no packages for. It can create environments with pip.
NEW_PYTHON = """#!/bin/sh
case "$*" in
    *"import ctypes"*) echo "no 3.13" ;;
    *find_spec*) exit 1 ;;  # neither MXNet nor Horovod
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    *"pip "*" install "*)
        echo "$*" >>"$CALLS"
        eval "${PIP:-}"
        cp "$(dirname "$CALLS")/uv" "$(dirname "$0")/uv"
        ;;
    *process_guard.py*) exec REAL_PYTHON "$@" ;;
esac
""".replace("REAL_PYTHON", sys.executable)
# uv: installs a Python that fails, so that nothing more is installed.
UV = """#!/bin/sh
env | grep ^UV_ >>"$CALLS"
eval "${UV:-}"
[ "$*" = "python install 3.11" ] || exit 9
mkdir -p "$UV_CACHE_DIR" "$UV_PYTHON_INSTALL_DIR/cpython-3.11.9-linux-x86_64-gnu/bin"
cp "$(dirname "$CALLS")/python3.11" "$UV_PYTHON_INSTALL_DIR/cpython-3.11.9-linux-x86_64-gnu/bin"
"""
STANDALONE = """#!/bin/sh
case "$*" in
    *"import ctypes"*) echo yes ;;
    "-m venv "*) echo "venv from $0" >>"$CALLS"; exit 1 ;;
    --version) echo Python 3.11.9 ;;
    *process_guard.py*) exec REAL_PYTHON "$@" ;;
esac
""".replace("REAL_PYTHON", sys.executable)
COMMANDS = "bash cat cp cut dirname env flock getconf grep head ldd mkdir mktemp readlink rm sed sh"
COMMANDS += " sha256sum sleep sort tail uname"


def write_script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Machine:
    """A checkout on a machine whose commands are in the folder `bin`; it has no Python."""

    def __init__(self, folder):
        self.checkout = folder / "checkout"
        self.bin = folder / "bin"
        self.calls = folder / "calls"
        copy_setup_env(self.checkout)
        shutil.copytree(ROOT / "requirements", self.checkout / "requirements")
        self.bin.mkdir(parents=True)
        for name in COMMANDS.split():
            (self.bin / name).symlink_to(shutil.which(name))
        self.add("c++", "#!/bin/sh\n")
        write_script(folder / "uv", UV)
        write_script(folder / "python3.11", STANDALONE)

    def add(self, name, text):
        """Add a command, or replace it."""
        write_script(self.bin / name, text)

    def run(self, *arguments, **environ):
        """Run setup_env.sh; return its standard error after a failure without other output."""
        self.calls.write_text("")
        done = subprocess.run(
            ["./setup_env.sh", *arguments],
            cwd=self.checkout,
            env={"PATH": str(self.bin), "CALLS": str(self.calls), **environ},
            text=True,
            capture_output=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (1, "")
        return done.stderr

    def run_to_one_line(self, *arguments, **environ):
        message = self.run(*arguments, **environ)
        assert message.count("\n") == 1, message
        assert message.startswith("setup_env.sh: ")
        return message


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def write_uname(machine, system, cpu):
    machine.add("uname", f'#!/bin/sh\ncase "$1" in -s) echo {system} ;; -m) echo {cpu} ;; esac\n')


@pytest.mark.parametrize(
    "system, cpu, named, advice",
    [
        ("Linux", "aarch64", "aarch64", "Dockerfile.cpu"),
        ("Linux", "ppc64le", "ppc64le", "Dockerfile.cpu"),
        ("Linux", "i686", "i686", "x86-64"),
        ("Darwin", "arm64", "Darwin", "Dockerfile.cpu"),
        ("FreeBSD", "amd64", "FreeBSD", "Linux"),
        ("MINGW64_NT-10.0-22631", "x86_64", "Windows", "WSL 2"),
        ("CYGWIN_NT-10.0", "x86_64", "Windows", "WSL 2"),
    ],
)
def test_another_system_is_refused(machine, system, cpu, named, advice):
    write_uname(machine, system, cpu)
    message = machine.run_to_one_line()
    assert named in message and advice in message
    assert not (machine.checkout / ".venv").exists()


def test_another_system_is_refused_before_its_python_runs(machine):
    """The launchers use functions of Python that exist on Linux only."""
    write_uname(machine, "Darwin", "arm64")
    assert "this machine runs Darwin" in machine.run_to_one_line("--launcher-python")


def test_musl_is_refused(machine):
    machine.add("getconf", "#!/bin/sh\nexit 1\n")
    machine.add("ldd", "#!/bin/sh\necho 'musl libc (x86_64)' >&2; exit 1\n")
    message = machine.run_to_one_line()
    assert "musl" in message and "Debian, Ubuntu or RHEL" in message


def test_an_unknown_c_library_is_not_refused(machine):
    machine.add("getconf", "#!/bin/sh\nexit 1\n")
    machine.add("ldd", "#!/bin/sh\nexit 1\n")
    assert "is needed, and this machine has none" in machine.run_to_one_line()


@pytest.mark.parametrize("version, accepted", [("2.17", False), ("2.28", True), ("2.100", True)])
def test_the_c_library_must_be_new_enough(machine, version, accepted):
    machine.add("getconf", f'#!/bin/sh\n[ "$1" = LONG_BIT ] && echo 64 || echo glibc {version}\n')
    message = machine.run_to_one_line()
    assert (f"glibc {version}, and Open MPI's package needs" not in message) == accepted


def test_a_32_bit_system_on_a_64_bit_kernel_is_refused(machine):
    machine.add("getconf", "#!/bin/sh\necho 32\n")
    assert "32-bit" in machine.run_to_one_line()


@pytest.mark.parametrize(
    "manager, advice", [("apt-get", "apt-get install g++"), ("dnf", "dnf install gcc-c++")]
)
def test_a_missing_compiler_is_named_with_its_package(machine, manager, advice):
    (machine.bin / "c++").unlink()
    machine.add(manager, "#!/bin/sh\n")
    assert advice in machine.run_to_one_line()


def test_a_path_with_a_space_is_refused_at_once(tmp_path):
    """CMake's search for MPI splits the output of mpicxx at spaces."""
    machine = Machine(tmp_path / "my dir")
    assert f"the path {machine.checkout} contains a space" in machine.run_to_one_line()
    assert not (machine.checkout / ".venv").exists()


def test_a_machine_without_python_and_uv_is_told_three_ways(machine):
    message = machine.run_to_one_line()
    assert "Python 3.9, 3.10, 3.11 or 3.12 is needed, and this machine has none" in message
    assert "apt-get install python3 python3-venv" in message
    assert "UV_PYTHON_INSTALL_MIRROR" in message and "Dockerfile.cpu" in message
    assert not (machine.checkout / ".venv").exists()


@pytest.mark.parametrize(
    "answer", ["3.13", "3.12 without its module ensurepip", "3.10 (pypy, 64 bits)", "2.7"]
)
def test_why_a_python_is_not_used_is_said(machine, answer):
    script = f"#!/bin/sh\ncase $2 in *'import ctypes'*) echo 'no {answer}' ;; esac\nexit 1\n"
    machine.add("python3", script)
    message = machine.run_to_one_line()
    assert f"and this machine has {answer}, nor uv" in message
    assert ("apt-get install python3-venv)" in message) == ("ensurepip" in answer)


def examine(python, *options):
    script = f'log() {{ :; }}; here=/ venv=/; source "$1"; examine_python {python}'
    path = ROOT / "mxresnet" / "launch" / "setup_machine.sh"
    done = subprocess.run(["bash", "-ec", script, "-", path], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_pythons_are_examined(tmp_path):
    assert examine(sys.executable) == "yes"
    assert examine("/nonexistent/python3") == ""
    write_script(
        tmp_path / "bare",
        f'#!/bin/sh\nshift\nexec {sys.executable} -c "ERASE\n$1"\n'.replace(
            "ERASE", "import sys; sys.modules['ensurepip'] = None"
        ),
    )
    version = "{}.{}".format(*sys.version_info[:2])
    assert examine(tmp_path / "bare") == f"no {version} without its module ensurepip"


@pytest.mark.parametrize("with_python", [True, False])
def test_uv_on_path_downloads_a_python(machine, with_python):
    shutil.copy(machine.calls.with_name("uv"), machine.bin)
    if with_python:
        machine.add("python3", NEW_PYTHON)
    message = machine.run(UV_PYTHON_INSTALL_DIR="/outside", UV_CACHE_DIR="/outside")
    has = "3.13" if with_python else "none"
    assert f"Python 3.9, 3.10, 3.11 or 3.12 is needed, and this machine has {has}: uv" in message
    assert message.index("30 MB from https://github.com/") < message.index("[1/4] Python 3.11")
    folder = machine.checkout / ".venv" / "python"
    calls = machine.calls.read_text()
    assert f"venv from {folder}/cpython-3.11.9-linux-x86_64-gnu/bin/python3.11" in calls
    assert f"UV_PYTHON_INSTALL_DIR={folder}\n" in calls
    assert f"UV_CACHE_DIR={machine.checkout}/.venv/uv-cache\n" in calls
    assert "/outside" not in calls
    assert not (machine.checkout / ".venv" / "uv-cache").exists()
    # The second call uses what the first one downloaded.
    assert "uv " not in machine.run()
    assert "UV_" not in machine.calls.read_text()


def test_uv_from_the_package_index_downloads_a_python(machine):
    machine.add("python3", NEW_PYTHON)
    message = machine.run(UV_PYTHON_INSTALL_MIRROR="file:///mirror")
    assert "30 MB from file:///mirror)" in message
    calls = machine.calls.read_text()
    assert "--require-hashes" in calls and "requirements/uv.txt" in calls
    assert "venv from" in calls
    assert not (machine.checkout / ".venv" / "uv").exists()


@pytest.mark.parametrize("failing, text", [("UV", "  cause: dns error"), ("PIP", "no such host")])
def test_a_failed_download_of_a_python_names_three_ways(machine, failing, text):
    machine.add("python3", NEW_PYTHON)
    *_, message = machine.run(**{failing: f"echo '{text}' >&2; exit 1"}).splitlines()
    assert f"uv could not download Python 3.11 ({text.replace('  cause: ', '')};" in message
    assert "apt-get install" in message and "UV_PYTHON_INSTALL_MIRROR" in message
    assert "Dockerfile.cpu" in message and ".venv/fetch_python.log" in message
    assert "venv from" in (machine.run(), machine.calls.read_text())[1]


def test_launchers_get_a_downloaded_python_only_if_there_is_no_other(machine):
    shutil.copy(machine.calls.with_name("uv"), machine.bin)
    done = subprocess.run(
        ["./setup_env.sh", "--launcher-python"],
        cwd=machine.checkout,
        env={"PATH": str(machine.bin), "CALLS": str(machine.calls)},
        text=True,
        capture_output=True,
    )
    python = machine.checkout / ".venv/python/cpython-3.11.9-linux-x86_64-gnu/bin/python3.11"
    assert (done.returncode, done.stdout) == (0, f"{python}\n"), done.stderr
    assert "uv downloads" in done.stderr


def explain(tmp_path, text, **environ):
    (tmp_path / "log").write_text(text)
    path = ROOT / "mxresnet" / "launch" / "setup_machine.sh"
    script = f'here=/ venv=/; source "$1"; explain_failure {tmp_path}/log'
    done = subprocess.run(
        ["bash", "-ec", script, "-", path],
        env={"PATH": os.environ["PATH"], **environ},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


NO_FILE = "ERROR: No matching distribution found for numpy==1.23.5\n"


@pytest.mark.parametrize(
    "text, environ, advice",
    [
        ("SSLError(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify", {}, "SSL_CERT_FILE"),
        ("  cause: invalid peer certificate: UnknownIssuer", {}, "SSL_CERT_FILE"),
        ("OSError: [Errno 28] No space left on device", {}, "the disk is full"),
        (
            f"ERROR: ... satisfies numpy==1.23.5 (from versions: none)\n{NO_FILE}",
            {},
            "PIP_INDEX_URL",
        ),
        ("urllib3.exceptions.ReadTimeoutError: HTTPSConnectionPool", {}, "PIP_INDEX_URL"),
        (NO_FILE, {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/w"}, "/w has no file of numpy==1.23.5"),
        (NO_FILE, {}, ""),
        ("error: command 'c++' failed", {}, ""),
    ],
)
def test_the_cause_of_a_failed_installation(tmp_path, text, environ, advice):
    cause = explain(tmp_path, text, **environ)
    assert advice in cause
    assert cause.count("\n") == bool(advice)
