# SPDX-License-Identifier: Apache-2.0
"""launch.kubernetes: the host file, mpirun's options, and workers that do not answer."""

import os
import socket
import threading
import time

import pytest

from mxresnet.errors import UserError
from mxresnet.launch import kubernetes

HOSTS = """# written by the operator
job-worker-0.job.default.svc slots=4

   # indented
job-worker-1.job.default.svc max_slots=9 slots=2
job-worker-2
"""


def test_host_file(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text(HOSTS)
    workers = kubernetes.read_host_file({}, path)
    assert [worker.slots for worker in workers] == [4, 2, 1]
    assert workers[1].host == "job-worker-1.job.default.svc"
    default = kubernetes.read_host_file({"OMPI_MCA_orte_set_default_slots": "8"}, path)
    assert [worker.slots for worker in default] == [4, 2, 8]
    path.write_text("host slots=many\n")
    with pytest.raises(UserError, match="slots=many"):
        kubernetes.read_host_file({}, path)


def test_a_launcher_is_recognized(tmp_path):
    there, absent = tmp_path / "hostfile", tmp_path / "absent"
    there.touch()
    for environ, path, expected in [
        ({"K_MPI_JOB_ROLE": "launcher"}, absent, True),
        ({"K_MPI_JOB_ROLE": "worker"}, there, False),
        ({"K_MPI_JOB_ROLE": ""}, there, True),
        ({}, there, True),
        ({}, absent, False),
    ]:
        assert kubernetes.is_launcher(environ, path) == expected


@pytest.mark.parametrize(
    "version, accepted",
    [
        ("mpirun (Open MPI) 4.1.4", True),
        ("mpirun (Open MPI) 5.0.11", False),
        ("HYDRA build details:", False),
        ("", False),
    ],
)
def test_only_open_mpi_4_is_accepted(tmp_path, version, accepted):
    mpirun = tmp_path / "mpirun"
    mpirun.write_text(f"#!/bin/sh\necho '{version}'\n")
    mpirun.chmod(0o755)
    if accepted:
        kubernetes.check_mpirun(str(mpirun), os.environ)
    else:
        with pytest.raises(UserError, match="needs Open MPI 4.1") as refused:
            kubernetes.check_mpirun(str(mpirun), os.environ)
        assert (version or "not Open MPI") in str(refused.value)


def test_options_of_mpirun():
    environ = {"LR": "4", "PATH": "/bin", "TOKEN": "x", "OMPI_MCA_plm_rsh_args": "-o A=1"}
    options = kubernetes.mpirun_options(16, "/work", "eth0", {**environ, "STARTED_BY": "launcher"})
    text = " ".join(options)
    assert text.startswith(
        "-np 16 --hostfile /etc/mpi/hostfile --map-by slot --bind-to none --wdir /work --mca "
    )
    assert "--mca orte_launch_agent setpriv --pdeathsig TERM orted " in text
    assert "--mca plm_rsh_args -o ConnectionAttempts=3 -o ConnectTimeout=4 -o A=1 " in text
    assert "--mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0 " in text
    assert text.endswith(" -x LR -x PATH -x STARTED_BY")
    assert "tcp_if_include" not in " ".join(kubernetes.mpirun_options(1, "/work", None, environ))


@pytest.fixture
def listen():
    """Return listen(banner) -> port of a server that sends this banner; None: it sends none."""
    servers = []

    def start(banner):
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)
        if banner is not None:

            def serve():
                connection, _ = server.accept()
                with connection:
                    connection.sendall(banner)

            threading.Thread(target=serve, daemon=True).start()
        return server.getsockname()[1]

    yield start
    for server in servers:
        server.close()


def test_only_a_server_with_an_ssh_banner_counts_as_sshd(listen):
    assert kubernetes._sshd_answers("127.0.0.1", listen(b"SSH-2.0-OpenSSH\r\n"))
    assert not kubernetes._sshd_answers("127.0.0.1", listen(b"HTTP/1.0 400\r\n"))
    assert not kubernetes._sshd_answers("127.0.0.1", listen(b""))
    started = time.monotonic()
    assert not kubernetes._sshd_answers("127.0.0.1", listen(None))  # as of a stopped sshd
    assert time.monotonic() - started < 30


def test_an_unknown_worker_is_waited_for_and_then_named(capfd):
    workers = [kubernetes.Worker("job-worker-0.invalid", 1)]
    environ = {**os.environ, "LAUNCH_WAIT": "1", "OMPI_MCA_plm_rsh_agent": ""}
    environ["PATH"] = f"{environ['PATH']}:/usr/bin"
    if not kubernetes.find_program("ssh", environ):
        pytest.skip("ssh is not installed")
    reason = (
        r"cannot be reached after 1 s: the name is not known \(kubectl describe pod job-worker-0;"
    )
    with pytest.raises(UserError, match=reason):
        kubernetes.wait_for_workers(workers, environ)
    assert capfd.readouterr().err == "waiting for job-worker-0.invalid: the name is not known\n"
    # With kubectl exec the operator has waited for the workers.
    kubernetes.wait_for_workers(
        workers, {**environ, "OMPI_MCA_plm_rsh_agent": "/etc/mpi/kubexec.sh"}
    )
    with pytest.raises(UserError, match="LAUNCH_WAIT=soon"):
        kubernetes.wait_for_workers(workers, {**environ, "LAUNCH_WAIT": "soon"})


def test_no_ssh_is_reported():
    with pytest.raises(UserError, match="openssh-client"):
        kubernetes.wait_for_workers([], {"PATH": "/nowhere"})
