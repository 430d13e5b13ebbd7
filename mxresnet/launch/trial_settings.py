# SPDX-License-Identifier: Apache-2.0
"""Settings of a series of trials: how many, their seeds, the folder and names of their logs."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import List, Mapping, Sequence

from mxresnet.errors import UserError
from mxresnet.launch.run_log import check_name_part, make_log_folder
from mxresnet.launch.system_config import reject_log_file

DEFAULT_TRIALS = "5"  # as MLPerf requires for this benchmark
DRAWN_SEEDS = 65536  # random seeds are drawn below this number


@dataclass(frozen=True)
class TrialSettings:
    """Settings of a series of trials."""

    seeds: List[int]  # of the trials, in their order
    clear_caches: bool  # drop the page cache before each trial
    logdir: str
    stamp: str  # start of the names of all files; empty: not chosen yet

    @property
    def prefix(self) -> str:
        """The start of the paths of all files."""
        return f"{self.logdir}/{self.stamp}"

    def log_path(self, number: int) -> str:
        """Return the path of the log of a trial, from 1."""
        return f"{self.prefix}_{number}.log"


def number_of_trials(environ: Mapping[str, str]) -> int:
    """Return NEXP, the number of trials.

    Raises:
        UserError: It is not a number from 1 to 9999.
    """
    text = environ.get("NEXP") or DEFAULT_TRIALS
    if not re.fullmatch("[1-9][0-9]{0,3}", text):
        raise UserError(f"NEXP={text} is not a number of trials: use a number from 1 to 9999")
    return int(text)


def check_flags(flags: Sequence[str], environ: Mapping[str, str]) -> None:
    """Raise UserError for flags that are valid for a single run only."""
    reject_log_file(flags, environ)
    for flag in flags:
        if flag == "--seed" or flag.startswith("--seed="):
            raise UserError("--seed: every trial has its own seed: set SEED or SEEDS")
        if flag in ("--help", "-h", "--print-config"):
            raise UserError(f"{flag}: use ./run_and_time.sh {flag}")


def _parse_seed(variable: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UserError(f"{variable}: {text} is not a whole number below 1000000000")
    return int(text)


def choose_seeds(trials: int, environ: Mapping[str, str]) -> List[int]:
    """Return a different seed for each trial.

    They are those in SEEDS; without SEEDS, they count up from SEED; without SEED, they are random.

    Raises:
        UserError: SEED or SEEDS is wrong.
    """
    text = environ.get("SEEDS", "")
    if not text:
        first = environ.get("SEED")
        if not first:
            return random.SystemRandom().sample(range(DRAWN_SEEDS), trials)
        seed = _parse_seed(f"SEED={first}", first)
        _parse_seed(f"SEED={first} of the last trial", str(seed + trials - 1))
        return list(range(seed, seed + trials))
    seeds = [_parse_seed(f"SEEDS={text}", word) for word in text.replace(",", " ").split()]
    if len(seeds) != trials:
        raise UserError(
            f"SEEDS={text} are {len(seeds)} seeds for NEXP={trials} trials: give one seed for each"
        )
    if len(set(seeds)) != trials:
        raise UserError(f"SEEDS={text}: every trial needs a seed of its own")
    return seeds


def read_trial_settings(
    flags: Sequence[str], environ: Mapping[str, str], logdir: str
) -> TrialSettings:
    """Check the settings of a series of trials, and make the folder of its logs.

    Raises:
        UserError: A setting or a flag is wrong, or the folder cannot be written.
    """
    check_flags(flags, environ)
    trials = number_of_trials(environ)
    clear_caches = environ.get("CLEAR_CACHES") or "1"
    if clear_caches not in ("0", "1", "sudo"):
        raise UserError(f"CLEAR_CACHES={clear_caches} is not 0, 1 or sudo")
    seeds = choose_seeds(trials, environ)
    stamp = environ.get("DATESTAMP") or ""
    check_name_part("DATESTAMP", stamp)
    make_log_folder(logdir)
    return TrialSettings(seeds, clear_caches != "0", logdir, stamp)
