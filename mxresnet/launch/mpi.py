# SPDX-License-Identifier: Apache-2.0
"""Start ranks with Open MPI's mpirun, kill an mpirun that hangs, and explain why ranks ended."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import tempfile
import threading
from dataclasses import dataclass
from typing import IO, Callable, Dict, List, Mapping, Optional, Sequence

from mxresnet.errors import ExitStatus, UserError
from mxresnet.launch import processes, unfinished
from mxresnet.launch.terminal import write_to_stderr

# mpirun writes one of these when it ends its ranks. It may then wait forever for a lost machine.
_ENDING = re.compile(
    b"lost communication|MPI_ABORT was invoked|has been aborted|noticed that process"
    b"|unable to reliably start"
)
POLL_SECONDS = 2.0
GRACE_SECONDS = 8.0
_RULE = "--------"
_USUAL_CAUSES = {
    signal.SIGKILL.value: "often out of memory",
    signal.SIGBUS.value: "often a file that was cut off while it was read, or a full /dev/shm",
}
_SHARED_MEMORY = "/dev/shm"
_SHARED_MEMORY_BYTES = 16 << 20  # of a rank: Open MPI allocates 4 MiB for it
# Seconds that the last output of ranks may take to arrive after the end of mpirun.
_DRAIN_SECONDS = 10.0


@dataclass(frozen=True)
class MpirunResult:
    """How mpirun ended.

    Attributes:
        status: Exit status.
        messages: What mpirun itself wrote to standard error, as one line.
        killed: Whether `kill_stuck_mpirun` ended it.
    """

    status: int
    messages: str
    killed: bool


def find_mpirun(python: str, environ: Mapping[str, str]) -> str:
    """Return the path of mpirun: beside the environment's python, else on PATH.

    Raises:
        UserError: There is none.
    """
    beside = os.path.join(os.path.dirname(python), "mpirun")
    if os.access(beside, os.X_OK):
        return beside
    found = processes.find_program("mpirun", environ)
    if found is None:
        raise UserError(f"mpirun is not found beside {python} nor on PATH: install Open MPI 4.1")
    return found


def run_local_ranks(
    mpirun: str, command: Sequence[str], ranks: int, environ: Mapping[str, str]
) -> MpirunResult:
    """Run ranks on this machine. Their output goes to standard error without the MLPerf log.

    Args:
        mpirun: Path of mpirun.
        command: Command of each rank.
        ranks: Number of ranks.
        environ: Environment of mpirun and of the ranks.
    """
    environ = {**_one_machine_settings(mpirun, ranks, environ), **environ}
    if processes.find_program("ssh", environ) is None:
        # One machine needs no remote shell, but Open MPI checks that there is one.
        environ["OMPI_MCA_plm_rsh_agent"] = "/bin/false"
    read_end, write_end = os.pipe()
    log_filter = threading.Thread(target=_show_without_mlperf_log, args=(read_end,), daemon=True)
    log_filter.start()
    options = ["-np", str(ranks), "--oversubscribe", "--bind-to", "none"]
    options += ["--mca", "mpi_yield_when_idle", "1"]
    try:
        return start_ranks(mpirun, [*options, *command], environ, stdout=write_end)
    finally:
        os.close(write_end)
        log_filter.join(_DRAIN_SECONDS)


def _one_machine_settings(mpirun: str, ranks: int, environ: Mapping[str, str]) -> Dict[str, str]:
    """Return variables with which Open MPI uses the network as little as it can.

    A component of Open MPI for TCP listens on every address, whatever interface it is told to use.
    Ranks of one machine do not need theirs if there is enough shared memory; mpirun has always one.
    """
    settings = {}
    try:
        memory = os.statvfs(_SHARED_MEMORY)
        free = memory.f_bavail * memory.f_frsize
    except OSError:
        free = 0
    if os.access(_SHARED_MEMORY, os.W_OK) and free >= ranks * _SHARED_MEMORY_BYTES:
        settings["OMPI_MCA_btl"] = "^tcp,openib,uct"
    files = [
        pathlib.Path(environ.get("HOME", ""), ".openmpi", "mca-params.conf"),
        pathlib.Path(mpirun).parent.parent / "etc" / "openmpi-mca-params.conf",
    ]
    text = "".join(file.read_text(errors="replace") for file in files if file.is_file())
    for name in ("oob_tcp_if", "btl_tcp_if"):
        # Open MPI refuses to start if it is told both what to use and what not to use.
        if f"OMPI_MCA_{name}_exclude" not in environ and f"{name}_exclude" not in text:
            settings[f"OMPI_MCA_{name}_include"] = "lo"
    return settings


def _show_without_mlperf_log(read_end: int) -> None:
    """Copy each line of a pipe to standard error as it arrives, without the MLPerf log."""
    _block_stop_signals()
    with open(read_end, "rb") as output:
        for line in output:
            if not line.startswith(b":::MLLOG"):
                write_to_stderr(line)


def start_ranks(
    mpirun: str,
    arguments: Sequence[str],
    environ: Mapping[str, str],
    stdout: Optional[int] = None,
) -> MpirunResult:
    """Run mpirun to its end.

    Args:
        mpirun: Path of mpirun.
        arguments: Its options, and the command of a rank.
        environ: Its environment.
        stdout: File descriptor for all output of the ranks. Default: standard output.

    Returns:
        How it ended. mpirun's own messages are returned, for `explain_exit`, and not shown.
    """
    env = dict(environ)
    if os.getuid() == 0:
        env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    with _open_messages() as messages:
        ended, killed = threading.Event(), threading.Event()
        watchers: List[threading.Thread] = []

        def watch(child: subprocess.Popen) -> None:
            arguments = (child, messages.fileno(), ended, killed)
            watchers.append(threading.Thread(target=kill_stuck_mpirun, args=arguments, daemon=True))
            watchers[0].start()

        try:
            status = processes.run_to_end(
                [mpirun, "--mca", "iof_base_redirect_app_stderr_to_stdout", "1", *arguments],
                env=env,
                stdout=stdout,
                stderr=messages,
                stop_seconds=unfinished.stop_seconds(environ),
                on_start=watch,
            )
        finally:
            ended.set()
            # It reads the file of the messages, which is closed below.
            for watcher in watchers:
                watcher.join()
        text = os.fsdecode(_read(messages.fileno()))
    return MpirunResult(status, _one_line(text), killed.is_set())


def _open_messages() -> IO[bytes]:
    """Open a temporary file for mpirun's standard error, or /dev/null if the disk is full."""
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return open(os.devnull, "w+b")


