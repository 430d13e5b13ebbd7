# SPDX-License-Identifier: Apache-2.0
"""A Slurm job that writes checkpoints and is started again continues its series of trials.

Slurm starts a job again after the loss of a machine or a preemption, with the same number. Before
the time limit it sends SIGUSR1 to run.sub, which stops the trial and puts the job in the queue
again. The stamp and the seeds of the series are in <LOGDIR>/<stamp>_series.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
from typing import Any, List, Mapping, Optional, Tuple

from mxresnet.checkpoint import choice, store
from mxresnet.checkpoint.manifest import DamagedError
from mxresnet.errors import ExitStatus
from mxresnet.launch import processes, run_log, unfinished
from mxresnet.launch.terminal import print_to_stderr
from mxresnet.launch.trial_settings import TrialSettings
from mxresnet.results.log_reader import read_log

# Options of sbatch: start the job again, and a signal in time for a last checkpoint.
SBATCH_OPTIONS = ("--requeue", "--signal=B:USR1@120")
_TIME_LIMIT = signal.SIGUSR1


class _State:
    """What the signal handler shares with requeue_if_wanted()."""

    is_wanted = False


_state = _State()


def writes_checkpoints(environ: Mapping[str, str]) -> bool:
    """Return whether the trials write checkpoints: only if the caller has set CHECKPOINTS."""
    return bool(environ.get("CHECKPOINTS")) and unfinished.stop_seconds(environ) > 0


def handle_time_limit(environ: Mapping[str, str]) -> None:
    """Stop the trial when Slurm announces the time limit; without checkpoints, ignore that."""

    def stop(*_: Any) -> None:
        _state.is_wanted = True
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(_TIME_LIMIT, stop if writes_checkpoints(environ) else signal.SIG_IGN)


def requeue_if_wanted(environ: Mapping[str, str]) -> None:
    """Put the job in the queue again if it was stopped before its time limit."""
    job = environ.get("SLURM_JOB_ID")
    if not (_state.is_wanted and job):
        return
    print_to_stderr(f"job {job} is close to its time limit: it is queued again, and continues then")
    # Slurm ends this job at once, so nothing may follow.
    processes.replace_process(["scontrol", "requeue", job], environ)


def reserve(settings: TrialSettings, environ: Mapping[str, str]) -> Tuple[TrialSettings, bool]:
    """Return the settings with the stamp of the series, and whether the series continues.

    Raises:
        UserError: DATESTAMP has files of another series, or the folder cannot be written.
        OSError: the folder cannot be written.
    """
    job = environ.get("SLURM_JOB_ID")
    if not job or not writes_checkpoints(environ):
        stamp = run_log.reserve_stamp(settings.logdir, settings.stamp)
        return dataclasses.replace(settings, stamp=stamp), False
    stamp = settings.stamp or f"job{job}"
    path = f"{settings.logdir}/{stamp}_series.json"
    if int(environ.get("SLURM_RESTART_COUNT") or 0) > 0:
        seeds = _read_seeds(path, job, len(settings.seeds))
        if seeds:
            print_to_stderr(f"job {job} was queued again: its series {stamp} continues")
            return dataclasses.replace(settings, stamp=stamp, seeds=seeds), True
    stamp = run_log.reserve_stamp(settings.logdir, stamp)
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"job": job, "seeds": settings.seeds}, file)
    return dataclasses.replace(settings, stamp=stamp), False


def _read_seeds(path: str, job: str, count: int) -> Optional[List[int]]:
    """Return the seeds of the series that a job has started, or None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        seeds = [int(seed) for seed in content["seeds"]]
        if content["job"] == job and len(seeds) == count:
            return seeds
    return None


def finished_status(log: str) -> Optional[ExitStatus]:
    """Return the exit status of a trial that has ended by itself, or None.

    The log of a trial that was stopped before its first checkpoint is renamed: it starts anew.
    """
    try:
        stop = read_log(log).last_event("run_stop")
    except OSError:
        return None
    folder = os.path.splitext(log)[0] + choice.SUFFIX
    if stop is not None and stop.metadata.get("status") == "success":
        return ExitStatus.SUCCESS
    if stop is not None and not _was_ended_by_an_error(folder):
        return ExitStatus.TARGET_MISSED
    if not choice.has_checkpoints(folder):
        os.replace(log, f"{log}.lost")
    return None


def _was_ended_by_an_error(folder: str) -> bool:
    """Return whether a run that logged run_stop did not end by itself: its folder notes that end.

    The log is the same in both cases.
    """
    for run in choice.list_runs(folder)[:1]:
        with contextlib.suppress(DamagedError):
            return not store.read_run(run).outcome
    return False


def stop_seconds(environ: Mapping[str, str]) -> float:
    """Return the time that the ranks of a trial may take after SIGTERM for a checkpoint."""
    return unfinished.STOP_SECONDS if writes_checkpoints(environ) else 0.0
