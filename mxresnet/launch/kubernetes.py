# SPDX-License-Identifier: Apache-2.0
"""The launcher of an MPIJob: starts ./run_and_time.sh on the workers, once for each rank.

Two operators run MPIJobs: with mpi-operator (kubeflow.org/v2beta1) the launcher connects to workers
through ssh, with training-operator (v1) through kubectl exec. Both write the host file. Variables:

    DGXSYSTEM       configuration; its number of ranks must be that of the host file
    LAUNCH_WAIT     seconds to wait for the names and the sshd of the workers (300)
    MPI_INTERFACE   network interface between the pods (default: that of the default route)
"""

from __future__ import annotations

import os
import pathlib
import re
import socket
import time
from dataclasses import dataclass
from typing import List, Mapping, Optional, Sequence

from mxresnet.errors import UserError
from mxresnet.launch import mpi, system_config
from mxresnet.launch.processes import capture_output, find_program
from mxresnet.launch.terminal import print_to_stderr

HOST_FILE = pathlib.Path("/etc/mpi/hostfile")
SSH_PORT = 22
PROBE_SECONDS = 2.0
REPORT_SECONDS = 30.0
DEFAULT_WAIT_SECONDS = "300"


@dataclass(frozen=True)
class Worker:
    """One line of the host file."""

    host: str
    slots: int


def is_launcher(environ: Mapping[str, str], host_file: pathlib.Path = HOST_FILE) -> bool:
    """Return whether this process runs in the launcher of an MPIJob."""
    role = environ.get("K_MPI_JOB_ROLE")
    return role == "launcher" if role else host_file.is_file()


def read_host_file(environ: Mapping[str, str], host_file: pathlib.Path = HOST_FILE) -> List[Worker]:
    """Return the workers in a host file of Open MPI.

    Args:
        environ: Its OMPI_MCA_orte_set_default_slots applies to lines without "slots=".
        host_file: Path of the file.

    Raises:
        UserError: A line has a wrong number of slots.
    """
    default = environ.get("OMPI_MCA_orte_set_default_slots") or "1"
    workers = []
    for line in host_file.read_text().splitlines():
        words = line.split()
        if words and not words[0].startswith("#"):
            slots = [word[len("slots=") :] for word in words[1:] if word.startswith("slots=")]
            count = [default, *slots][-1]
            if not count.isdecimal():
                raise UserError(f"{host_file}: {line!r} has no whole number of slots")
            workers.append(Worker(words[0], int(count)))
    return workers


def run_job(python: str, flags: Sequence[str], environ: Mapping[str, str]) -> mpi.MpirunResult:
    """Start ./run_and_time.sh on the workers, once for each rank, and wait for the end.

    Args:
        python: Python of the environment; its folder has mpirun.
        flags: Flags of run_and_time.sh.
        environ: Environment of this pod.

    Raises:
        UserError: The host file or mpirun is unsuitable, the numbers of ranks differ, or a worker
            cannot be reached.
    """
    if not HOST_FILE.is_file():
        raise UserError(
            f"this is an MPIJob's launcher without {HOST_FILE}: "
            "the operator writes it into the first container only"
        )
    workers = read_host_file(environ)
    ranks = sum(worker.slots for worker in workers)
    _check_number_of_ranks(ranks, environ)
    mpirun = mpi.find_mpirun(python, environ)
    check_mpirun(mpirun, environ)
    wait_for_workers(workers, environ)
    interface = _interface(environ)
    env = {
        **environ,
        "EXPECTED_RANKS": str(ranks),
        "STARTED_BY": "launcher",
        "PATH": f"{os.path.dirname(python)}:{environ.get('PATH', os.defpath)}",
    }
    if interface:
        env["NCCL_SOCKET_IFNAME"] = environ.get("NCCL_SOCKET_IFNAME") or interface
    print_to_stderr(f"starting {ranks} ranks on {len(workers)} workers")
    folder = _working_folder(environ)
    command = [*mpirun_options(ranks, folder, interface, env), f"{folder}/run_and_time.sh", *flags]
    return mpi.start_ranks(mpirun, command, env)


def mpirun_options(
    ranks: int, folder: str, interface: Optional[str], environ: Mapping[str, str]
) -> List[str]:
    """Return the options of mpirun that start ranks on the workers of the host file.

    Args:
        ranks: Number of ranks.
        folder: Working folder of the ranks.
        interface: Network interface between the pods. None: mpirun chooses.
        environ: Environment of mpirun.
    """
    options = ["-np", str(ranks), "--hostfile", str(HOST_FILE), "--map-by", "slot"]
    options += ["--bind-to", "none", "--wdir", folder]
    ssh_options = environ.get("OMPI_MCA_plm_rsh_args", "")
    parameters = {
        "orte_launch_agent": "setpriv --pdeathsig TERM orted",
        # If a worker stops answering after wait_for_workers, mpirun fails in seconds, not minutes.
        "plm_rsh_args": f"-o ConnectionAttempts=3 -o ConnectTimeout=4 {ssh_options}",
        # The default seccomp profile of some container runtimes refuses the system call that it
        # would use.
        "btl_vader_single_copy_mechanism": "none",
        # Keepalives detect a cut link after 8 + 3 x 2 seconds instead of 8 minutes. They are not
        # sent while data is in transit: then ssh detects it, and orted ends with the ssh session.
        "oob_tcp_keepalive_time": "8",
        "oob_tcp_keepalive_intvl": "2",
        "oob_tcp_keepalive_probes": "3",
    }
    if interface:
        parameters.update(btl_tcp_if_include=interface, oob_tcp_if_include=interface)
    for name, value in parameters.items():
        options += ["--mca", name, value]
    return [*options, *mpirun_env_args(environ)]