def kill_stuck_mpirun(
    child: subprocess.Popen, messages: int, ended: threading.Event, killed: threading.Event
) -> None:
    """Kill mpirun if it still runs GRACE_SECONDS after it reported the end of its ranks.

    It may wait for machines that are lost.

    Args:
        child: The process of mpirun.
        messages: File descriptor of its standard error. The file position is not changed.
        ended: Set when mpirun has ended.
        killed: Set by this function when it kills.
    """
    _block_stop_signals()
    while not processes.is_ending() and not _ENDING.search(_read(messages)):
        if ended.wait(POLL_SECONDS):
            return
    if not ended.wait(GRACE_SECONDS):
        killed.set()
        child.kill()


def _block_stop_signals() -> None:
    """Block these signals in the calling thread, so that the main thread receives them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, processes.STOP_SIGNALS)


def _read(file: int) -> bytes:
    """Return the content of a file without moving its position, where another process writes."""
    return os.pread(file, os.fstat(file).st_size, 0)


def _one_line(text: str) -> str:
    """Return mpirun's messages as one line, with short rules and without a harmless warning."""
    lines = [line for line in text.split("\n") if "Warning: setpgid" not in line]
    lines = [_RULE if re.fullmatch("-+", line) else line for line in lines]
    return re.sub("[ \n]+", " ", "\n".join(lines)).strip()


