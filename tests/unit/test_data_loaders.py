# SPDX-License-Identifier: Apache-2.0
"""The DALI pipelines on real records: counts, labels, pixels, and what is said of damaged data."""

import shutil

import cv2
import mxnet as mx
import numpy as np
import pytest

from mxresnet.config import Config
from mxresnet.data import loader
from mxresnet.data.dali import MEAN, STD, shard_sizes
from mxresnet.data.dataset import DataSet, describe
from mxresnet.errors import UserError
from mxresnet.parallel.world import World

SETTINGS = dict(image_shape=(3, 32, 32), resize=32, batch_size=8, dali_threads=1, rand_mirror=False)


def write_records(folder, train, val):
    """Two record files; train and val are lists of images (height, width, 3, BGR), labelled 0, 1, 2, ..."""
    for prefix, images in (("train", train), ("val", val)):
        writer = mx.recordio.MXIndexedRecordIO(
            str(folder / f"{prefix}.idx"), str(folder / f"{prefix}.rec"), "w"
        )
        for label, image in enumerate(images):
            writer.write_idx(
                label,
                mx.recordio.pack_img(mx.recordio.IRHeader(0, label, label, 0), image, quality=100),
            )
        writer.close()


def noise(count, height=32, width=32):
    random = np.random.RandomState(1)
    return [random.randint(0, 256, (height, width, 3), np.uint8) for _ in range(count)]


def opened(folder, train, val, world=World(), **settings):
    config = Config(data_root=str(folder), **{**SETTINGS, **settings})
    return build(config, train, val, world).open()


