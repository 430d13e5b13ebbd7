# SPDX-License-Identifier: Apache-2.0
"""Trials on the machines of a Slurm job (run.sub), with or without pyxis containers.

Outside a job, `SlurmBackend.prepare` replaces this process with sbatch, which submits run.sub.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from typing import Iterator, List, Mapping, NoReturn, Sequence

from mxresnet.errors import UserError
from mxresnet.launch import requeue
from mxresnet.launch.backends.base import Backend, Trial
from mxresnet.launch.page_cache import drop_command
from mxresnet.launch.processes import (
    STOP_SIGNALS,
    Stream,
    find_program,
    raise_if_stopped,
    replace_process,
    run_to_end,
)
from mxresnet.launch.run import environment_python
from mxresnet.launch.run_log import make_log_folder
from mxresnet.launch.system_config import check_system, load_configuration
from mxresnet.launch.terminal import OutputError, print_to_stderr, write_to_stdout
from mxresnet.launch.trial_settings import check_flags, number_of_trials

DATA_IN_CONTAINER = "/data"
LOGDIR_IN_CONTAINER = "/results"
# Ranks end together: a rank that still runs this long after the first one has ended is stuck.
STUCK_RANK_SECONDS = 60
# The last output of the ranks may arrive this long after the end of their launcher.
DRAIN_SECONDS = 10
# srun sets the variables of a rank, but this process is none: Open MPI must not connect to Slurm.
_RUN_PYTHON = 'unset SLURM_PROCID PMI_RANK PMIX_RANK; "$(./setup_env.sh)" "$@"'
_COPY_DATASET = '"$(./setup_env.sh --launcher-python)" -m mxresnet.launch.copy_dataset "$@"'
_MLPERF_PREFIX = b":::MLLOG"


@contextlib.contextmanager
def stdout_without_mlperf_log() -> Iterator[int]:
    """Yield a file descriptor whose lines go to standard output, except those of the MLPerf log."""
    read_end, write_end = os.pipe()

    def copy_lines() -> None:
        # Leave signals to the main thread, which runs the handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        # The ranks write on when standard output is lost: the trial is not lost with it.
        with open(read_end, "rb") as lines:
            for line in lines:
                if not line.startswith(_MLPERF_PREFIX):
                    with contextlib.suppress(OutputError):
                        write_to_stdout(line)

    thread = threading.Thread(target=copy_lines, daemon=True)
    thread.start()
    try:
        yield write_end
    finally:
        os.close(write_end)
        thread.join(DRAIN_SECONDS)


class SlurmBackend(Backend):
    """Trials on the machines of the Slurm job that this process runs in."""

    program = "run.sub"

    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__(environ)
        self._python = ""  # path of the environment's python; not used with containers
        self._launcher: List[str] = []  # the command that starts the ranks

    @property
    def remote_logdir(self) -> str:
        return LOGDIR_IN_CONTAINER if self._image else self.logdir

    @property
    def _image(self) -> str:
        """The image of the containers; empty: no containers."""
        return self.environ.get("CONT", "")

    @property
    def _machines(self) -> str:
        return self.environ.get("SLURM_JOB_NUM_NODES") or "1"

    def prepare(self, flags: Sequence[str]) -> None:
        system = self.required("DGXSYSTEM", "it selects config_<DGXSYSTEM>.sh")
        check_system(system)
        if not self._machines.isdecimal():
            raise UserError(f"SLURM_JOB_NUM_NODES={self._machines} is not a number of machines")
        data = self.environ.get("DATADIR", "")
        copied_from = self.environ.get("COPY_DATASET", "")
        if copied_from and not data:
            raise UserError(f"COPY_DATASET={copied_from} needs DATADIR, the folder to copy to")
        if data and not copied_from and not os.path.isdir(data):
            raise UserError(f"DATADIR={data} is not a folder: name the folder of the data set")
        if self._image and not data:
            raise UserError("DATADIR is not set: it is mounted as /data of the container")
        if self._image:
            self.check_mounts(":,")
        if not self.environ.get("SLURM_JOB_ID"):
            self._submit(system, list(flags))
        self.load_configuration(system, flags)
        make_log_folder(self.logdir)
        if copied_from:
            self._copy_dataset(copied_from, data)
        if self._image:
            self._start_containers()
        else:
            if data:
                self.environ["DATAROOT"] = os.path.realpath(data)
            # Create the environment once, not on every machine.
            self._python = environment_python(self.environ)
        self._launcher = self._choose_launcher()

    def _submit(self, system: str, arguments: List[str]) -> NoReturn:
        """Replace this process with sbatch, which queues run.sub for the configured machines.

        Args:
            system: DGXSYSTEM.
            arguments: Options of sbatch, then, after --, flags of mxresnet.

        Raises:
            UserError: A setting or a flag is wrong, or sbatch is not found.
        """
        options = self._sbatch_options(system, number_of_trials(self.environ))
        flags: List[str] = []
        if "--" in arguments:
            flags = arguments[arguments.index("--") + 1 :]
            arguments = arguments[: arguments.index("--")]
        check_flags(flags, self.environ)
        if find_program("sbatch", self.environ) is None:
            raise UserError("sbatch is not found on PATH: run.sub needs a Slurm cluster")
        # The caller's environment: a configuration may depend on the machine where it is loaded.
        # Without SBATCH_NETWORK, which a configuration that was sourced before may have left.
        env = {name: value for name, value in self.environ.items() if name != "SBATCH_NETWORK"}
        replace_process(["sbatch", *options, *arguments, "./run.sub", *flags], env)

    def _sbatch_options(self, system: str, trials: int) -> List[str]:
        """Return the options of sbatch for the machines, ranks and time of a configuration."""
        config = load_configuration(system, self.environ)
        options = [f"--nodes={config.get('DGXNNODES') or 1}"]
        options.append(f"--ntasks-per-node={config.get('DGXNGPU', '')}")
        minutes = config.get("WALLTIME")
        if minutes:
            if not minutes.isdecimal():
                raise UserError(f"WALLTIME={minutes} is not a number of minutes for one trial")
            options.append(f"--time={int(minutes) * trials}")
        if requeue.writes_checkpoints(self.environ):
            options += requeue.SBATCH_OPTIONS
        if config.get("SBATCH_NETWORK"):
            options.append(f"--network={config['SBATCH_NETWORK']}")
        return options

    def _srun(self, arguments: Sequence[str], stdout: Stream = None, stderr: Stream = None) -> int:
        """Run srun with arguments; return its exit status."""
        return run_to_end(["srun", *arguments], env=self.environ, stdout=stdout, stderr=stderr)

    def _on_each_machine(self, arguments: Sequence[str], stderr: Stream = None) -> int:
        """Run a command once on each machine; return the exit status of srun."""
        options = [f"--ntasks={self._machines}", "--ntasks-per-node=1", "--mpi=none"]
        return self._srun([*options, *arguments], stderr=stderr)

    def _copy_dataset(self, source: str, destination: str) -> None:
        """Copy the data set to each machine, outside of containers."""
        command = ["sh", "-c", _COPY_DATASET, "-", source, destination]
        if self._on_each_machine(command) != 0:
            raise_if_stopped()
            raise UserError(
                f"COPY_DATASET={source} could not be copied to DATADIR={destination} of every "
                "machine"
            )

    @property
    def _container_name_option(self) -> str:
        return f"--container-name=mxresnet_{self.environ['SLURM_JOB_ID']}"

    def _container_options(self) -> List[str]:
        """Return the options of srun that run a command in the containers; none without CONT."""
        if not self._image:
            return []
        data, logdir = (os.path.realpath(path) for path in (self.environ["DATADIR"], self.logdir))
        mounts = f"{data}:{DATA_IN_CONTAINER}:ro,{logdir}:{LOGDIR_IN_CONTAINER}"
        return [self._container_name_option, f"--container-mounts={mounts}"]

    def _start_containers(self) -> None:
        """Create the container of all trials on each machine."""
        image = self._image
        print_to_stderr(f"making the container of CONT={image} on {self._machines} machines")
        options = [f"--container-image={image}", self._container_name_option]
        if self._on_each_machine([*options, "true"]) != 0:
            raise_if_stopped()
            raise UserError(f"CONT={image}: the container could not be made")

    def _choose_launcher(self) -> List[str]:
        """Return the command that starts the ranks: srun with PMIx, else mpirun.

        Raises:
            UserError: Ranks in containers need PMIx, which does not work.
        """
        ranks_per_machine = self.environ["DGXNGPU"]
        ranks = int(self._machines) * int(ranks_per_machine)
        mpi_type = self.environ.get("SLURM_MPI_TYPE") or "pmix"
        if mpi_type.startswith("pmix") and self._mpi_type_works(mpi_type):
            # Components that both Open MPI's own PMIx and Slurm's PMIx have.
            self.environ.update(PMIX_MCA_gds="hash", PMIX_MCA_psec="native")
            return [
                *("srun", f"--mpi={mpi_type}", f"--ntasks={ranks}"),
                *(f"--ntasks-per-node={ranks_per_machine}", "--cpu-bind=none"),
                *("--kill-on-bad-exit=0", f"--wait={STUCK_RANK_SECONDS}"),
            ]
        raise_if_stopped()
        if self._image:
            raise UserError(
                f"srun --mpi={mpi_type} does not work here, and ranks in containers need it "
                "(srun --mpi=list)"
            )
        print_to_stderr(f"note: srun --mpi={mpi_type} does not work here: mpirun starts the ranks")
        launcher = [os.path.join(os.path.dirname(self._python), "mpirun"), "-np", str(ranks)]
        launcher += ["--map-by", f"ppr:{ranks_per_machine}:node", "--bind-to", "none", "-q"]
        return [*launcher, *(["--allow-run-as-root"] if os.getuid() == 0 else [])]

    def _mpi_type_works(self, mpi_type: str) -> bool:
        options = [f"--mpi={mpi_type}", "--nodes=1", "--ntasks=1"]
        return self._srun([*options, "true"], stderr=subprocess.DEVNULL) == 0

    def run_trial(self, trial: Trial, flags: Sequence[str]) -> int:
        env = {**self.environ, **trial.variables(), "LOGDIR": trial.logdir}
        if self._image:
            env.update(
                DATAROOT=DATA_IN_CONTAINER,
                LOGDIR=LOGDIR_IN_CONTAINER,
                CONFIG_LOADED=env["DGXSYSTEM"],
            )
        command = [*self._launcher, *self._container_options(), "./run_and_time.sh", *flags]
        with stdout_without_mlperf_log() as stdout:
            stop_seconds = requeue.stop_seconds(env)
            return run_to_end(command, env=env, stdout=stdout, stop_seconds=stop_seconds)

    def check_settings(self, trial: Trial, flags: Sequence[str]) -> int:
        """Check the settings with mxresnet, in one process and not in every rank."""
        arguments = ["-m", "mxresnet", "--print-config", *flags]
        return self._run_python(
            arguments, {**self.environ, **trial.variables()}, subprocess.DEVNULL
        )

    def drop_caches(self) -> bool:
        return self._on_each_machine(drop_command(self.environ), stderr=subprocess.DEVNULL) == 0

    def run_python(self, arguments: Sequence[str], stdout: Stream, stderr: Stream = None) -> int:
        return self._run_python(arguments, self.environ, stdout, stderr)

    def _run_python(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str],
        stdout: Stream,
        stderr: Stream = None,
    ) -> int:
        if self._image:
            command = ["srun", "--nodes=1", "--ntasks=1", "--mpi=none", *self._container_options()]
            command += ["sh", "-c", _RUN_PYTHON, "-"]
        else:
            command = [self._python]
        return run_to_end([*command, *arguments], env=env, stdout=stdout, stderr=stderr)