def explain_exit(
    status: int,
    environ: Mapping[str, str],
    mpirun: Optional[MpirunResult] = None,
    unreachable_workers: Callable[[], str] = str,
) -> Optional[str]:
    """Explain in one line why ranks ended.

    Args:
        status: Their exit status.
        environ: Environment of the run, for its WATCHDOG_LIMIT.
        mpirun: How mpirun ended, if it started the ranks.
        unreachable_workers: Returns which machines cannot be reached and why, because mpirun does
            not report it: "host: reason; " for each.

    Returns:
        The cause, or None if there is nothing to explain or a rank has explained it.
    """
    if status == 0:
        return None
    stop_signal = processes.stopped_by()
    if stop_signal is not None:
        return f"stopped by {stop_signal}"
    if mpirun is not None and mpirun.killed:
        status = 1  # This process sent the SIGKILL, so it is not the cause.
    if status == 128 + signal.SIGALRM:
        limit = environ.get("WATCHDOG_LIMIT") or "40"
        return (
            f"the ranks did not connect to each other within {limit} s: one of them did not start "
            "or was stopped (WATCHDOG_LIMIT)"
        )
    messages = "" if mpirun is None else mpirun.messages
    return (
        _lost_process(messages)
        or _unreachable(messages, unreachable_workers)
        or _fatal_signal(status, messages, "a rank" if mpirun is None else "mpirun")
        or _other_failure(status, mpirun)
    )


def _lost_process(messages: str) -> Optional[str]:
    """Explain the end of a rank or of a daemon of mpirun, from mpirun's messages."""
    found = re.search(r"rank (\d+) with PID \d+ on node (\S+) exited on signal (\d+)", messages)
    if found:
        return f"rank {found[1]} on {found[2]} was ended by {_signal_text(int(found[3]))}"
    found = re.search(r"process rank (\d+) with PID \d+ on node (\S+) exiting improperly", messages)
    if found:
        return f"rank {found[1]} on {found[2]} exited before the end of the run and gave no reason"
    found = re.search(r"Remote daemon: \[\S* on node (\S+)", messages) or re.search(
        r"Connection to (\S+) closed by remote host", messages
    )
    if found:
        return (
            f"the machine {found[1]} was lost: it or its mpirun daemon ended, "
            "or its network was cut"
        )
    return None


def _unreachable(messages: str, unreachable_workers: Callable[[], str]) -> Optional[str]:
    """Explain that mpirun could not start its daemons on the machines."""
    if "unable to reliably start one or more daemons" not in messages:
        return None
    details = unreachable_workers() + messages.partition(_RULE)[0]
    return (
        "the machines cannot be reached any more, could never be reached, or have no orted: "
        f"{details or 'one ended before it had answered'}"
    )


def _fatal_signal(status: int, messages: str, process: str) -> Optional[str]:
    """Explain a status of 128 + n."""
    if status <= 128 or _signal_name(status - 128) is None:
        return None
    found = re.search(r"Process name: \[\[\d+,\d+\],(\d+)\]", messages)
    return f"{f'rank {found[1]}' if found else process} was ended by {_signal_text(status - 128)}"


def _other_failure(status: int, mpirun: Optional[MpirunResult]) -> Optional[str]:
    """Explain any other end; None for the exit statuses that a rank explains itself.

    mpirun may then write messages of its own about the end of the job.
    """
    if status in (ExitStatus.USER_ERROR, ExitStatus.TARGET_MISSED):
        return None
    if mpirun is not None:
        messages = mpirun.messages
        if messages and "MPI_ABORT was invoked" not in messages and "non-zero" not in messages:
            return f"mpirun failed: {messages.replace(_RULE, '')}"
        if status == 1 and not messages:
            return "mpirun was stopped by a signal from outside this job"
    return f"a rank ended with status {status}" if status > 3 else None


def _signal_name(number: int) -> Optional[str]:
    try:
        return signal.Signals(number).name
    except ValueError:
        return None


def _signal_text(number: int) -> str:
    """Return the name of a signal, with its usual cause where it has one."""
    name = _signal_name(number) or f"signal {number}"
    cause = _USUAL_CAUSES.get(number)
    return f"{name} ({cause})" if cause else name
