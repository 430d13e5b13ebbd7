# SPDX-License-Identifier: Apache-2.0
"""The interface of the backends on which a series of trials can run."""

from __future__ import annotations

import abc
import os
from dataclasses import dataclass
from typing import Callable, Dict, Mapping, Sequence

from mxresnet.errors import UserError
from mxresnet.launch import nccl_test, system_config
from mxresnet.launch.processes import Stream
from mxresnet.launch.run_log import DEFAULT_LOGDIR, SERIES_VARIABLE
from mxresnet.launch.terminal import OutputError, print_to_stderr, write_to_stdout


def run_with_stdout_kept(run: Callable[[int], int]) -> int:
    """Run a trial whose standard output is in memory, and write that to standard output at its end.

    A trial succeeds without its RESULT line, which its log contains in another form. The summary of
    the series, which is written later, reports a lost standard output.

    Args:
        run: Runs the trial with a file descriptor for its standard output; returns its exit status.

    Returns:
        The exit status.
    """
    with open(os.memfd_create("stdout"), "w+b") as output:
        status = run(output.fileno())
        output.seek(0)
        try:
            write_to_stdout(output.read())
        except OutputError as error:
            print_to_stderr(f"note: {error}")
        return status


@dataclass(frozen=True)
class Trial:
    """One trial. ./run_and_time.sh gets it as environment variables."""

    number: int  # from 1; 0: only the settings are checked
    seed: int
    stamp: str  # DATESTAMP
    logdir: str  # folder of the logs on this machine
    cache_cleared: bool  # whether the page cache was dropped before the trial
    measures_bandwidth: bool = False  # NCCL_TEST: the ranks do not train

    def variables(self) -> Dict[str, str]:
        """Return the environment variables of the trial, without LOGDIR."""
        bandwidth = {nccl_test.VARIABLE: "1"} if self.measures_bandwidth else {}
        return {
            "SEED": str(self.seed),
            "TRIAL": str(self.number),
            "DATESTAMP": self.stamp,
            SERIES_VARIABLE: self.stamp,
            "CACHE_CLEARED": str(int(self.cache_cleared)),
            **bandwidth,
        }


class Backend(abc.ABC):
    """Runs trials on this machine, in a container, or on the machines of a Slurm job.

    Attributes:
        program: Name of the script that the user started, for messages.
        environ: Environment of the trials; `prepare` may add a configuration to it.
    """

    program: str

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.environ: Dict[str, str] = dict(environ)

    @property
    def logdir(self) -> str:
        """The folder of the logs on this machine."""
        return self.environ.get("LOGDIR") or DEFAULT_LOGDIR

    @property
    def remote_logdir(self) -> str:
        """The path of the log folder for the processes of `run_python`."""
        return self.logdir

    @abc.abstractmethod
    def prepare(self, flags: Sequence[str]) -> None:
        """Check the backend's own settings, and start what all trials share, such as a container.

        Args:
            flags: Arguments of the script.

        Raises:
            UserError: A setting is wrong.
        """

    @abc.abstractmethod
    def run_trial(self, trial: Trial, flags: Sequence[str]) -> int:
        """Run ./run_and_time.sh with flags of mxresnet; return its exit status."""

    @abc.abstractmethod
    def check_settings(self, trial: Trial, flags: Sequence[str]) -> int:
        """Check the settings of a trial with mxresnet; return its exit status."""

    @abc.abstractmethod
    def drop_caches(self) -> bool:
        """Drop the page cache of each machine; return whether that succeeded."""

    @abc.abstractmethod
    def run_python(self, arguments: Sequence[str], stdout: Stream, stderr: Stream = None) -> int:
        """Run python with arguments where the trials run; return its exit status."""

    def close(self) -> None:
        """Stop what `prepare` started. Called once, also after a failure of `prepare`."""
        return

    def load_configuration(self, system: str, flags: Sequence[str]) -> None:
        """Add a configuration to `environ`, and note which variables of the caller it overrides.

        Args:
            system: DGXSYSTEM.
            flags: Flags of mxresnet.

        Raises:
            UserError: The configuration is unknown or failed.
        """
        caller = self.environ
        self.environ = system_config.load_configuration(system, caller)
        for note in system_config.overridden_settings(system, caller, self.environ, flags):
            print_to_stderr(note)

    def check_mounts(self, characters: str) -> None:
        """Raise UserError if DATADIR or LOGDIR has a character that divides an option of mounts."""
        for name, path in (("DATADIR", self.environ.get("DATADIR", "")), ("LOGDIR", self.logdir)):
            path = os.path.realpath(path)
            found = [character for character in characters if character in path]
            if found:
                raise UserError(
                    f"{name}: {path} has a {found[0]!r}, and cannot be mounted in a container: "
                    "rename the folder, or use another"
                )

    def required(self, name: str, reason: str) -> str:
        """Return the value of a variable.

        Raises:
            UserError: The variable is not set.
        """
        value = self.environ.get(name)
        if not value:
            raise UserError(f"{name} is not set: {reason}")
        return value
