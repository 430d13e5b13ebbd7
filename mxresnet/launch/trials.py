# SPDX-License-Identifier: Apache-2.0
"""A series of timed runs: the program behind run_trials.sh, run_with_docker.sh and run.sub.

Each trial starts with a dropped page cache and its own seed. The official checker checks each log.
At the end, a summary and a folder for MLPerf's tools are written.

A trial that misses its target does not stop the others; one that fails does. Exit status: 0 every
trial reached its target and the official checker accepts every log; 3 some missed it or evaluated
nothing; 4 none missed, but the checker refuses a log; 2 a mistake in settings or data; anything
else is that of the failed trial.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import subprocess
import sys
from typing import Callable, Dict, List, Mapping, Optional, Sequence

from mxresnet.environment import check_python_path
from mxresnet.errors import ExitStatus, UserError
from mxresnet.launch import (
    caller_paths,
    nccl_test,
    processes,
    refused_variables,
    report,
    requeue,
    run_log,
)
from mxresnet.launch.backends.base import Backend, Trial
from mxresnet.launch.backends.docker import DockerBackend
from mxresnet.launch.backends.local import LocalBackend
from mxresnet.launch.backends.slurm import SlurmBackend
from mxresnet.launch.processes import CommandFailedError
from mxresnet.launch.terminal import print_to_stderr, write_to_stdout
from mxresnet.launch.trial_settings import read_trial_settings
from mxresnet.launch.trial_summary import (
    MISSED,
    NOT_EVALUATED,
    REACHED,
    RESUMED,
    TrialResult,
    read_log_or_empty,
    summarize,
)
from mxresnet.results.log_reader import with_sufficient_accuracy

LOG_REFUSED = 4
BACKENDS: Dict[str, Callable[[Mapping[str, str]], Backend]] = {
    "local": LocalBackend,
    "docker": DockerBackend,
    "slurm": SlurmBackend,
}
CHECKER = (
    *("-m", "mlperf_logging.compliance_checker", "--usage", "training"),
    *("--ruleset", "2.1.0", "--log_output", os.devnull),
)


class Trials:
    """A series of trials on one backend."""

    def __init__(self, backend: Backend, flags: Sequence[str]) -> None:
        """Check the settings.

        Raises:
            UserError: A setting is wrong.
            CommandFailedError: mxresnet rejects the settings; it has printed the reason.
        """
        self._backend, self._flags = backend, list(flags)
        self._measures_bandwidth = nccl_test.is_wanted(backend.environ)
        backend.environ.pop(nccl_test.VARIABLE, None)  # not for the trials
        if not backend.environ.get("CHECKPOINTS"):
            backend.environ["CHECKPOINTS"] = "0"
            print_to_stderr(
                "note: trials write no checkpoints (CHECKPOINTS=1: they do; a resumed trial is "
                "not scored)"
            )
        self._settings = read_trial_settings(flags, backend.environ, backend.logdir)
        self._results: List[TrialResult] = []
        # Check them before anything is changed on the machine.
        status = backend.check_settings(self._trial(0, cache_cleared=False), self._flags)
        processes.raise_if_stopped()
        if status != 0:
            raise CommandFailedError(status)
        self._settings, self._is_requeued = requeue.reserve(self._settings, backend.environ)

    def _trial(self, number: int, cache_cleared: bool) -> Trial:
        settings = self._settings
        seed = settings.seeds[max(number - 1, 0)]
        return Trial(number, seed, settings.stamp, settings.logdir, cache_cleared)

    def run(self) -> int:
        """Run the trials, show the summary, write the submission; return the exit status."""
        try:
            status = self._run_all()
        except BaseException:
            if not self._results and not requeue.writes_checkpoints(self._backend.environ):
                run_log.release_stamp(self._settings.logdir, self._settings.stamp)
            raise
        error = self._write_summary()
        complete = len(self._results) == len(self._settings.seeds)
        if complete and status in (ExitStatus.SUCCESS, ExitStatus.TARGET_MISSED, LOG_REFUSED):
            if any(result.outcome == RESUMED for result in self._results):
                print_to_stderr("note: no submission is written: a trial was resumed")
            else:
                self._write_submission()
            self._write_report()
        print_to_stderr(f"logs: {self._settings.prefix}_*.log")
        if error:
            raise error
        return status

    def _write_summary(self) -> Optional[OSError]:
        """Write the summary to its file and to standard output; return an error of either."""
        summary = summarize(self._settings, self._results)
        failure = None
        try:
            with open(f"{self._settings.prefix}_summary.txt", "w", encoding="utf-8") as file:
                file.write(summary)
        except OSError as error:
            failure = error
        try:
            write_to_stdout(os.fsencode(summary))
        except OSError as error:
            failure = error
        return failure

    def _run_all(self) -> int:
        """Run the trials until one fails; return the exit status."""
        program, count = self._backend.program, len(self._settings.seeds)
        if self._measures_bandwidth:
            self._measure_bandwidth()
        for number, seed in enumerate(self._settings.seeds, start=1):
            print_to_stderr(f"trial {number} of {count}, seed {seed}")
            status = self._run_trial(number)
            if status in (ExitStatus.SUCCESS, ExitStatus.TARGET_MISSED):
                loss = run_log.explain_loss(self._settings.log_path(number))
                if loss:
                    print_to_stderr(f"{program}: {loss}")
                    status = ExitStatus.FAILURE
            if status not in (ExitStatus.SUCCESS, ExitStatus.TARGET_MISSED):
                self._results.append(TrialResult(f"FAILED (status {status})"))
                print_to_stderr(
                    f"{program}: trial {number} failed (status {status}): "
                    "the remaining trials are not run"
                )
                return status
            self._results.append(self._evaluate_trial(number, status))
        if any(result.outcome != REACHED for result in self._results):
            return ExitStatus.TARGET_MISSED
        if not all(result.compliant for result in self._results):
            return LOG_REFUSED
        return ExitStatus.SUCCESS

    def _run_trial(self, number: int) -> int:
        """Run a trial, unless this job has finished it before it was queued again."""
        if self._is_requeued:
            status = requeue.finished_status(self._settings.log_path(number))
            if status is not None:
                return status
        trial = self._trial(number, self._clear_caches())
        return self._backend.run_trial(trial, self._flags)

    def _measure_bandwidth(self) -> None:
        """Run the ranks once to measure the bandwidth between them.

        Raises:
            CommandFailedError: They failed, and have printed the reason.
        """
        trial = dataclasses.replace(self._trial(0, cache_cleared=False), measures_bandwidth=True)
        status = self._backend.run_trial(trial, self._flags)
        processes.raise_if_stopped()
        if status != 0:
            raise CommandFailedError(status)

    def _evaluate_trial(self, number: int, status: int) -> TrialResult:
        """Return the result of a trial that ended with status 0 or 3."""
        path = self._settings.log_path(number)
        compliant = self._check_log(path, f"{self._settings.prefix}_{number}.check")
        only_accuracy = not compliant and self._lacks_only_accuracy(path)
        if status == ExitStatus.TARGET_MISSED:
            return TrialResult(MISSED, compliant, only_accuracy)
        log = read_log_or_empty(path)
        reached = RESUMED if log.last_event("resumed") else REACHED
        outcome = reached if log.last_evaluation else NOT_EVALUATED
        return TrialResult(outcome, compliant, only_accuracy)

    def _clear_caches(self) -> bool:
        """Drop the page cache unless CLEAR_CACHES is 0; return whether it was dropped."""
        if not self._settings.clear_caches:
            return False
        cleared = self._backend.drop_caches()
        processes.raise_if_stopped()
        if not cleared:
            print_to_stderr(
                "note: the page cache could not be dropped (this needs root: see CLEAR_CACHES in "
                "docs/launching.md), so the log has cache_clear false; CLEAR_CACHES=0 does not try"
            )
        return cleared

    def _remote_path(self, path: str) -> str:
        """Return the path of a file in LOGDIR for the processes of `Backend.run_python`."""
        return f"{self._backend.remote_logdir}/{os.path.basename(path)}"

    def _check_log(self, path: str, output_path: str) -> bool:
        """Return whether the official checker accepts a log; write its output to a file."""
        with open(output_path, "wb") as output:
            status = self._backend.run_python(
                [*CHECKER, self._remote_path(path)], stdout=output, stderr=subprocess.STDOUT
            )
        processes.raise_if_stopped()
        return status == 0

    def _lacks_only_accuracy(self, path: str) -> bool:
        """Return whether the checker would accept a log if its last accuracy were sufficient."""
        changed_path = f"{path}.accuracy"
        try:
            with open(path, "rb") as log, open(changed_path, "wb") as changed:
                changed.write(with_sufficient_accuracy(log.read()))
            return self._check_log(changed_path, os.devnull)
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                os.unlink(changed_path)

    def _write_submission(self) -> None:
        """Write the folder that the tools of MLPerf read.

        Raises:
            CommandFailedError: The folder could not be written.
        """
        settings, environ = self._settings, self._backend.environ
        folder = f"{settings.prefix}_package"
        numbers = range(1, len(settings.seeds) + 1)
        arguments = ["-m", "mxresnet.results.submission", self._remote_path(folder)]
        arguments += [self._remote_path(settings.log_path(number)) for number in numbers]
        platform = environ.get("SUBMISSION_PLATFORM", "")
        if re.fullmatch("[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}", platform):
            arguments += ["--system", platform]
        arguments += ["--nodes", environ.get("DGXNNODES") or "1"]
        status = self._backend.run_python(arguments, stdout=subprocess.DEVNULL)
        processes.raise_if_stopped()
        if status != 0:
            raise CommandFailedError(ExitStatus.FAILURE)  # 2 would be a mistake in the settings
        print_to_stderr(f"for MLPerf's package_checker and result_summarizer: {folder}")

    def _write_report(self) -> None:
        """Write the page about the series, where its packages are installed; print its path."""
        if not report.is_wanted(self._backend.environ):
            return
        folder, page = (f"{self._settings.prefix}_{name}" for name in ("package", "report.html"))
        arguments = report.python_arguments(self._remote_path(folder), self._remote_path(page))
        self._backend.run_python(arguments, subprocess.DEVNULL, subprocess.DEVNULL)
        processes.raise_if_stopped()
        if os.path.isfile(page):
            print_to_stderr(f"report: {page}")


def run_trials(backend: Backend, flags: Sequence[str]) -> int:
    """Run trials on a backend, report an error in one line, and return the exit status."""
    try:
        processes.handle_stop_signals()
        try:
            check_python_path(backend.environ)
            refused_variables.check(backend.environ, flags)
            requeue.handle_time_limit(backend.environ)
            backend.prepare(flags)
            return Trials(backend, flags).run()
        finally:
            backend.close()
            requeue.requeue_if_wanted(backend.environ)
    except UserError as error:
        print_to_stderr(f"{backend.program}: {error}")
        return ExitStatus.USER_ERROR
    except CommandFailedError as error:
        return error.status
    except OSError as error:  # a file of the run, or standard output, cannot be written
        print_to_stderr(f"{backend.program}: {error}")
        return ExitStatus.FAILURE
    except processes.StoppedBySignal as stop:
        print_to_stderr(f"{backend.program}: {stop}")
        return stop.status


def main() -> int:
    """Run trials; the arguments are the name of a backend and flags of mxresnet."""
    name, *arguments = sys.argv[1:]
    flags, environ = caller_paths.make_absolute(arguments, os.environ)
    return run_trials(BACKENDS[name](environ), flags)


if __name__ == "__main__":
    sys.exit(main())
