# SPDX-License-Identifier: Apache-2.0
"""The command-line entry point, where the tests of whole runs do not reach it."""

import mxnet as mx
import pytest

from mxresnet import cli, rank_agreement
from mxresnet.checkpoint import opening
from mxresnet.config import Config
from mxresnet.data.dataset import DataSet
from mxresnet.errors import UserError
from mxresnet.parallel.world import World
from mxresnet.run_plan import make_plan


def test_a_folder_of_logs_that_was_moved_during_the_start_is_named(tmp_path):
    config = Config(log_file=str(tmp_path / "moved" / "log"))
    data = DataSet(100, 10, 10, has_manifests=True)
    plan = make_plan(config, data.train_examples, 1)
    with pytest.raises(UserError, match=f"--log-file {config.log_file} cannot be written .No such"):
        cli.start_progress(config, data, plan, World(), mx.cpu(), [])


class RankOne(World):
    """A rank that gets what rank 0 has from the test."""

    def broadcast(self, value):
        return rank_0_facts


rank_0_facts = {}


@pytest.mark.parametrize(
    "settings, flag",
    [
        ({"epoch_prof": 1}, "--epoch-prof is 1 here and 0 on rank 0"),
        ({"image_shape": (4, 224, 224)}, "--image-shape is 4,224,224 here and 3,224,224 on rank 0"),
        ({"dali_threads": 7, "gpus": "1", "submission_org": "Us", "seed": 3}, None),
    ],
)
def test_settings_that_all_ranks_need_are_compared(monkeypatch, settings, flag):
    data = DataSet(100, 10, 10, has_manifests=True)
    monkeypatch.setitem(
        globals(), "rank_0_facts", rank_agreement._facts(Config(synth_data=1), data, "dali")
    )
    config = Config(synth_data=1, **settings)
    if flag is None:
        rank_agreement.check_agreement(config, data, "dali", RankOne())
    else:
        with pytest.raises(UserError, match=flag):
            rank_agreement.check_agreement(config, data, "dali", RankOne())


def test_a_log_that_is_no_file_has_no_folder_of_checkpoints_beside_it(tmp_path):
    assert opening.folder_of(Config(log_file="/dev/null")) is None
    assert opening.folder_of(Config(log_file=f"{tmp_path}/a.log")) == f"{tmp_path}/a.checkpoints"
