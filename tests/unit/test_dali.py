# SPDX-License-Identifier: Apache-2.0
"""The DALI pipelines on real records: shards, pixels, random crops, and damaged data."""

import shutil

import cv2
import mxnet as mx
import numpy as np
import pytest
from support.records import (
    SETTINGS,
    labels_of,
    make_loaders,
    open_loaders,
    random_images,
    write_record_file,
    write_records,
)

from mxresnet.config import Config
from mxresnet.data.dali_graph import MEAN, STD, shard_sizes
from mxresnet.errors import UserError
from mxresnet.parallel.world import World


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("images", [7, 50, 64])
def test_every_validation_image_comes_once_in_every_evaluation(tmp_path, ranks, images):
    write_records(tmp_path, random_images(8), random_images(images))
    loaders = [open_loaders(tmp_path, 8, images, World(rank, ranks))[1] for rank in range(ranks)]
    for _ in range(4):
        labels, num_batches = [], []
        for val in loaders:
            # The arrays are reused, so each batch is read before the next one is fetched.
            by_batch = [labels_of([batch]) for batch in val.batches()]
            num_batches.append(len(by_batch))
            labels += [label for values in by_batch for label in values]
        assert sorted(labels) == list(range(images))
        assert len(set(num_batches)) == 1


def test_shard_sizes_add_up():
    for ranks in range(1, 40):
        sizes = shard_sizes(50000, ranks)
        assert sum(sizes) == 50000 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("ranks, cache", [(1, 0), (2, 0), (3, 0), (2, 64)])
def test_training_sees_every_image_before_any_comes_again(tmp_path, ranks, cache):
    """Over epochs of equal shards, which move from rank to rank.

    They also move with --dali-cache-size on a CPU, because that setting is for GPUs.
    """
    write_records(tmp_path, random_images(48), random_images(8))
    loaders = [
        open_loaders(tmp_path, 48, 8, World(rank, ranks), dali_cache_size=cache)[0]
        for rank in range(ranks)
    ]

    def epoch():
        return [labels_of(train.batches(48 // ranks // 8)) for train in loaders]

    first, second = epoch(), epoch()
    assert ranks == 1 or all(set(a) != set(b) for a, b in zip(first, second))
    for _ in range(3):
        assert sorted(label for labels in epoch() for label in labels) == list(range(48))


def test_validation_pixels_are_the_centre_normalized(tmp_path):
    images = random_images(8, 48, 40)
    write_records(tmp_path, random_images(8), images)
    # The shorter side is 40 already, so nothing is interpolated.
    _, val = open_loaders(tmp_path, 8, 8, resize=40)
    (batch,) = val.batches()
    for label, got in zip(batch.label.asnumpy(), batch.image.asnumpy()):
        stored = cv2.imencode(".jpg", images[int(label)], [cv2.IMWRITE_JPEG_QUALITY, 100])[1]
        rgb = cv2.imdecode(stored, cv2.IMREAD_COLOR)[:, :, ::-1].astype(float)
        expected = ((rgb[8:40, 4:36] - MEAN) / STD).transpose(2, 0, 1)
        # Two JPEG decoders may differ by a step or two in their colour conversion.
        assert np.abs(got - expected).max() < 3 / min(STD)
        assert np.abs(got - expected).mean() < 0.01


def test_channel_last_half_precision_and_the_padded_channel(tmp_path):
    write_records(tmp_path, random_images(8), random_images(8))
    plain = next(open_loaders(tmp_path, 8, 8)[1].batches()).image.asnumpy()
    settings = {"image_shape": (4, 32, 32), "input_layout": "NHWC", "dtype": "float16"}
    got = next(open_loaders(tmp_path, 8, 8, **settings)[1].batches()).image
    assert got.shape == (8, 32, 32, 4) and got.dtype == np.float16
    assert not got.asnumpy()[..., 3].any()
    np.testing.assert_allclose(got.asnumpy()[..., :3].transpose(0, 3, 1, 2), plain, atol=2e-3)


@pytest.mark.parametrize("roi", [False, True])
def test_the_random_crop_keeps_to_its_area_and_aspect_ratio(tmp_path, roi):
    """Red grows with x and green with y, so the pixels show the position of the crop."""
    x, y = np.meshgrid(np.arange(200), np.arange(200))
    ramp = np.stack([np.zeros_like(x), y, x], axis=2).astype(np.uint8)
    write_records(tmp_path, [ramp] * 64, random_images(8))
    train, _ = open_loaders(
        tmp_path,
        64,
        8,
        image_shape=(3, 50, 50),
        resize=50,
        min_random_area=0.1,
        max_random_area=0.5,
        dali_roi_decode=roi,
    )
    areas, ratios, lefts = [], [], []
    for batch in train.batches(8):
        for image in batch.image.asnumpy():
            red, green = image[0] * STD[0] + MEAN[0], image[1] * STD[1] + MEAN[1]
            # The slope is measured away from the border, whose pixels are distorted.
            width = (red[:, 40] - red[:, 10]).mean() / 30 * 50
            height = (green[40] - green[10]).mean() / 30 * 50
            areas.append(width * height / 200**2)
            ratios.append(width / height)
            lefts.append(red[:, 0].mean())
    assert 0.09 < min(areas) < 0.16 and 0.44 < max(areas) < 0.52
    assert 0.72 < min(ratios) < 0.85 and 1.18 < max(ratios) < 1.38
    assert min(lefts) < 20 and max(lefts) > 80


@pytest.mark.parametrize("mirror", [False, True])
def test_half_of_the_images_are_mirrored_only_when_asked(tmp_path, mirror):
    x = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    write_records(tmp_path, [np.stack([x, x, x], axis=2)] * 64, random_images(8))
    train, _ = open_loaders(tmp_path, 64, 8, rand_mirror=mirror)
    mirrored = sum(
        int((image[0, :, 0] > image[0, :, -1]).all())
        for batch in train.batches(8)
        for image in batch.image.asnumpy()
    )
    assert 16 < mirrored < 48 if mirror else mirrored == 0


def test_the_seed_decides_the_batches(tmp_path):
    write_records(tmp_path, random_images(40), random_images(8))

    def first_images(seed):
        config = Config(data_root=str(tmp_path), **SETTINGS)
        train, _ = make_loaders(config, 40, 8, seed=seed).open()
        return next(train.batches(1)).image.asnumpy()

    np.testing.assert_array_equal(first_images(1), first_images(1))
    assert np.abs(first_images(1) - first_images(2)).max() > 0.1


def test_a_damaged_image_is_one_line_that_names_the_file(tmp_path):
    header = mx.recordio.IRHeader
    packed = [
        mx.recordio.pack(header(0, label, label, 0), b"this is not an image" * 9)
        for label in range(8)
    ]
    write_record_file(tmp_path, "val", packed)
    for name in ("rec", "idx"):
        shutil.copy(tmp_path / f"val.{name}", tmp_path / f"train.{name}")
    _, val = open_loaders(tmp_path, 8, 8)
    with pytest.raises(UserError) as caught:
        next(val.batches())
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path / "val.rec") in message
    assert "rank 0, validation data" in message
