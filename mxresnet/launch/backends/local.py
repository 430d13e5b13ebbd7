# SPDX-License-Identifier: Apache-2.0
"""Trials on this machine, without a container (run_trials.sh)."""

from __future__ import annotations

import subprocess
from typing import Sequence

from mxresnet.errors import UserError
from mxresnet.launch.backends.base import Backend, Trial, run_with_stdout_kept
from mxresnet.launch.page_cache import drop_page_cache
from mxresnet.launch.processes import Stream, run_to_end
from mxresnet.launch.run import environment_python
from mxresnet.launch.system_config import load_configuration


class LocalBackend(Backend):
    """Trials on this machine."""

    program = "run_trials.sh"

    def prepare(self, flags: Sequence[str]) -> None:
        """Raise UserError for several machines, or for a data set to copy."""
        if self.environ.get("COPY_DATASET"):
            raise UserError(
                f"COPY_DATASET={self.environ['COPY_DATASET']}: only run.sub and run_with_docker.sh "
                "copy the data set; use python -m mxresnet.launch.copy_dataset SOURCE DATAROOT"
            )
        system = self.environ.get("DGXSYSTEM")
        if not system:
            return
        machines = load_configuration(system, self.environ).get("DGXNNODES") or "1"
        if machines != "1":
            raise UserError(
                f"DGXSYSTEM={system} is for {machines} machines: "
                "./run.sub starts it under Slurm, k8s/ on Kubernetes"
            )

    def run_trial(self, trial: Trial, flags: Sequence[str]) -> int:
        return run_with_stdout_kept(lambda stdout: self._run_and_time(trial, flags, stdout))

    def check_settings(self, trial: Trial, flags: Sequence[str]) -> int:
        return self._run_and_time(trial, ["--print-config", *flags], stdout=subprocess.DEVNULL)

    def _run_and_time(self, trial: Trial, flags: Sequence[str], stdout: Stream) -> int:
        env = {**self.environ, **trial.variables(), "LOGDIR": trial.logdir}
        return run_to_end(["./run_and_time.sh", *flags], env=env, stdout=stdout)

    def drop_caches(self) -> bool:
        return drop_page_cache(self.environ)

    def run_python(self, arguments: Sequence[str], stdout: Stream, stderr: Stream = None) -> int:
        command = [environment_python(self.environ), *arguments]
        return run_to_end(command, env=self.environ, stdout=stdout, stderr=stderr)
