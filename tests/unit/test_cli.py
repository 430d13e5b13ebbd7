# SPDX-License-Identifier: Apache-2.0
"""The command-line entry point, where the tests of whole runs do not reach it."""

import mxnet as mx
import pytest

from mxresnet import cli
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
