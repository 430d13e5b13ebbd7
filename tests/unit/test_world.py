# SPDX-License-Identifier: Apache-2.0
"""A World of one rank without MPI, and the rank that a launcher passes."""

import pytest

from mxresnet.errors import UserError
from mxresnet.parallel import world as world_module
from mxresnet.parallel.launched import launched_rank, launched_size
from mxresnet.parallel.world import CollectiveUserError, World

LAUNCHER_VARIABLES = [
    *("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"),
    *("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"),
]


@pytest.fixture
def no_launcher(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_the_collectives_of_one_rank_return_its_values():
    world = World()
    assert world.broadcast("value") == "value" and world.gather(3) == [3]
    assert world.sum([1, 2]) == [1, 2] and world.run_on_all_ranks(lambda: 5) == 5
    world.barrier()
    world.average([object()], "gradient", groups=0)
    world.broadcast_parameters({"weight": object()})
    world.shutdown()


def test_a_users_mistake_is_raised_as_a_collective_error():
    def fail():
        raise UserError("the flag is wrong")

    with pytest.raises(CollectiveUserError, match="^the flag is wrong$"):
        World().run_on_all_ranks(fail)


def test_several_ranks_cannot_average_without_horovod():
    with pytest.raises(RuntimeError, match="start_horovod"):
        World(size=2).average([object()], "gradient", groups=0)
    with pytest.raises(RuntimeError, match="join"):
        World(size=2).broadcast_parameters({"weight": object()})


@pytest.mark.parametrize("name", LAUNCHER_VARIABLES)
def test_the_launchers_variables_hold_the_rank_and_the_number_of_ranks(
    no_launcher, monkeypatch, name
):
    assert launched_rank() is None and launched_size() is None
    monkeypatch.setenv(name, "3")
    is_rank = name in LAUNCHER_VARIABLES[:4]
    assert (launched_rank(), launched_size()) == ((3, None) if is_rank else (None, 3))


def test_without_a_launcher_there_is_one_rank_and_no_mpi(no_launcher):
    assert world_module.join(2, 40) == World()
