# SPDX-License-Identifier: Apache-2.0
"""Configurations of systems: their names, the variables they export, the variables a rank reads.

A configuration (config_<system>.sh) is a bash file because it may inspect the machine. A separate
bash sources it and prints the resulting environment, which becomes the environment of the run.
"""

from __future__ import annotations

import os
import pathlib
import re
import shlex
import subprocess
from typing import Container, Dict, Iterable, List, Mapping, Sequence

from mxresnet.config import FIELDS, flag_of
from mxresnet.errors import UserError
from mxresnet.launch.terminal import write_to_stderr
from mxresnet.process_guard import end_with_parent

PROJECT_FOLDER = pathlib.Path(__file__).absolute().parents[2]

# Variables that bash sets for itself.
_BASH_VARIABLES = ("PWD", "OLDPWD", "SHLVL", "_")
# Variables of the launchers that a rank, or run_and_time.sh as a rank, reads.
_LAUNCHER_VARIABLES = (
    *("DGXSYSTEM", "DGXNGPU", "DGXNNODES", "BIND"),
    *("LOGDIR", "DATESTAMP", "TRIAL", "JOB_UID", "PROFILE_ALL_LOCAL_RANKS"),
)
# Further variables of the launchers that a configuration may set.
_CONFIGURATION_VARIABLES = ("WALLTIME", "BUILTIN_DATA", "SBATCH_NETWORK")
# Some of the hyperparameters that every configuration sets.
_NEEDED_SETTINGS = ("batch_size", "lr", "optimizer", "num_epochs", "wd", "mom", "image_shape")
# Hyperparameters that a configuration may leave to the caller, and their flags.
_CHOSEN_BY_CALLER = {"NUMEPOCHS": flag_of("num_epochs")}
_LIBRARY_PREFIXES = (
    *("MXNET_", "HOROVOD_", "NCCL_", "OMP_", "DALI_", "UCX_"),
    *("MALLOC_", "DMLC_"),
)

# Whatever the configuration writes goes to standard error, also from a trap at the end of bash. The
# caller may have exported functions with the names of commands.
_READ_CONFIGURATION = """
unset -f dirname env grep nproc; set -euo pipefail
exec 3>&1 >&2; source "$1" 3>&-; env -0 >&3; compgen -v >&3
"""


def systems() -> List[str]:
    """Return the names of all systems that have a configuration, sorted."""
    names = [path.name[len("config_") : -len(".sh")] for path in PROJECT_FOLDER.glob("config_*.sh")]
    return sorted(name for name in names if not name.endswith("common"))


def systems_text() -> str:
    """Return the names of all systems for an error message."""
    return " ".join(systems())


def check_system(system: str) -> None:
    """Raise UserError if a system has no configuration."""
    if system not in systems():
        raise UserError(
            f"DGXSYSTEM={system} has no config_{system}.sh: use one of: {systems_text()}"
        )


def load_configuration(system: str, environ: Mapping[str, str]) -> Dict[str, str]:
    """Return the environment of a run on a system.

    Args:
        system: Name of the system, as in DGXSYSTEM.
        environ: Environment in which the configuration is sourced.

    Returns:
        The environment with what config_<system>.sh exports.

    Raises:
        UserError: The system is unknown, its configuration failed or sets a variable of a rank
            without exporting it, or it has no valid number of ranks.
    """
    check_system(system)
    name = f"config_{system}.sh"
    # Files, not pipes: a process that the configuration leaves in the background keeps a pipe open.
    with open(os.memfd_create("out"), "w+b") as out, open(os.memfd_create("err"), "w+b") as err:
        # --norc: under sshd, "bash -c" would read the user's .bashrc, which may change PATH.
        status = subprocess.run(
            ["bash", "--norc", "-c", _READ_CONFIGURATION, "bash", f"./{name}"],
            cwd=PROJECT_FOLDER,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            preexec_fn=end_with_parent,
        ).returncode
        exported, messages = (
            os.pread(f.fileno(), os.fstat(f.fileno()).st_size, 0) for f in (out, err)
        )
    if status != 0:
        raise UserError(os.fsdecode(messages).strip() or f"{name} failed with status {status}")
    write_to_stderr(messages)
    if not exported:
        raise UserError(f"{name} exits: a configuration must run to its end, or return")
    *variables, names = os.fsdecode(exported).split("\0")
    items = (item.partition("=") for item in variables)
    after = {key: value for key, _, value in items if key not in _BASH_VARIABLES}
    _check_exports(name, set(names.split()) - set(after))
    if after.get("DGXNGPU"):
        number_of_ranks(after)
    return {**after, **{key: environ[key] for key in _BASH_VARIABLES if key in environ}}


