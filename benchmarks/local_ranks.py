# SPDX-License-Identifier: Apache-2.0
"""The command and the environment that start Python as ranks on this machine."""

import sys

from mxresnet.launch import mpi


def mpirun_command(ranks, environ, *arguments):
    """Return the command that starts this Python with arguments as a number of ranks.

    Raises:
        UserError: There is no mpirun.
    """
    return [
        mpi.find_mpirun(sys.executable, environ),
        *("-np", str(ranks), "--oversubscribe", "--bind-to", "none"),
        *("--mca", "mpi_yield_when_idle", "1"),
        sys.executable,
        *map(str, arguments),
    ]


def mpirun_environment(environ):
    """Return an environment in which mpirun needs no remote shell and may be run by root."""
    return {
        **environ,
        "OMPI_MCA_plm_rsh_agent": "/bin/false",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
