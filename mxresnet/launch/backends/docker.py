# SPDX-License-Identifier: Apache-2.0
"""Trials in a container on this machine (run_with_docker.sh)."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from typing import Dict, List, Mapping, Optional, Sequence

from mxresnet.errors import UserError
from mxresnet.launch import nccl_test
from mxresnet.launch.backends.base import Backend, Trial, run_with_stdout_kept
from mxresnet.launch.copy_dataset import copy_dataset
from mxresnet.launch.page_cache import DROP_CACHES_FILE, drop_page_cache
from mxresnet.launch.processes import (
    Stream,
    capture_output,
    find_program,
    raise_if_stopped,
    run_to_end,
)
from mxresnet.launch.run_log import make_log_folder
from mxresnet.launch.system_config import check_system, forwarded_env, load_configuration
from mxresnet.process_guard import end_with_parent

DATA_IN_CONTAINER = "/data"
LOGDIR_IN_CONTAINER = "/results"
# Variables that differ between trials, whose path differs in the container, or that name network
# interfaces and adapters of the machine, which the container does not have.
_NOT_FORWARDED = (
    *("LOG_FILE", "LOGDIR", "SEED", "TRIAL", "DATESTAMP", nccl_test.VARIABLE),
    *("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA", "UCX_NET_DEVICES"),
)
# At most this much shared memory, for NCCL and Open MPI: as in k8s/. Docker's default is 64 MiB.
_SHARED_MEMORY = "16g"
# Waits for a line or for the end of the process that writes to its standard input. In the second
# case docker may just be making the container.
_REMOVE_AT_END = """
read -r line; docker rm --force "$0"; [ "$line" ] || { sleep 3; docker rm --force "$0"; }
"""
_RUN_PYTHON = '"$(./setup_env.sh)" "$@"'


def docker_env_args(variables: Mapping[str, str]) -> List[str]:
    """Return the options of docker exec that set variables."""
    return [word for name, value in variables.items() for word in ("-e", f"{name}={value}")]


class DockerBackend(Backend):
    """Trials in one container that runs until all trials have ended."""

    program = "run_with_docker.sh"

    def __init__(self, environ: Mapping[str, str]) -> None:
        super().__init__(environ)
        self._container = f"mxresnet_{os.getpid()}"
        self._remover: Optional[subprocess.Popen] = None
        self._forwarded: Dict[str, str] = {}

    @property
    def remote_logdir(self) -> str:
        return LOGDIR_IN_CONTAINER

    def prepare(self, flags: Sequence[str]) -> None:
        image = self.required("CONT", "name the image")
        system = self.required("DGXSYSTEM", "it selects config_<DGXSYSTEM>.sh")
        check_system(system)
        data = self.environ.get("DATADIR", "")
        if data and self.environ.get("COPY_DATASET"):
            copy_dataset(self.environ["COPY_DATASET"], data)
        if not os.path.isdir(data):
            raise UserError(f"DATADIR={data} is not a folder: name the folder of the data set")
        self.check_mounts(":")
        if find_program("docker", self.environ) is None:
            raise UserError("docker is not found on PATH: install it")
        self._choose_variables(system, flags)
        make_log_folder(self.logdir)
        self._start_container(image, data)

    def _choose_variables(self, system: str, flags: Sequence[str]) -> None:
        """Load the configuration of this checkout, and select the variables for the container.

        These are the variables that the configuration exports, the caller's settings of mxresnet,
        and the variables of libraries.
        """
        exported = load_configuration(system, {"PATH": self.environ.get("PATH", os.defpath)})
        self.load_configuration(system, flags)
        self.environ["DATAROOT"] = DATA_IN_CONTAINER
        submission = [name for name in self.environ if name.startswith("SUBMISSION_")]
        names = forwarded_env(self.environ, also=[*exported, *submission, "DATAROOT"])
        skipped = (*_NOT_FORWARDED, "PATH")
        self._forwarded = {name: self.environ[name] for name in names if name not in skipped}
        self._forwarded.update(CONFIG_LOADED=system, LOGDIR=LOGDIR_IN_CONTAINER)
        if self._forwarded.get("BIND"):
            self._forwarded["BIND"] += " --ib=off"
        # Some default seccomp profiles refuse the system call that it would use.
        self._forwarded["OMPI_MCA_btl_vader_single_copy_mechanism"] = "none"

    def _run_options(self, data: str) -> List[str]:
        """Return the options of docker run for the container of the trials.

        The ranks of one machine exchange everything through shared memory, the GPUs and the
        loopback interface: the container needs no network, and nothing of the machine's. It runs
        as the caller, to whom the logs then belong. A capability is needed to bind memory to NUMA
        nodes (bind.sh): Docker's default seccomp profile permits that only together with it.
        """
        options = ["--detach", "--rm", "--name", self._container, "--init"]
        # The name of the machine is in the log and in the description of the system.
        options += ["--network", "none", "--hostname", platform.node() or "localhost"]
        options += ["--shm-size", _SHARED_MEMORY]
        user = "0:0" if self._is_rootless() else f"{os.getuid()}:{os.getgid()}"
        options += ["--user", user, "--cap-drop", "ALL"]
        if user.startswith("0:"):
            # The folder of the logs may belong to another user.
            options += ["--cap-add", "DAC_OVERRIDE"]
        if self._forwarded.get("BIND"):
            options += ["--cap-add", "SYS_NICE"]
        options += ["--security-opt", "no-new-privileges"]
        default_gpus = "none" if self.environ["DGXSYSTEM"].startswith("CPU") else "all"
        gpus = self.environ.get("DOCKER_GPUS") or default_gpus
        if gpus != "none":
            # The limits that NVIDIA's documentation requires for its libraries in containers.
            options += ["--gpus", gpus, "--ulimit", "memlock=-1", "--ulimit", "stack=67108864"]
        mode = "rw" if self.environ.get("BUILTIN_DATA") else "ro"
        options += ["--volume", f"{os.path.realpath(data)}:{DATA_IN_CONTAINER}:{mode}"]
        options += ["--volume", f"{os.path.realpath(self.logdir)}:{LOGDIR_IN_CONTAINER}"]
        return options

    def _is_rootless(self) -> bool:
        """Return whether docker runs without root: the container's root user is then the caller."""
        done = capture_output(["docker", "info", "--format", "{{json .}}"], self.environ)
        return bool(re.search(r'name=rootless|"rootless": *true', done.stdout, re.IGNORECASE))

    def _start_container(self, image: str, data: str) -> None:
        """Start the container of the trials.

        Raises:
            UserError: docker cannot start it, or the image does not have this project.
        """
        self._remover = self._start_remover()
        command = ["docker", "run", *self._run_options(data), "--entrypoint", "sleep", image]
        # Not run_to_end: it would end the process by which Podman, as docker, keeps a container.
        status = subprocess.run(
            [*command, "infinity"],
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            preexec_fn=end_with_parent,
        ).returncode
        if status != 0:
            raise UserError(f"docker cannot start a container of CONT={image}")
        if self._docker(["exec", self._container, "test", "-x", "run_and_time.sh"]) != 0:
            raise_if_stopped()
            raise UserError(f"CONT={image} has no run_and_time.sh in its working directory")

    def _start_remover(self) -> subprocess.Popen:
        """Start a process that removes the container when this process ends, also by SIGKILL."""
        return subprocess.Popen(
            ["sh", "-c", _REMOVE_AT_END, self._container],
            env=self.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def close(self) -> None:
        if self._remover:
            self._remover.communicate(b"close\n")

    def _docker(
        self, arguments: Sequence[str], stdout: Stream = None, stderr: Stream = None
    ) -> int:
        """Run docker with arguments; return its exit status."""
        return run_to_end(["docker", *arguments], env=self.environ, stdout=stdout, stderr=stderr)

    def run_trial(self, trial: Trial, flags: Sequence[str]) -> int:
        return run_with_stdout_kept(lambda stdout: self._run_and_time(trial, flags, stdout))

    def check_settings(self, trial: Trial, flags: Sequence[str]) -> int:
        return self._run_and_time(trial, ["--print-config", *flags], stdout=subprocess.DEVNULL)

    def _run_and_time(self, trial: Trial, flags: Sequence[str], stdout: Stream) -> int:
        variables = docker_env_args({**self._forwarded, **trial.variables()})
        command = ["exec", *variables, self._container, "./run_and_time.sh", *flags]
        return self._docker(command, stdout=stdout)

    def drop_caches(self) -> bool:
        """Drop the page cache of this machine.

        Without root and sudo this needs a container of the image CLEAR_CACHES_IMAGE, which gets
        only the one file of /proc that drops the cache.
        """
        if drop_page_cache(self.environ):
            return True
        image = self.environ.get("CLEAR_CACHES_IMAGE")
        if not image:
            return False
        command = ["run", "--rm", "--network", "none", "--cap-drop", "ALL"]
        command += ["--security-opt", "no-new-privileges", "--entrypoint", "sh"]
        command += ["--volume", f"{DROP_CACHES_FILE}:/drop_caches", image]
        command += ["-c", "echo 3 >/drop_caches"]
        return self._docker(command, subprocess.DEVNULL, subprocess.DEVNULL) == 0

    def run_python(self, arguments: Sequence[str], stdout: Stream, stderr: Stream = None) -> int:
        command = ["exec", self._container, "sh", "-c", _RUN_PYTHON, "-", *arguments]
        return self._docker(command, stdout, stderr)
