# SPDX-License-Identifier: Apache-2.0
"""Unfinished runs that the same command continues: found by their checkpoints.

The checkpoints of LOGDIR/<stamp>_<trial>.log are in LOGDIR/<stamp>_<trial>.checkpoints. A run
continues there, in the same log, if the run in that folder is not finished, is not in use, has a
checkpoint, and has the settings and the number of ranks of this one. The ranks check the data set
and the versions as well.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any, Dict, Iterable, Iterator, List, Mapping, Optional

from mxresnet.checkpoint import choice, store
from mxresnet.checkpoint.fingerprint import differing_settings
from mxresnet.checkpoint.manifest import DamagedError
from mxresnet.errors import ExitStatus
from mxresnet.launch.run_log import DEFAULT_LOGDIR
from mxresnet.launch.terminal import print_to_stderr

_OFF = ("0", "false", "no")
# After SIGTERM, Kubernetes kills a pod after 30 seconds.
STOP_SECONDS = 20.0


@dataclass(frozen=True)
class UnfinishedRun:
    """A run to continue.

    Attributes:
        log: path of its log; "" if the folder of that is gone.
        started: when it started first, seconds since 1970.
    """

    log: str
    started: float


def stop_seconds(environ: Mapping[str, str]) -> float:
    """Return the time that ranks may take after SIGTERM: 0 if they write no checkpoints."""
    return 0.0 if environ.get("CHECKPOINTS", "").lower() in _OFF else STOP_SECONDS


def find(
    environ: Mapping[str, str], settings: Mapping[str, Any], ranks: int
) -> Optional[UnfinishedRun]:
    """Return the newest unfinished run that a run of these settings continues.

    Args:
        environ: for LOGDIR, DATESTAMP and TRIAL.
        settings: effective settings of the run, by field of Config.
        ranks: number of its ranks.
    """
    if settings["resume"] != "auto" or not settings["checkpoints"]:
        return None
    folder = environ.get("LOGDIR") or DEFAULT_LOGDIR
    stamp, trial = environ.get("DATESTAMP") or "", environ.get("TRIAL") or "1"
    if settings["checkpoint_dir"]:
        folders: List[str] = [settings["checkpoint_dir"]]
    elif stamp:
        folders = [os.path.join(folder, f"{stamp}_{trial}{choice.SUFFIX}")]
    else:
        folders = sorted(
            _folders_in(folder, f"_{trial}{choice.SUFFIX}"), key=_time_of, reverse=True
        )
    found = next(_matching(folders, settings, ranks), None)
    if found is None or os.path.isdir(os.path.dirname(found.log) or "."):
        return found
    return UnfinishedRun("", found.started)


def finished_status(
    environ: Mapping[str, str], settings: Mapping[str, Any]
) -> Optional[ExitStatus]:
    """Return the exit status of a run that this job of a cluster has already finished, or None.

    Kubernetes repeats a job that ends with any status but 0, also one that missed its target.

    Args:
        environ: for LOGDIR, and for JOB_UID, which is the same in every attempt of the job.
        settings: effective settings of the run, for --checkpoint-dir.
    """
    job = environ.get("JOB_UID")
    if not job:
        return None
    folders = [*_folders_in(environ.get("LOGDIR") or DEFAULT_LOGDIR, choice.SUFFIX)]
    if settings["checkpoint_dir"]:
        folders.append(settings["checkpoint_dir"])
    for folder in folders:
        for path in choice.list_runs(folder)[:1]:
            with contextlib.suppress(DamagedError):
                run = store.read_run(path)
                if run.job == job and run.outcome:
                    succeeded = run.outcome == "success"
                    return ExitStatus.SUCCESS if succeeded else ExitStatus.TARGET_MISSED
    return None


def _folders_in(folder: str, ending: str) -> Iterable[str]:
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [os.path.join(folder, name) for name in names if name.endswith(ending)]


def _time_of(folder: str) -> float:
    try:
        return os.path.getmtime(folder)
    except OSError:
        return 0.0


def _matching(
    folders: Iterable[str], settings: Mapping[str, Any], ranks: int
) -> Iterator[UnfinishedRun]:
    for folder in folders:
        for path in choice.list_runs(folder)[:1]:
            try:
                run = store.read_run(path)
            except DamagedError as error:
                print_to_stderr(f"note: {path} is passed over: {error}")
                continue
            if run.outcome or not store.list_checkpoints(path) or run.ranks != ranks:
                continue
            if _is_same(settings, run.settings) and not choice.is_locked(folder):
                log = (
                    run.log
                    if settings["checkpoint_dir"]
                    else f"{folder[: -len(choice.SUFFIX)]}.log"
                )
                if log:
                    yield UnfinishedRun(log, run.started)


def _is_same(settings: Mapping[str, Any], others: Dict[str, Any]) -> bool:
    if settings["seed"] not in (None, others.get("seed")):
        return False
    return not differing_settings(settings, others)
