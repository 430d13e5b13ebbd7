# SPDX-License-Identifier: Apache-2.0
"""setup_env.sh with the real pip: hashes, a folder of packages, certificates, no network."""

import functools
import hashlib
import http.server
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import zipfile

import pytest
from support.scripts import copy_setup_env


def write_wheel(folder, content):
    """Write the wheel of a package `demo` with one module; return its SHA-256."""
    path = folder / "demo-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("demo.py", content)
        wheel.writestr(
            "demo-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n"
        )
        wheel.writestr(
            "demo-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr("demo-1.0.dist-info/RECORD", "demo.py,,\n")
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The python that this one's environment was made from: it has venv and no packages.
PYTHON = os.path.realpath(sys.executable)


@pytest.fixture(scope="module")
def new_environment(tmp_path_factory):
    """A new environment, as setup_env.sh makes it before it installs packages."""
    folder = tmp_path_factory.mktemp("environment") / ".venv"
    subprocess.run([PYTHON, "-m", "venv", folder], check=True)
    return folder


@pytest.fixture
def checkout(new_environment, tmp_path):
    """A copy of setup_env.sh that needs one package, which is in the folder `wheels`.

    With a new environment: setup_env.sh makes it again, in half of the time.
    """
    folder = tmp_path / "checkout"
    shutil.copytree(new_environment, folder / ".venv", symlinks=True)
    (folder / "wheels").mkdir(parents=True)
    (folder / "requirements").mkdir()
    copy_setup_env(folder)
    digest = write_wheel(folder / "wheels", "GOOD = True\n")
    (folder / "requirements" / "build.txt").write_text(f"demo==1.0 --hash=sha256:{digest}\n")
    return folder


def run_setup(checkout, **environ):
    """Run setup_env.sh without a package index; return its standard error."""
    environ = {
        "PATH": f"{os.path.dirname(PYTHON)}:/usr/bin:/bin",
        "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_FIND_LINKS": str(checkout / "wheels"),
        **environ,
    }
    done = subprocess.run(
        ["./setup_env.sh"], cwd=checkout, env=environ, text=True, capture_output=True, timeout=120
    )
    assert done.returncode == 1  # there are no other packages
    return done.stderr


def installed(checkout):
    return list(checkout.glob(".venv/lib/*/site-packages/demo.py"))


def uninstall(checkout):
    python = checkout / ".venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "demo"], check=True)
    assert not installed(checkout)


def test_a_package_that_was_tampered_with_is_not_installed(checkout):
    wheel = checkout / "wheels" / "demo-1.0-py3-none-any.whl"
    good = wheel.read_bytes()
    write_wheel(checkout / "wheels", "GOOD = False\n")
    messages = run_setup(checkout)
    assert "install_build_requirements.log" in messages
    assert "DO NOT MATCH THE HASHES" in messages
    assert not installed(checkout)
    wheel.write_bytes(good)
    assert "install_build_requirements.log" not in run_setup(checkout)
    assert installed(checkout)


def failure(checkout, **environ):
    """Return the message of the first step, which must be one line."""
    *progress, message = run_setup(checkout, **environ).splitlines()
    assert all(re.match(r"Making |\[1/3\] ", line) for line in progress), progress
    assert message.startswith("setup_env.sh: step 'MXNet, Open MPI and build tools' failed: ")
    assert not installed(checkout)
    return message


def test_a_package_that_the_folder_lacks_is_named(checkout):
    (checkout / "wheels" / "demo-1.0-py3-none-any.whl").unlink()
    message = failure(checkout)
    assert f"PIP_FIND_LINKS={checkout}/wheels has no file of demo==1.0" in message
    assert "docs/setup.md" in message


def index(address, **environ):
    """Return the variables for a package index, which is asked once."""
    variables = {"PIP_INDEX_URL": address, "PIP_NO_INDEX": "0", "PIP_FIND_LINKS": ""}
    return {**variables, "PIP_RETRIES": "0", "NO_PROXY": "*", **environ}


def test_a_package_index_that_cannot_be_reached_is_named(checkout):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        message = failure(checkout, **index(f"http://127.0.0.1:{closed.getsockname()[1]}/"))
    assert "cannot be reached" in message and "PIP_INDEX_URL" in message


@pytest.fixture
def tls_index(checkout, tmp_path):
    """A package index on https with a certificate of its own: address, file of the certificate."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=DNS:localhost", "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    packages = tmp_path / "index" / "demo"
    packages.mkdir(parents=True)
    shutil.move(checkout / "wheels" / "demo-1.0-py3-none-any.whl", packages)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "index")
    with http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"https://localhost:{server.server_port}/", str(certificate)
        server.shutdown()


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_a_certificate_of_ones_own_is_used_and_its_lack_is_named(checkout, tls_index):
    address, certificate = tls_index
    assert "SSL_CERT_FILE" in failure(checkout, **index(address))
    for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):  # pip by itself reads the second one
        run_setup(checkout, **index(address, **{name: certificate}))
        assert installed(checkout), name
        uninstall(checkout)
    pip_conf = checkout / "pip.conf"
    pip_conf.write_text(f"[global]\ncert = {certificate}\n")
    run_setup(checkout, **index(address, PIP_CONFIG_FILE=str(pip_conf)))
    assert installed(checkout), "pip.conf"
    shutil.rmtree(checkout / ".venv")
    missing = failure(checkout, **index(address, SSL_CERT_FILE=f"{certificate}.old"))
    assert f"{certificate}.old" in missing


def test_the_callers_pip_and_python_settings_do_not_redirect_packages(checkout, tmp_path):
    elsewhere = str(tmp_path / "elsewhere")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "pip.py").write_text("raise SystemExit('not pip')")
    run_setup(
        checkout,
        PIP_TARGET=elsewhere,
        PIP_PREFIX=elsewhere,
        PIP_USER="1",
        PYTHONPATH=str(tmp_path / "path"),
    )
    assert installed(checkout)
    assert not os.path.exists(elsewhere)
