# SPDX-License-Identifier: Apache-2.0
"""One timed training run: the program behind ./run_and_time.sh.

It has one of three roles:

- started by hand: create the environment and the built-in data, run the ranks of this machine, show
  their progress;
- one rank, started by mpirun or srun: run only this rank;
- the launcher of an MPIJob: start ./run_and_time.sh on the workers, once for each rank.

Exit status: 0 target accuracy reached, or nothing evaluated (then there is no RESULT line); 3
target missed; 2 a mistake in settings or data; anything else a failure.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from mxresnet.environment import check_python_path, check_temporary_folder
from mxresnet.errors import ExitStatus, UserError
from mxresnet.launch import (
    builtin_data,
    caller_paths,
    hardware,
    kubernetes,
    mpi,
    nccl_test,
    nsys,
    processes,
    refused_variables,
    run_log,
    system_config,
    timing_lines,
    unfinished,
)
from mxresnet.launch import report as launch_report
from mxresnet.launch.terminal import print_to_stderr, write_to_stdout
from mxresnet.memory import check_memory_of_ranks
from mxresnet.results.log_reader import has_evaluation

NAME = "run_and_time.sh"
SHOW_FLAGS = ("--help", "-h", "--print-config")
# Rank 0 reports a mistake that all ranks find, and its end makes mpirun end the others. They wait
# this long before they report it too.
MISTAKE_REPORT_DELAY_SECONDS = 5


@dataclass(frozen=True)
class Run:
    """The settings of one process of a run.

    Attributes:
        flags: Flags of python -m mxresnet.
        environ: Environment, with the configuration.
        rank: Rank of this process, or None before there are ranks.
        python: Path of the environment's python.
    """

    flags: List[str]
    environ: Dict[str, str]
    rank: Optional[int]
    python: str

    @property
    def train_command(self) -> List[str]:
        """The command of a rank, not bound to CPUs."""
        return [self.python, "-m", "mxresnet", *self.flags]

    @property
    def measures_bandwidth(self) -> bool:
        """Whether the ranks measure the bandwidth between them instead of training."""
        return nccl_test.is_wanted(self.environ)

    @property
    def bound_command(self) -> List[str]:
        """The command of a rank, bound to CPUs and profiled where the settings ask for it."""
        words = self.environ.get("BIND", "").split()
        bind = ["./bind.sh", *words, "--"] if words else []
        if self.measures_bandwidth:
            return [*bind, self.python, "-m", nccl_test.MODULE, *self.flags]
        profile = [self.python, "-m", nsys.__name__] if nsys.is_wanted(self.environ) else []
        return [*bind, *profile, *self.train_command]


def main() -> int:
    """Run, report an error in one line, and return the exit status."""
    environ = dict(os.environ)
    rank = None
    try:
        processes.handle_stop_signals()
        rank = launched_rank(environ)
        check_python_path(environ)
        return run(*caller_paths.make_absolute(sys.argv[1:], environ), rank)
    except UserError as error:
        if rank:
            for number in processes.STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            time.sleep(MISTAKE_REPORT_DELAY_SECONDS)
        report(str(error))
        return ExitStatus.USER_ERROR
    except processes.CommandFailedError as error:
        return error.status
    except OSError as error:  # a file of the run, or standard output, cannot be written
        report(str(error))
        return ExitStatus.FAILURE
    except processes.StoppedBySignal as stop:
        report(str(stop))
        return stop.status


def report(message: str) -> None:
    """Print a message of this program to standard error."""
    print_to_stderr(f"{NAME}: {message}")


def launched_rank(environ: Mapping[str, str]) -> Optional[int]:
    """Return the rank that mpirun or srun gave this process, or None if neither started it.

    Raises:
        UserError: The variable with the rank is not a number.
    """
    names = ["OMPI_COMM_WORLD_RANK", "PMIX_RANK"]
    if environ.get("SLURM_STEP_ID"):
        names.append("SLURM_PROCID")
    for name in names:
        rank = environ.get(name)
        if rank:
            if not rank.isdecimal():
                raise UserError(f"{name}={rank} is not the number of a rank")
            return int(rank)
    return None


def run(flags: List[str], environ: Dict[str, str], rank: Optional[int]) -> int:
    """Run in the role of this process; return the exit status.

    Raises:
        UserError: A mistake in settings or data.
        CommandFailedError: A command failed.
    """
    system_config.reject_log_file(flags, environ)
    refused_variables.check(environ, flags)
    run_log.check_names(environ)
    if rank is None and kubernetes.is_launcher(environ):
        return run_mpijob(flags, environ)
    environ, notes = configured_environment(flags, environ)
    only_shows = any(flag in SHOW_FLAGS for flag in flags)
    if not rank:
        if not only_shows:
            run_log.make_log_folder(environ.get("LOGDIR") or run_log.DEFAULT_LOGDIR)
        for note in notes:
            print_to_stderr(note)
    context = Run(flags, environ, rank, environment_python(environ))
    if only_shows:
        if rank:
            return ExitStatus.SUCCESS
        processes.replace_process(context.train_command, environ)
    if rank:
        processes.replace_process(context.bound_command, environ)
    if not context.measures_bandwidth:
        nsys.check(environ)
    check_number_of_ranks(context)
    settings = check_settings(context)
    mpirun = mpi.find_mpirun(context.python, environ) if rank is None else ""
    if context.measures_bandwidth:
        return run_ranks(context, mpirun, environ)
    return run_timed(context, mpirun, settings)


def run_mpijob(flags: List[str], environ: Dict[str, str]) -> int:
    """Run the ranks of an MPIJob on its workers; return their status."""
    system = environ.get("DGXSYSTEM")
    if not system:
        raise UserError(
            "DGXSYSTEM is not set, and an MPIJob's launcher cannot detect the hardware of the "
            f"workers: set it to one of: {system_config.systems_text()}"
        )
    system_config.check_system(system)
    python = environment_python(environ)
    result = kubernetes.run_job(python, flags, environ)
    cause = mpi.explain_exit(
        result.status, environ, result, lambda: kubernetes.unreachable_workers(environ)
    )
    if cause:
        report(cause)
    return result.status


def configured_environment(
    flags: Sequence[str], environ: Dict[str, str]
) -> Tuple[Dict[str, str], List[str]]:
    """Return the environment with the configuration of DGXSYSTEM, or of the hardware found.

    Returns:
        The environment, and notes: which configuration was chosen, and which variables of the
        caller it overrides.
    """
    notes = []
    system = environ.get("DGXSYSTEM")
    if not system:
        choice = hardware.choose_system(environ)
        system = choice.system
        _check_builtin_data_root(system, environ)
        notes.append(
            f"Configuration {system}, chosen from the hardware found: {choice.hardware} "
            f"(DGXSYSTEM=<name> picks another: {system_config.systems_text()})"
        )
    environ = {**environ, "DGXSYSTEM": system}
    # A launcher outside the container has loaded the configuration and set CONFIG_LOADED: the
    # container's file of this name may differ.
    if environ.pop("CONFIG_LOADED", None) == system:
        system_config.check_loaded(system, environ)
    else:
        before = environ
        environ = system_config.load_configuration(system, before)
        notes += system_config.overridden_settings(system, before, environ, flags)
    return environ, notes


def _check_builtin_data_root(system: str, environ: Mapping[str, str]) -> None:
    """Raise UserError if the built-in data would be written to the caller's own DATAROOT."""
    if system == hardware.CPU_SYSTEM and environ.get("DATAROOT"):
        raise UserError(
            f"DATAROOT={environ['DATAROOT']} is set and this machine has no GPU: set DGXSYSTEM too "
            "(CPU trains on the data in it, CPU_digits writes the built-in digits to it)"
        )