def mpirun_env_args(environ: Mapping[str, str]) -> List[str]:
    """Return -x NAME for every variable that a rank reads. Workers get no others of this pod."""
    also = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "STARTED_BY")
    names = system_config.forwarded_env(environ, also)
    return [word for name in names for word in ("-x", name)]


def check_mpirun(mpirun: str, environ: Mapping[str, str]) -> None:
    """Raise UserError unless this is Open MPI 4.

    Open MPI 5 does not read the OMPI_MCA_* variables of the operators: it would run every rank in
    the launcher.
    """
    done = capture_output([mpirun, "--version"], environ)
    version = done.stdout.partition("\n")[0]
    if "(Open MPI) 4." not in version:
        raise UserError(
            f"{mpirun} is '{version or 'not Open MPI'}': "
            "the operator's host file needs Open MPI 4.1"
        )


def wait_for_workers(workers: Sequence[Worker], environ: Mapping[str, str]) -> None:
    """Wait until the sshd of every worker answers.

    An operator may start the launcher before the workers' names can be resolved and before their
    sshd runs, and mpirun does not retry.

    Raises:
        UserError: A worker did not answer within LAUNCH_WAIT seconds.
    """
    if environ.get("OMPI_MCA_plm_rsh_agent"):
        return  # kubectl exec instead of ssh: training-operator has waited for the workers.
    if find_program("ssh", environ) is None:
        raise UserError("there is no ssh here: the image needs openssh-client")
    limit = environ.get("LAUNCH_WAIT") or DEFAULT_WAIT_SECONDS
    if not limit.isdecimal():
        raise UserError(f"LAUNCH_WAIT={limit} is not a whole number of seconds")
    started = time.monotonic()
    last_report = -REPORT_SECONDS
    for worker in workers:
        while True:
            reason = unreachable_reason(worker.host, environ)
            if reason is None:
                break
            waited = time.monotonic() - started
            if waited >= int(limit):
                raise UserError(
                    f"{worker.host} cannot be reached after {limit} s: {reason} (kubectl describe "
                    f"pod {worker.host.partition('.')[0]}; LAUNCH_WAIT sets the time limit)"
                )
            if waited - last_report >= REPORT_SECONDS:
                last_report = waited
                print_to_stderr(f"waiting for {worker.host}: {reason}")
            time.sleep(1)


def unreachable_workers(environ: Mapping[str, str]) -> str:
    """Return which workers do not answer and why: "host: reason; " for each."""
    if not HOST_FILE.is_file():
        return ""
    reasons = {
        worker.host: unreachable_reason(worker.host, environ) for worker in read_host_file(environ)
    }
    return "".join(f"{host}: {reason}; " for host, reason in reasons.items() if reason)


def unreachable_reason(host: str, environ: Mapping[str, str]) -> Optional[str]:
    """Return why the sshd of a host cannot be reached, or None if it answers."""
    # Not socket.getaddrinfo: a signal cannot interrupt it.
    if _run(["getent", "hosts", host], environ) is None:
        return "the name is not known"
    settings = _run(["ssh", "-G", host], environ) or ""
    found = re.search(r"^port (\d+)$", settings, re.MULTILINE)
    port = int(found[1]) if found else SSH_PORT
    return None if _sshd_answers(host, port) else f"nothing answers on port {port}"


def _run(command: Sequence[str], environ: Mapping[str, str]) -> Optional[str]:
    """Return what a command prints, or None if it fails."""
    done = capture_output(command, environ)
    return done.stdout if done.returncode == 0 else None


def _sshd_answers(host: str, port: int) -> bool:
    """Return whether an sshd sends its banner.

    An open port is not enough: the kernel accepts connections even for a stopped process.
    """
    end = time.monotonic() + PROBE_SECONDS
    banner = b""
    try:
        with socket.create_connection((host, port), timeout=PROBE_SECONDS) as connection:
            while len(banner) < len(b"SSH-"):
                connection.settimeout(max(0.01, end - time.monotonic()))
                received = connection.recv(4)
                if not received:
                    return False
                banner += received
    except OSError:
        return False
    return banner.startswith(b"SSH-")


def _check_number_of_ranks(ranks: int, environ: Mapping[str, str]) -> None:
    system = environ["DGXSYSTEM"]
    expected = system_config.number_of_ranks(system_config.load_configuration(system, environ))
    if ranks != expected:
        raise UserError(
            f"{HOST_FILE} has room for {ranks} ranks (replicas x slotsPerWorker) and "
            f"DGXSYSTEM={system} is for {expected} (DGXNNODES x DGXNGPU): make them the same"
        )


def _interface(environ: Mapping[str, str]) -> Optional[str]:
    """Return the network interface between the pods: that of the default route.

    A pod may have other interfaces, such as docker0, on which the pods do not reach each other.
    """
    if environ.get("MPI_INTERFACE"):
        return environ["MPI_INTERFACE"]
    for line in pathlib.Path("/proc/net/route").read_text().splitlines():
        words = line.split()
        if len(words) > 1 and words[1] == "00000000":
            return words[0]
    return None


def _working_folder(environ: Mapping[str, str]) -> str:
    """Return the current folder as the caller named it (PWD): workers have the same path."""
    folder = environ.get("PWD", "")
    return folder if folder and os.path.samefile(folder, os.curdir) else os.getcwd()
