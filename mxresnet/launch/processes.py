# SPDX-License-Identifier: Apache-2.0
"""Child processes of the launchers, and the signals that stop a launcher.

A launcher may be the first process of a container. The kernel delivers SIGTERM to such a process
only if it has a handler, and nothing else ends its children. Call `handle_stop_signals` first; then
SIGINT, SIGTERM, SIGHUP and SIGQUIT

- end the command of `run_to_end` that is running, by SIGTERM, and make it return 128 + n;
- raise `StoppedBySignal` at any other time.

Only the first of these signals counts: mpirun leaves ranks behind when it gets a second one. A
command that writes a checkpoint before it ends first gets SIGUSR2 after a SIGTERM, which mpirun
passes on to its ranks, and SIGTERM when its time is over or at the next signal.

Commands that take long run under mxresnet/process_guard.py, which ends them and their descendants
when this process ends in any way.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from types import FrameType
from typing import IO, Any, Callable, List, Mapping, NoReturn, Optional, Sequence, Union

from mxresnet import process_guard
from mxresnet.errors import UserError
from mxresnet.launch import terminal

STOP_SIGNALS = process_guard.STOP_SIGNALS

Stream = Union[None, int, IO[Any]]


class StoppedBySignal(BaseException):
    """This process received one of STOP_SIGNALS. Not an Exception, like KeyboardInterrupt."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.status = 128 + number

    def __str__(self) -> str:
        return f"stopped by {self.name}"


class CommandFailedError(Exception):
    """A command of a launcher failed; it has printed the reason."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _State:
    """What the signal handler shares with `run_to_end`."""

    stopped_by: Optional[int] = None
    in_run_to_end = False
    send_to_child: Optional[Callable[[int], None]] = None
    stop_seconds = 0.0
    request_stop: Optional[Callable[[], None]] = None


_state = _State()


def stopped_by() -> Optional[str]:
    """Return the name of the signal that stopped this process ("SIGTERM"), or None."""
    return None if _state.stopped_by is None else signal.Signals(_state.stopped_by).name


def is_ending() -> bool:
    """Return whether a signal has stopped this process, and its command has no time left."""
    return _state.stopped_by is not None and _state.request_stop is None


def raise_if_stopped() -> None:
    """Raise StoppedBySignal if this process was stopped by a signal."""
    if _state.stopped_by is not None:
        raise StoppedBySignal(_state.stopped_by)


def handle_stop_signals() -> None:
    """Install the handlers of STOP_SIGNALS; see the docstring of this module.

    A signal that the caller ignores (nohup) stays ignored. Signals that the caller blocked are
    unblocked: a pending one is handled now.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_stop_signal)
    signal.signal(process_guard.STOP_REQUEST, _on_stop_request)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _on_stop_signal(number: int, frame: Optional[FrameType]) -> None:
    if _state.stopped_by is not None:
        _end_child()
        return
    _state.stopped_by = number
    terminal.stop_waiting()
    if _state.send_to_child is not None and number == signal.SIGTERM and _state.request_stop:
        signal.signal(signal.SIGALRM, lambda *_: _end_child())
        signal.setitimer(signal.ITIMER_REAL, _state.stop_seconds)
        _state.request_stop()
    elif _state.send_to_child is not None:
        _end_child()
    elif not _state.in_run_to_end:
        raise StoppedBySignal(number)


def _end_child() -> None:
    """Send SIGTERM to the command of run_to_end(), once."""
    _state.request_stop = None
    if _state.send_to_child is not None:
        _state.send_to_child(signal.SIGTERM)


def _on_stop_request(number: int, frame: Optional[FrameType]) -> None:
    """Pass SIGUSR2 on: mpirun sends it to a launcher that it has started as a rank."""
    if _state.request_stop is not None:
        _state.request_stop()
    elif _state.send_to_child is None and not _state.in_run_to_end:
        raise StoppedBySignal(signal.SIGTERM)