def build(config, train, val, world=World(), seed=5):
    return loader.DataLoaders(
        loader.load_backend(config), config, DataSet(train, val, 10, False), world, mx.cpu(), seed
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("images", [7, 50, 64])
def test_every_validation_image_comes_once_in_every_evaluation(tmp_path, ranks, images):
    write_records(tmp_path, noise(8), noise(images))
    parts = [opened(tmp_path, 8, images, World(rank, ranks))[1] for rank in range(ranks)]
    for _ in range(4):
        seen, batches = [], []
        for part in parts:
            labels = [(batch.label.asnumpy(), batch.num_valid) for batch in part.batches()]
            batches.append(len(labels))
            seen += [int(label) for values, real in labels for label in values[:real]]
        assert sorted(seen) == list(range(images))
        assert len(set(batches)) == 1


def test_shard_sizes_add_up():
    for ranks in range(1, 40):
        sizes = shard_sizes(50000, ranks)
        assert sum(sizes) == 50000 and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("ranks, cache", [(1, 0), (2, 0), (3, 0), (2, 64)])
def test_training_sees_every_image_before_any_comes_again(tmp_path, ranks, cache):
    """The ranks together, over epochs of equal shards, which move on; on a CPU also with --dali-cache-size, which is for GPUs."""
    write_records(tmp_path, noise(48), noise(8))
    parts = [
        opened(tmp_path, 48, 8, World(rank, ranks), dali_cache_size=cache)[0]
        for rank in range(ranks)
    ]
    first = [
        {int(label) for batch in part.batches(48 // ranks // 8) for label in batch.label.asnumpy()}
        for part in parts
    ]
    second = [
        {int(label) for batch in part.batches(48 // ranks // 8) for label in batch.label.asnumpy()}
        for part in parts
    ]
    assert ranks == 1 or all(before != after for before, after in zip(first, second))
    for _ in range(3):
        seen = [
            int(label)
            for part in parts
            for batch in part.batches(48 // ranks // 8)
            for label in batch.label.asnumpy()
        ]
        assert sorted(seen) == list(range(48))


def test_validation_pixels_are_the_centre_normalized(tmp_path):
    images = noise(8, 48, 40)
    write_records(tmp_path, noise(8), images)
    _, val = opened(
        tmp_path, 8, 8, resize=40
    )  # the shorter side is 40 already: nothing is interpolated
    (batch,) = val.batches()
    for label, got in zip(batch.label.asnumpy(), batch.image.asnumpy()):
        stored = cv2.imencode(".jpg", images[int(label)], [cv2.IMWRITE_JPEG_QUALITY, 100])[1]
        rgb = cv2.imdecode(stored, cv2.IMREAD_COLOR)[:, :, ::-1].astype(float)
        expected = ((rgb[8:40, 4:36] - MEAN) / STD).transpose(2, 0, 1)
        # Two JPEG decoders may differ by a step or two in their colour conversion.
        assert np.abs(got - expected).max() < 3 / min(STD)
        assert np.abs(got - expected).mean() < 0.01


def test_channel_last_half_precision_and_the_padded_channel(tmp_path):
    write_records(tmp_path, noise(8), noise(8))
    plain = next(opened(tmp_path, 8, 8)[1].batches()).image.asnumpy()
    settings = dict(image_shape=(4, 32, 32), input_layout="NHWC", dtype="float16")
    got = next(opened(tmp_path, 8, 8, **settings)[1].batches()).image
    assert got.shape == (8, 32, 32, 4) and got.dtype == np.float16
    assert not got.asnumpy()[..., 3].any()
    np.testing.assert_allclose(got.asnumpy()[..., :3].transpose(0, 3, 1, 2), plain, atol=2e-3)


@pytest.mark.parametrize("roi", [False, True])
def test_the_random_crop_keeps_to_its_area_and_aspect_ratio(tmp_path, roi):
    """On an image whose red and green grow with x and y, the crop's corners can be read from the pixels."""
    x, y = np.meshgrid(np.arange(200), np.arange(200))
    ramp = np.stack([np.zeros_like(x), y, x], axis=2).astype(np.uint8)
    write_records(tmp_path, [ramp] * 64, noise(8))
    train, _ = opened(
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
            # The slope between points well inside is that of the crop: free of the border's and JPEG's effects.
            width, height = (
                (red[:, 40] - red[:, 10]).mean() / 30 * 50,
                (green[40] - green[10]).mean() / 30 * 50,
            )
            areas.append(width * height / 200**2)
            ratios.append(width / height)
            lefts.append(red[:, 0].mean())
    assert 0.09 < min(areas) < 0.16 and 0.44 < max(areas) < 0.52
    assert 0.72 < min(ratios) < 0.85 and 1.18 < max(ratios) < 1.38
    assert min(lefts) < 20 and max(lefts) > 80


@pytest.mark.parametrize("mirror", [False, True])
def test_half_of_the_images_are_mirrored_only_when_asked(tmp_path, mirror):
    x = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    write_records(tmp_path, [np.stack([x, x, x], axis=2)] * 64, noise(8))
    train, _ = opened(tmp_path, 64, 8, rand_mirror=mirror)
    mirrored = sum(
        int((image[0, :, 0] > image[0, :, -1]).all())
        for batch in train.batches(8)
        for image in batch.image.asnumpy()
    )
    assert 16 < mirrored < 48 if mirror else mirrored == 0


def test_the_seed_decides_the_batches(tmp_path):
    write_records(tmp_path, noise(40), noise(8))

    def first(seed):
        config = Config(data_root=str(tmp_path), **SETTINGS)
        train, _ = build(config, 40, 8, seed=seed).open()
        return next(train.batches(1)).image.asnumpy()

    np.testing.assert_array_equal(first(1), first(1))
    assert np.abs(first(1) - first(2)).max() > 0.1


def test_a_damaged_image_is_one_line_that_names_the_file(tmp_path):
    writer = mx.recordio.MXIndexedRecordIO(
        str(tmp_path / "val.idx"), str(tmp_path / "val.rec"), "w"
    )
    for label in range(8):
        writer.write_idx(
            label,
            mx.recordio.pack(mx.recordio.IRHeader(0, label, label, 0), b"this is not an image" * 9),
        )
    writer.close()
    for name in ("rec", "idx"):
        shutil.copy(tmp_path / f"val.{name}", tmp_path / f"train.{name}")
    _, val = opened(tmp_path, 8, 8)
    with pytest.raises(UserError) as caught:
        next(val.batches())
    message = str(caught.value)
    assert (
        "\n" not in message
        and str(tmp_path / "val.rec") in message
        and "rank 0, validation data" in message
    )


def test_another_number_of_images_than_promised_is_refused(tmp_path):
    write_records(tmp_path, noise(20), noise(9))
    with pytest.raises(UserError, match="20 training and 9 validation images, not 21 and 9"):
        opened(tmp_path, 21, 9)
    with pytest.raises(UserError, match="20 training and 9 validation images, not 20 and 8"):
        opened(tmp_path, 20, 8)


@pytest.mark.parametrize("multiplier", [2, 3])
def test_batches_made_several_at_a_time_are_cut_up_in_order(tmp_path, multiplier):
    """The same images as without a multiplier, and what an epoch leaves over begins the next."""
    write_records(tmp_path, noise(48), noise(8))
    plain, _ = opened(tmp_path, 48, 8, batch_size=8 * multiplier)
    cut, _ = opened(tmp_path, 48, 8, input_batch_multiplier=multiplier)
    expected = [batch.label.asnumpy() for batch in plain.batches(4)]
    got = [batch.label.asnumpy() for _ in range(4) for batch in cut.batches(multiplier)]
    np.testing.assert_array_equal(np.concatenate(got), np.concatenate(expected))
    sizes = [batch.image.shape[0] for steps in (1, 3) for batch in cut.batches(steps)]
    assert sizes == [8] * 4


def test_pixels_of_a_batch_survive_the_fetching_of_the_next(tmp_path):
    write_records(tmp_path, noise(48), noise(8))
    for multiplier in (1, 2):
        train, _ = opened(tmp_path, 48, 8, input_batch_multiplier=multiplier)
        batches = train.batches(6)
        current = next(batches)
        while current:
            before = current.image.asnumpy()
            following = next(batches, None)
            np.testing.assert_array_equal(current.image.asnumpy(), before)
            current = following


def test_what_was_asked_of_a_batch_is_done_before_its_memory_is_used_again(tmp_path):
    """MXNet reads DALI's memory, and here it has much else to do before it gets there."""
    write_records(tmp_path, noise(96), noise(8))
    train, _ = opened(tmp_path, 96, 8)
    slow = mx.nd.ones((1000, 1000))
    asked, expected = [], []
    for batch in train.batches(12):
        expected.append(batch.image.asnumpy())
        for _ in range(2):
            slow = mx.nd.dot(slow, slow) * 0
        asked.append(batch.image + slow[0, 0])
    for array, pixels in zip(asked, expected):
        np.testing.assert_array_equal(array.asnumpy(), pixels)


def test_every_rank_can_evaluate_everything(tmp_path):
    write_records(tmp_path, noise(8), noise(11))
    for rank in range(3):
        _, val = opened(tmp_path, 8, 11, World(rank, 3), separ_val=True)
        seen = [
            int(label)
            for batch in val.batches()
            for label in batch.label.asnumpy()[: batch.num_valid]
        ]
        assert sorted(seen) == list(range(11))


def test_nothing_is_read_before_the_pipelines_are_opened(tmp_path):
    """With --lazy_init_sanity the names that DALI has do not exist yet; without, the files may still be missing."""
    config = Config(data_root=str(tmp_path), lazy_init_sanity=True, **SETTINGS)
    for settings in (config, Config(data_root=str(tmp_path), **SETTINGS)):
        pipelines = build(settings, 48, 9)
        write_records(tmp_path, noise(48), noise(9))
        _, val = pipelines.open()
        assert sum(batch.num_valid for batch in val.batches()) == 9
        for path in tmp_path.glob("*.*"):
            path.unlink()


def test_synthetic_batches_need_no_data(tmp_path):
    config = Config(
        synth_data=1,
        data_root="/nowhere",
        num_examples=64,
        num_classes=10,
        input_batch_multiplier=2,
        **SETTINGS,
    )
    assert describe(config).train_examples == 64
    train, val = build(config, 64, 50000).open()
    (first, second) = train.batches(2)
    assert first.image.shape == (8, 3, 32, 32) and abs(first.image.asnumpy()).max() <= 1
    assert set(first.label.asnumpy()) <= set(range(10)) and list(val.batches()) == []


class TestRecordIO:
    """MXNet's own iterator in the place of DALI."""

    @pytest.mark.parametrize("ranks", [1, 2, 3])
    def test_every_validation_image_comes_once_in_every_evaluation(self, tmp_path, ranks):
        write_records(tmp_path, noise(30), noise(50))
        parts = [
            opened(tmp_path, 30, 50, World(rank, ranks), use_dali=False)[1] for rank in range(ranks)
        ]
        for _ in range(3):
            seen = [
                int(label)
                for part in parts
                for batch in part.batches()
                for label in batch.label.asnumpy()[: batch.num_valid]
            ]
            assert sorted(seen) == list(range(50))

    def test_pixels_equal_dalis_where_nothing_is_interpolated(self, tmp_path):
        write_records(tmp_path, noise(8), noise(8))
        settings = dict(image_shape=(4, 32, 32), input_layout="NHWC", dtype="float16")
        (ours,), (dalis,) = (
            list(opened(tmp_path, 8, 8, use_dali=dali, **settings)[1].batches())
            for dali in (False, True)
        )
        np.testing.assert_array_equal(ours.label.asnumpy(), dalis.label.asnumpy())
        difference = np.abs(ours.image.asnumpy().astype(float) - dalis.image.asnumpy())
        assert (
            difference.mean() < 0.01
            and difference.max() < 3 / min(STD)
            and not ours.image.asnumpy()[..., 3].any()
        )

    def test_training_goes_on_for_ever_in_another_order(self, tmp_path):
        write_records(tmp_path, noise(24), noise(8))
        train, _ = opened(tmp_path, 24, 8, use_dali=False)
        epochs = [
            [int(label) for batch in train.batches(3) for label in batch.label.asnumpy()]
            for _ in range(3)
        ]
        assert all(sorted(epoch) == list(range(24)) for epoch in epochs) and epochs[0] != epochs[1]

    def test_it_is_chosen_where_dali_is_not_installed(self, monkeypatch):
        assert (
            loader.choose_backend(Config()) == "dali"
            and loader.choose_backend(Config(use_dali=False)) == "recordio"
        )
        monkeypatch.setattr(loader.importlib.util, "find_spec", lambda name: None)
        assert loader.choose_backend(Config()) == "recordio"


class TestDescribe:
    def test_counts_come_from_the_manifests(self, digits):
        assert describe(Config(data_root=str(digits))) == DataSet(1442, 355, 10, True)

    def test_an_epoch_may_be_shortened(self, digits):
        assert describe(Config(data_root=str(digits), num_examples=100)).train_examples == 100

    def test_without_manifests_imagenets_counts_are_meant(self, copied):
        (copied / "train.json").unlink()
        assert describe(Config(data_root=str(copied))) == DataSet(1281167, 50000, 1000, False)

    @pytest.mark.parametrize("name", ["train.rec", "train.idx", "val.rec", "val.idx"])
    def test_a_missing_file_is_named(self, copied, name):
        (copied / name).unlink()
        with pytest.raises(UserError, match=f"{copied}/{name}.*prepare.imagenet"):
            describe(Config(data_root=str(copied)))

    def test_a_file_of_another_size_than_its_manifest_says_is_named(self, copied):
        with open(copied / "val.rec", "ab") as file:
            file.truncate(1000)
        with pytest.raises(UserError, match=f"{copied}/val.rec has 1000 bytes"):
            describe(Config(data_root=str(copied)))

    def test_what_training_does_not_read_may_be_missing(self, copied):
        for name in ("train.lst", "val.lst", "train.sums", "val.sums"):
            (copied / name).unlink()
        assert describe(Config(data_root=str(copied))).train_examples == 1442

    @pytest.mark.parametrize(
        "change, words",
        [
            (('"complete": true', '"complete": false'), "not whole"),
            (('"version": 1', '"version": 9'), "version 1"),
            (('"format"', "nonsense"), "cannot be read"),
            (("{", "[]"), "not of format"),
            (('"files"', '"file"'), "does not say which files"),
            (('"digit_3"', '"trois"'), "different classes.*trois"),
        ],
    )
    def test_a_manifest_that_does_not_fit_is_refused(self, copied, change, words):
        text = (copied / "train.json").read_text()
        assert change[0] in text
        (copied / "train.json").write_text(text.replace(*change) if change[1] != "[]" else "[]")
        with pytest.raises(UserError, match=words):
            describe(Config(data_root=str(copied)))

    @pytest.mark.parametrize(
        "settings, words",
        [
            (dict(num_classes=1000), "--num-classes 1000.*10"),
            (dict(num_val_examples=50000), "--num-val-examples 50000.*355"),
            (dict(num_examples=5000), "--num-examples 5000.*1442"),
        ],
    )
    def test_settings_that_contradict_the_manifest_are_refused(self, digits, settings, words):
        with pytest.raises(UserError, match=words):
            describe(Config(data_root=str(digits), **settings))