def environment_python(environ: Mapping[str, str]) -> str:
    """Return the path of the environment's python; create the environment if needed.

    Raises:
        CommandFailedError: The environment could not be created.
    """
    # In memory: a full disk need not stop a run whose environment exists.
    with open(os.memfd_create("python"), "w+b") as output:
        status = processes.run_to_end(["./setup_env.sh"], env=environ, stdout=output)
        processes.raise_if_stopped()
        if status != 0:
            raise processes.CommandFailedError(status)
        output.seek(0)
        return os.fsdecode(output.read()).strip()


def check_number_of_ranks(context: Run) -> None:
    """Compare the number of ranks with the configuration's: it determines the global batch.

    Raises:
        UserError: Started by hand, with a configuration for several machines or for more ranks than
            fit in memory, or without space for temporary files.
    """
    environ = context.environ
    system, machines = environ["DGXSYSTEM"], environ.get("DGXNNODES") or "1"
    expected = system_config.number_of_ranks(environ)
    ranks = environ.get("OMPI_COMM_WORLD_SIZE") or environ.get("SLURM_NTASKS")
    if context.rank is None:
        if machines != "1":
            raise UserError(
                f"DGXSYSTEM={system} is for {machines} machines: start it with run.sub or mpirun "
                "(this would run the ranks of one machine)"
            )
        check_memory_of_ranks(expected)
        check_temporary_folder(environ)
    elif ranks and ranks != str(expected):
        print_to_stderr(
            f"note: {ranks} ranks, where DGXSYSTEM={system} is for {expected}: "
            "the global batch is not that of the configuration"
        )