def run_to_end(
    command: Sequence[str],
    *,
    env: Optional[Mapping[str, str]] = None,
    stdin: Stream = subprocess.DEVNULL,
    stdout: Stream = None,
    stderr: Stream = None,
    new_session: bool = True,
    stop_seconds: float = 0.0,
    on_start: Optional[Callable[[subprocess.Popen], None]] = None,
) -> int:
    """Run a command and wait for its end, also when this process is stopped by a signal.

    No process that the command started remains.

    Args:
        command: Program and arguments.
        env: Environment of the command. Default: that of this process.
        stdin: As for subprocess.Popen, but nothing to read by default.
        stdout: As for subprocess.Popen.
        stderr: As for subprocess.Popen.
        new_session: Run the command in a session of its own, where a Ctrl-C of the terminal reaches
            it once, through this process.
        stop_seconds: Time after SIGTERM in which the command may write a checkpoint and end.
        on_start: Called with the process of the guard once the command runs.

    Returns:
        The exit status of the command; 128 + n if signal n ended the command or this process was
        stopped by signal n.

    Raises:
        UserError: The command cannot be started.
    """
    if _state.stopped_by is not None:
        return 128 + _state.stopped_by
    previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    _state.in_run_to_end = True
    try:
        # Before the child exists: a signal that comes while it starts is sent to it by _wait.
        handle_stop_signals()
        child = _start(
            command,
            new_session,
            env=None if env is None else dict(env),
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )
        _set_child(child, stop_seconds)
        status = _wait(child, on_start)
    finally:
        _set_child(None, 0)
        _state.in_run_to_end = False
        for number, handler in previous.items():
            if handler is not None:
                signal.signal(number, handler)
    return status if _state.stopped_by is None else 128 + _state.stopped_by


def _set_child(child: Optional[subprocess.Popen], stop_seconds: float) -> None:
    """Set the process that the signal handlers end; None: there is none any more."""
    _state.stop_seconds = stop_seconds
    _state.request_stop = _state.send_to_child = None
    signal.setitimer(signal.ITIMER_REAL, 0)
    if child is not None:
        running = child
        if stop_seconds:
            _state.request_stop = lambda: _send(running, process_guard.STOP_REQUEST)
        _state.send_to_child = _sender(running)


def _start(command: Sequence[str], new_session: bool, **options: Any) -> subprocess.Popen:
    """Start a command under a guard; return the process of the guard.

    Raises:
        UserError: The command cannot be started.
    """
    process_guard.adopt_descendants()
    read_end, write_end = os.pipe()
    with open(read_end, "rb") as report:
        arguments = ["--report", str(write_end), str(os.getpid()), *command]
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", process_guard.__file__, *arguments],
                pass_fds=(write_end,),
                start_new_session=new_session,
                **options,
            )
        except OSError as error:
            raise _cannot_start(command, error.errno) from error
        finally:
            os.close(write_end)
        # Nothing, once the command runs or the guard has been ended.
        reported = report.read()
    if reported:
        child.wait()
        raise _cannot_start(command, int(reported))
    return child


def _cannot_start(command: Sequence[str], number: Optional[int]) -> UserError:
    return UserError(f"{command[0]} cannot be started: {os.strerror(number or 0)}")


def _sender(child: subprocess.Popen) -> Callable[[int], None]:
    """Return a function that sends a signal to a child, at most once."""
    sent: List[int] = []

    def send(number: int) -> None:
        if sent:
            return
        sent.append(number)
        _send(child, number)

    return send


def _send(child: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(OSError):
        child.send_signal(number)


def _wait(child: subprocess.Popen, on_start: Optional[Callable[[subprocess.Popen], None]]) -> int:
    """Return the status of a child when it has ended."""
    if _state.stopped_by is not None and _state.send_to_child is not None:
        _state.send_to_child(signal.SIGTERM)  # The signal came while the child was being started.
    if on_start is not None:
        on_start(child)
    status = child.wait()
    if status < 0:  # The guard itself was ended by a signal.
        process_guard.kill_descendants()
    return status if status >= 0 else 128 - status


def replace_process(command: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """Replace this process with a command (exec).

    Raises:
        UserError: The command cannot be started.
    """
    process_guard.restore_ignored_signals()
    try:
        os.execvpe(command[0], list(command), dict(env))
    except OSError as error:
        raise UserError(f"{command[0]} cannot be started: {error.strerror}") from error


def capture_output(
    command: Sequence[str], env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a short command without input; return its status and its standard output as text.

    The kernel ends it with this process.

    Raises:
        OSError: The command cannot be started.
    """
    return subprocess.run(
        list(command),
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        errors="replace",
        preexec_fn=process_guard.end_with_parent,
    )


def find_program(name: str, env: Mapping[str, str]) -> Optional[str]:
    """Return the path of a program on the PATH of an environment, or None."""
    return shutil.which(name, path=env.get("PATH", os.defpath))
