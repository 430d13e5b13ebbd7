# SPDX-License-Identifier: Apache-2.0
"""Run a command, and end all its descendants with it, or with the process that started it.

python process_guard.py [--new-session] [--report FD] PARENT COMMAND [ARGUMENT...]

The launchers and setup_env.sh start their commands through this program, because a process cannot
end its children when it is itself ended by SIGKILL. PARENT is the id of the process that started
this one. In a tree PARENT - guard - command - descendants:

- When the command has ended, the guard kills the descendants that remain.
- When PARENT ends in any way, the guard sends SIGTERM to the command, so that mpirun can end its
  ranks and remove its files, and kills everything that remains GRACE_SECONDS later.
- When the guard ends in any way, the kernel kills the command. PARENT then kills the descendants,
  which become its own children (`adopt_descendants`, `kill_descendants`).

SIGINT, SIGTERM, SIGHUP and SIGQUIT are passed to the command as one SIGTERM, SIGUSR2 as it is. The
exit status is that of the command, 128 + n if signal n ended it. If the command cannot be started,
the guard writes the error number to FD.

Only the standard library is needed. This file must run on its own: setup_env.sh starts it before
the environment exists.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import signal
import sys
import time
from typing import Dict, List, NoReturn, Optional, Sequence

# Seconds for a command to end by itself after the process that started it has ended.
GRACE_SECONDS = 2.0
# Nothing ends a process that waits for a device or for a file server before the wait is over.
MAX_KILL_SECONDS = 10.0
CANNOT_START = 127  # exit status of a shell for a command that does not exist
_MAX_WAIT_SECONDS = 3600.0  # of one system call
# <linux/prctl.h>
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
STOP_REQUEST = signal.SIGUSR2  # write a checkpoint and end; mpirun passes it on to its ranks
_PARENT_ENDED = signal.SIGUSR1
_HANDLED = {*STOP_SIGNALS, STOP_REQUEST, _PARENT_ENDED, signal.SIGCHLD}
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


def _prctl(option: int, value: int) -> None:
    """Call prctl(2). A kernel or a sandbox that refuses it is not an error."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel send a signal to this process when its parent's calling thread has ended."""
    _prctl(_PR_SET_PDEATHSIG, number)


def restore_ignored_signals() -> None:
    """Give the signals that Python ignores the default action that commands expect."""
    for number in _IGNORED_BY_PYTHON:
        signal.signal(number, signal.SIG_DFL)


def adopt_descendants() -> None:
    """Make this process the parent of each descendant that loses its own."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(ancestor: int) -> List[int]:
    """Return the ids of all descendants of a process, without zombies; none without /proc."""
    children: Dict[int, List[int]] = {}
    zombies, names = set(), []
    with contextlib.suppress(OSError):
        names = [name for name in os.listdir("/proc") if name.isdecimal()]
    for name in names:
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as file:
            # The name of the program, in parentheses, may contain spaces and parentheses.
            state, parent = file.read().rpartition(b")")[2].split()[:2]
            children.setdefault(int(parent), []).append(int(name))
            if state in (b"Z", b"X"):
                zombies.add(int(name))
    found, queue = [], [ancestor]
    while queue:
        below = children.get(queue.pop(), [])
        queue += below
        found += [pid for pid in below if pid not in zombies]
    return found


def kill_descendants() -> None:
    """Kill all descendants of this process, also those that are being started meanwhile.

    Call `adopt_descendants` first: otherwise descendants of a killed process are not found.
    """
    end = time.monotonic() + MAX_KILL_SECONDS
    while time.monotonic() < end:
        remaining = descendants(os.getpid())
        if not remaining:
            return
        for pid in remaining:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
        _reap()


def _reap() -> Dict[int, int]:
    """Collect all children that have ended; return the exit status of each."""
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            is_signal = os.WIFSIGNALED(status)
            ended[pid] = 128 + os.WTERMSIG(status) if is_signal else os.WEXITSTATUS(status)
    return ended


def _execute(command: Sequence[str], guard: int, report: Optional[int]) -> NoReturn:
    """Replace this new child of the guard with the command."""
    end_with_parent()
    if os.getppid() != guard:
        os._exit(CANNOT_START)
    restore_ignored_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
    try:
        os.execvp(command[0], list(command))
    except OSError as error:
        if report is not None:
            os.write(report, str(error.errno).encode())
        os._exit(CANNOT_START)


def _stop(command: int) -> None:
    """Ask the command to end, also when it is stopped (SIGSTOP)."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(command, signal.SIGTERM)
        os.kill(command, signal.SIGCONT)


def _wait(command: int, parent: int) -> int:
    """Return the exit status of the command when it has ended, or when its time is over."""
    # A signal that the caller ignores (nohup) stays ignored.
    ignored = {number for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_IGN}
    awaited = _HANDLED - ignored
    stopped, deadline = False, math.inf
    while True:
        remaining = min(deadline - time.monotonic(), _MAX_WAIT_SECONDS)
        info = signal.sigtimedwait(awaited, max(0.0, remaining))
        if info is None:
            if time.monotonic() < deadline:
                continue
            return 128 + signal.SIGKILL
        if info.si_signo == signal.SIGCHLD:
            ended = _reap()
            if command in ended:
                return ended[command]
            continue
        if info.si_signo == STOP_REQUEST:
            with contextlib.suppress(ProcessLookupError):
                os.kill(command, STOP_REQUEST)
            continue
        if info.si_signo == _PARENT_ENDED:
            if os.getppid() == parent:
                continue  # only one of its threads ended
            deadline = time.monotonic() + GRACE_SECONDS
        if not stopped:
            _stop(command)
            stopped = True


def guard(command: Sequence[str], parent: int, report: Optional[int] = None) -> int:
    """Run a command as described at the top of this file; return its exit status.

    Args:
        command: Program and arguments.
        parent: Id of the process that started this one.
        report: File descriptor for the number of an error in starting the command.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a caller that ignores it would pass that on
    adopt_descendants()
    end_with_parent(_PARENT_ENDED)
    this = os.getpid()
    if os.getppid() != parent:
        return CANNOT_START
    child = os.fork()
    if child == 0:
        _execute(command, this, report)
    if report is not None:
        os.close(report)
    status = _wait(child, parent)
    kill_descendants()
    return status


def main(arguments: List[str]) -> int:
    """Run the command line that the docstring of this file describes."""
    report = None
    while arguments[0].startswith("--"):
        option = arguments.pop(0)
        if option == "--new-session":
            os.setsid()
        elif option == "--report":
            report = int(arguments.pop(0))
            os.set_inheritable(report, False)
    parent, *command = arguments
    return guard(command, int(parent), report)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