def _check_exports(file: str, not_exported: Iterable[str]) -> None:
    """Raise UserError if a configuration sets variables of a rank without exporting them."""
    lost = forwarded_env(dict.fromkeys(not_exported, ""), also=_CONFIGURATION_VARIABLES)
    if lost:
        raise UserError(
            f"{file} sets {', '.join(lost)} without export, so that the run would not get "
            f"{'it' if len(lost) == 1 else 'them'}: write export before each"
        )


def check_loaded(system: str, environ: Mapping[str, str]) -> None:
    """Raise UserError if an environment lacks a variable that every configuration sets.

    CONFIG_LOADED is then left over in the caller's shell, without the configuration's variables.
    """
    needed = ("DGXNGPU", *(FIELDS[name].metadata["env"] for name in _NEEDED_SETTINGS))
    missing = [name for name in needed if not environ.get(name)]
    if missing:
        raise UserError(
            f"CONFIG_LOADED={system} is set, and {', '.join(missing)} of config_{system}.sh are "
            "not: only a launcher sets it, for a container: unset CONFIG_LOADED"
        )


def number_of_ranks(environ: Mapping[str, str]) -> int:
    """Return the number of ranks that a loaded configuration is for, on all its machines.

    Raises:
        UserError: DGXNGPU or DGXNNODES is not a whole number from 1 to 99999.
    """
    ranks, machines = environ.get("DGXNGPU", ""), environ.get("DGXNNODES") or "1"
    if not all(re.fullmatch("[1-9][0-9]{0,4}", text) for text in (ranks, machines)):
        raise UserError(
            f"DGXNGPU={ranks} ranks on each of DGXNNODES={machines} machines: "
            "both must be whole numbers from 1 to 99999"
        )
    return int(ranks) * int(machines)


def overridden_settings(
    system: str,
    before: Mapping[str, str],
    after: Mapping[str, str],
    flags: Sequence[str] = (),
) -> List[str]:
    """Return a note for each variable of the caller that a configuration overrides.

    Args:
        system: Name of the system whose configuration was loaded.
        before: Environment of the caller.
        after: Environment that `load_configuration` returned for it.
        flags: Flags of the run. A setting that is given as a flag is not reported, because flags
            take precedence over both.

    Returns:
        Notes for the terminal, sorted by the names of the variables.
    """
    flag_of_variable = {field.metadata["env"]: flag_of(name) for name, field in FIELDS.items()}
    given = {flag.partition("=")[0] for flag in flags}
    notes = []
    for name in forwarded_env(before, also=_CONFIGURATION_VARIABLES):
        flag = flag_of_variable.get(name)
        if not before[name] or before[name] == after.get(name) or flag in given:
            continue
        advice = f"use {flag} {shlex.quote(before[name])}" if flag else "change it there"
        change = f"{name}={after[name]}" if name in after else f"unset {name}"
        notes.append(
            f"note: {name}={before[name]} from the environment is overridden by "
            f"config_{system}.sh ({change}): {advice}"
        )
    return notes + _kept_settings(system, before, after, given)


def _kept_settings(
    system: str, before: Mapping[str, str], after: Mapping[str, str], given: Container[str]
) -> List[str]:
    """Return a note for each hyperparameter of the caller that replaces the configuration's own.

    It may be left over from another configuration that was sourced in the caller's shell.
    """
    kept = [
        name
        for name, flag in _CHOSEN_BY_CALLER.items()
        if before.get(name) and before[name] == after.get(name) and flag not in given
    ]
    if not kept:
        return []
    own = load_configuration(system, {k: v for k, v in before.items() if k not in kept})
    return [
        f"note: {name}={before[name]} from the environment replaces {name}={own[name]} of "
        f"config_{system}.sh"
        for name in kept
        if own.get(name, before[name]) != before[name]
    ]


def forwarded_env(environ: Mapping[str, str], also: Iterable[str] = ()) -> List[str]:
    """Return the names of the variables of an environment that a rank reads, sorted.

    These are the settings of mxresnet, the variables of launchers that ranks read, and the
    variables of libraries. A launcher that starts ranks on other machines or in a container
    forwards only these.

    Args:
        environ: Environment of the launcher.
        also: Further names to forward if they are set.
    """
    names = {*(field.metadata["env"] for field in FIELDS.values()), *_LAUNCHER_VARIABLES, *also}
    return sorted(name for name in environ if name in names or name.startswith(_LIBRARY_PREFIXES))


def reject_log_file(flags: Sequence[str], environ: Mapping[str, str]) -> None:
    """Raise UserError if the caller names a log file: the launchers choose its path."""
    reason = "the logs go to LOGDIR, named by DATESTAMP and TRIAL"
    if any(flag.partition("=")[0] == "--log-file" for flag in flags):
        raise UserError(f"--log-file: {reason}")
    if environ.get("LOG_FILE"):
        raise UserError(f"LOG_FILE={environ['LOG_FILE']}: {reason}")
