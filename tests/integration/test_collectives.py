# SPDX-License-Identifier: Apache-2.0
"""What ranks do together under mpirun: collectives, seeds, agreement on the number of ranks."""

import os
import shutil

import numpy as np
import pytest
from support.commands import mpirun, python
from support.manifests import change_manifest

from mxresnet.parallel.world import rank_seeds

COLLECTIVES = """
import sys
import numpy as np
from mxresnet.data import loader
from mxresnet.config import Config
from mxresnet.errors import UserError
loader.load_backend(Config())
from mxresnet.parallel.world import CollectiveUserError, join, rank_seeds, start_horovod
world = start_horovod(join())
import mxnet as mx
size = int(sys.argv[1])
assert world.size == size and 0 <= world.rank < size and world.local_rank == world.rank
assert world.sum([1, world.rank]) == [size, size * (size - 1) // 2]
assert world.broadcast(f"from {world.rank}") == "from 0"
assert world.gather_on_machine(world.rank * 2) == [2 * rank for rank in range(size)]
for groups in (0, 1, 2, 7):
    arrays = [mx.nd.full((3, i + 1), world.rank * (i + 1)) for i in range(5)]
    world.average(arrays, f"test{groups}", groups)
    for i, array in enumerate(arrays):
        np.testing.assert_allclose(array.asnumpy(), (size - 1) / 2 * (i + 1), rtol=1e-6)
parameters = {"a": mx.nd.full((2,), world.rank + 1), "b": mx.nd.full((3,), -world.rank)}
world.broadcast_parameters(parameters)
assert (parameters["a"].asnumpy() == 1).all() and (parameters["b"].asnumpy() == 0).all()
try:
    world.raise_if_any_failed(UserError("mine is bad") if world.rank == size - 1 else None)
except CollectiveUserError as error:
    expected = "mine is bad" if size == 1 else f"rank {size - 1}: mine is bad"
    assert str(error) == expected, error
else:
    raise AssertionError("no rank raised the error")
world.raise_if_any_failed(None)
mx.nd.waitall()
world.shutdown()
"""


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_collectives(ranks):
    done = mpirun(ranks, "-c", COLLECTIVES, ranks)
    assert done.returncode == 0, done.stderr


def test_a_number_of_ranks_that_differs_from_the_launchers_is_refused_in_one_line(few):
    done = mpirun(
        2, "-m", "mxresnet", "--data-root", few, "--batch-size", "16", env={"EXPECTED_RANKS": "3"}
    )
    assert (
        done.returncode == 2
        and done.stderr.count("2 ranks were started and EXPECTED_RANKS is 3") == 1
    ), done.stderr


# Executed by each rank before the program: rank 1 gets a variable of its own.
SET_ON_RANK_1 = """
import os, runpy, sys
name, _, value = sys.argv.pop(1).partition("=")
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    os.environ[name] = value
runpy.run_module("mxresnet", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "change, words",
    [
        ("MOM=0.1", "--mom is 0.1 here and 0.9 on rank 0"),
        ("USE_DALI=0", "--use-dali is False here and True on rank 0"),
        ("DATAROOT=DIGITS", "the data set (train) is 1442 here and 100 on rank 0"),
        ("DATAROOT=SHUFFLED", "the data set (train_manifest) is "),
    ],
)
def test_ranks_with_other_settings_or_data_are_refused(digits, few, tmp_path, change, words):
    """Machines to which the launcher did not pass a variable, or with another copy of the data."""
    shutil.copytree(few, tmp_path / "shuffled")
    change_manifest(tmp_path / "shuffled" / "train.json", lambda fields: fields.update(digest="x"))
    change = change.replace("DIGITS", str(digits)).replace("SHUFFLED", str(tmp_path / "shuffled"))
    env = {"DATAROOT": str(few), "BATCHSIZE": "16"}
    done = mpirun(2, "-c", SET_ON_RANK_1, change, env=env, timeout=100)
    assert done.returncode == 2 and done.stderr.count("mxresnet: ") == 1, done.stderr
    assert f"mxresnet: rank 1: {words}" in done.stderr


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_ranks_of_a_launcher_that_mpi_does_not_know_are_refused(few, name, rank):
    """srun without PMIx starts every rank as rank 0 of its own world; none may train alone."""
    rank_variable = {"OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK", "PMI_SIZE": "PMI_RANK"}
    env = {
        **os.environ,
        rank_variable.get(name, "SLURM_PROCID"): str(rank),
        name: "2",
        "OMPI_MCA_plm_rsh_agent": "/bin/false",
    }
    done = python("-m", "mxresnet", "--data-root", few, "--batch-size", "16", env=env)
    words = "the launcher started 2 ranks and MPI has connected 1"
    assert done.returncode == 2 and done.stderr.count(words) == 1 - rank, done.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_mpi_does_not_connect_are_refused_and_the_first_reports_it(few, rank):
    """An mpirun of another MPI than the library starts every rank as rank 0 of its own world."""
    env = {
        **os.environ,
        "OMPI_COMM_WORLD_RANK": str(rank),
        "EXPECTED_RANKS": "2",
        "OMPI_MCA_plm_rsh_agent": "/bin/false",
    }
    done = python("-m", "mxresnet", "--data-root", few, "--batch-size", "16", env=env)
    assert (
        done.returncode == 2
        and done.stderr.count("1 ranks were started and EXPECTED_RANKS is 2") == 1 - rank
    ), done.stderr


def test_rank_seeds_are_the_references():
    np.random.seed(42)
    assert rank_seeds(42, 5) == list(np.random.randint(2**16, size=5))
