# SPDX-License-Identifier: Apache-2.0
"""MXNet's own ImageRecordIter as the backend: shards, pixels, epochs."""

import numpy as np
import pytest
from support.records import labels_of, open_loaders, random_images, write_records

from mxresnet.data.dali_graph import STD
from mxresnet.parallel.world import World


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_validation_image_comes_once_in_every_evaluation(tmp_path, ranks):
    write_records(tmp_path, random_images(30), random_images(50))
    loaders = [
        open_loaders(tmp_path, 30, 50, World(rank, ranks), use_dali=False)[1]
        for rank in range(ranks)
    ]
    for _ in range(3):
        labels = [label for val in loaders for label in labels_of(val.batches())]
        assert sorted(labels) == list(range(50))


def test_pixels_equal_dalis_where_nothing_is_interpolated(tmp_path):
    write_records(tmp_path, random_images(8), random_images(8))
    settings = {"image_shape": (4, 32, 32), "input_layout": "NHWC", "dtype": "float16"}
    (ours,), (dalis,) = (
        list(open_loaders(tmp_path, 8, 8, use_dali=dali, **settings)[1].batches())
        for dali in (False, True)
    )
    np.testing.assert_array_equal(ours.label.asnumpy(), dalis.label.asnumpy())
    difference = np.abs(ours.image.asnumpy().astype(float) - dalis.image.asnumpy())
    assert difference.mean() < 0.01 and difference.max() < 3 / min(STD)
    assert not ours.image.asnumpy()[..., 3].any()


def test_training_continues_with_another_order_in_each_epoch(tmp_path):
    write_records(tmp_path, random_images(24), random_images(8))
    train, _ = open_loaders(tmp_path, 24, 8, use_dali=False)
    epochs = [labels_of(train.batches(3)) for _ in range(3)]
    assert all(sorted(epoch) == list(range(24)) for epoch in epochs) and epochs[0] != epochs[1]
