# SPDX-License-Identifier: Apache-2.0
"""The rank of this process and the number of ranks, from the variables of the launcher.

They are known before MPI is initialized.
"""

from __future__ import annotations

import os
from typing import Optional, Sequence

# Of Open MPI, PMIx (srun), PMI and Slurm.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID")
# Of Open MPI, PMI and a step of Slurm. In a rank that mpirun started under Slurm, the last one may
# have the number of machines.
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def launched_rank() -> Optional[int]:
    """Return the rank that the launcher gave this process, or None without a launcher."""
    return _first_number(_RANK_VARIABLES)


def launched_size() -> Optional[int]:
    """Return the number of ranks that the launcher started, or None if it passes none."""
    return _first_number(_SIZE_VARIABLES)


def _first_number(names: Sequence[str]) -> Optional[int]:
    for name in names:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return None
