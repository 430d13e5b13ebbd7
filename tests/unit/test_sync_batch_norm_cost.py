# SPDX-License-Identifier: Apache-2.0
"""What --bn-group above 1 costs in a step of ResNet-50, as docs/launching.md states it."""

import mxnet as mx
import numpy as np
from support.commands import ROOT

from mxresnet.config import Config
from mxresnet.model import resnet, sync_batch_norm
from mxresnet.model.ops import SyncBatchNormOps

BATCH_NORMS = 53
CHANNELS = 26_560  # of all batch norms of ResNet-50


def test_a_step_of_resnet_50_has_the_exchanges_and_copies_of_the_page(monkeypatch):
    summed, copied = [], []

    def count_sum(array):
        summed.append(array.nbytes)
        return array

    def count_copy(values, *arguments, **options):
        if isinstance(values, np.ndarray):  # others are on the device already
            copied.append(values)
        return make_array(values, *arguments, **options)

    names = [bn for _, bn in resnet.layer_names(50)]
    sync_batch_norm.set_group_sum_functions(dict.fromkeys(names, count_sum))
    config = Config(image_shape=(3, 32, 32), resize=32, batch_size=2, bn_group=2)
    symbol = resnet.build(SyncBatchNormOps(config), config, 10)
    executor = symbol.simple_bind(mx.cpu(), data=config.batch_shape)
    for array in [*executor.arg_dict.values(), *executor.aux_dict.values()]:
        array[:] = np.random.RandomState(0).rand(*array.shape) + 0.5
    make_array = mx.nd.array
    monkeypatch.setattr(mx.nd, "array", count_copy)
    executor.forward(is_train=True)
    executor.backward()
    mx.nd.waitall()
    assert len(summed) == sync_batch_norm.SUMS_PER_STEP * BATCH_NORMS == 159
    # Forward: the sums of x with the number of its values, then those of its squared distances
    # from the mean. Backward: those of the two gradients. All are float64.
    assert sum(summed) == 8 * (4 * CHANNELS + BATCH_NORMS) == 850_344
    assert len(copied) == sync_batch_norm.COPIES_TO_DEVICE_PER_STEP * BATCH_NORMS == 530
    page = " ".join((ROOT / "docs" / "launching.md").read_text().split())
    assert "159 sums (850,344 bytes)" in page and "530 small arrays" in page