def number_of_started_ranks(context: Run) -> int:
    """Return the number of ranks of this run."""
    environ = context.environ
    ranks = environ.get("OMPI_COMM_WORLD_SIZE") or environ.get("SLURM_NTASKS") or ""
    started = context.rank is not None and ranks.isdecimal()
    return int(ranks) if started else system_config.number_of_ranks(environ)


def check_settings(context: Run) -> Dict[str, Any]:
    """Return the effective settings.

    Raises:
        CommandFailedError: mxresnet rejects them; it has printed the reason.
    """
    with open(os.memfd_create("settings"), "w+b") as output:
        command = [*context.train_command, "--print-config"]
        status = processes.run_to_end(command, env=context.environ, stdout=output)
        processes.raise_if_stopped()
        if status != 0:
            raise processes.CommandFailedError(status)
        output.seek(0)
        return json.load(output)


def run_timed(context: Run, mpirun: str, settings: Dict[str, Any]) -> int:
    """Run the ranks of this machine, or rank 0 as this process's child; print RESULT.

    An unfinished run of the same settings continues, in its log.

    Returns:
        The exit status.
    """
    started = time.time()
    if context.rank is None:
        builtin_data.make_builtin_data(NAME, context.python, context.environ)
    finished = unfinished.finished_status(context.environ, settings)
    if finished is not None:
        print_to_stderr(f"this job ({context.environ['JOB_UID']}) has finished its run already")
        return finished
    earlier = unfinished.find(context.environ, settings, number_of_started_ranks(context))
    if earlier:
        log_file, started = earlier.log or run_log.create_log(context.environ), earlier.started
        print_to_stderr(f"an unfinished run continues: {log_file} (--resume no starts a new one)")
    else:
        log_file = run_log.create_log(context.environ)
    print_to_stderr(timing_lines.start_line(started))
    status = run_ranks(context, mpirun, {**context.environ, "LOG_FILE": log_file})
    ended = time.time()
    if status in (ExitStatus.SUCCESS, ExitStatus.TARGET_MISSED):
        print_to_stderr(timing_lines.end_line(ended))
        loss = run_log.explain_loss(log_file)
        if loss:
            report(loss)
            return ExitStatus.FAILURE
    if not run_log.remove_empty(log_file) and os.path.lexists(log_file):
        print_to_stderr(f"log: {log_file}")
    # A run without an evaluation has no result: --synth-data, --profile, too few epochs.
    if status == 0 and has_evaluation(log_file):
        write_to_stdout(os.fsencode(timing_lines.result_line(started, ended)) + b"\n")
        write_report(context, log_file)
    return status


def write_report(context: Run, log_file: str) -> None:
    """Write the page about a run that was started by hand; print its path if there is one."""
    environ = context.environ
    is_alone = context.rank is None and not environ.get(run_log.SERIES_VARIABLE)
    if not is_alone or not launch_report.is_wanted(environ):
        return
    page = f"{os.path.splitext(log_file)[0]}.html"
    command = [context.python, *launch_report.python_arguments(log_file, page)]
    null = subprocess.DEVNULL
    processes.run_to_end(command, env=environ, stdout=null, stderr=null)
    processes.raise_if_stopped()
    if os.path.isfile(page):
        print_to_stderr(f"report: {page}")


def run_ranks(context: Run, mpirun: str, environ: Mapping[str, str]) -> int:
    """Run the ranks of this machine, or rank 0 as this process's child; explain their end.

    Returns:
        The exit status.
    """
    mpirun_result = None
    if context.rank is None:
        ranks = int(environ["DGXNGPU"])
        mpirun_result = mpi.run_local_ranks(mpirun, context.bound_command, ranks, environ)
        status = mpirun_result.status
    else:
        # In the process group of this rank, which mpirun or Slurm ends.
        status = processes.run_to_end(
            context.bound_command,
            env=environ,
            new_session=False,
            stop_seconds=unfinished.stop_seconds(environ),
        )
    # A launcher that started this rank explains the end itself.
    if not environ.get("STARTED_BY"):
        cause = mpi.explain_exit(status, environ, mpirun_result)
        if cause:
            report(cause)
    return status


if __name__ == "__main__":
    sys.exit(main())
