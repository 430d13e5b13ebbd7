# SPDX-License-Identifier: Apache-2.0
"""The loaders around a backend: its choice, counts, batches cut from larger ones, lazy opening."""

import mxnet as mx
import numpy as np
import pytest
from support.records import (
    SETTINGS,
    labels_of,
    make_loaders,
    open_loaders,
    random_images,
    write_records,
)

from mxresnet.config import Config
from mxresnet.data import loader
from mxresnet.data.dataset import describe
from mxresnet.errors import UserError
from mxresnet.parallel.world import World


def test_image_record_iter_is_chosen_where_dali_is_not_installed(monkeypatch):
    assert loader.choose_backend(Config()) == "dali"
    assert loader.choose_backend(Config(use_dali=False)) == "image_record_iter"
    monkeypatch.setattr(loader.importlib.util, "find_spec", lambda name: None)
    assert loader.choose_backend(Config()) == "image_record_iter"


@pytest.mark.parametrize("settings", [{}, {"use_dali": False}, {"synth_data": 1}])
def test_every_backend_has_the_methods_of_the_protocol(settings):
    backend = loader.load_backend(Config(**settings))
    for name in ("num_examples", "next_train_batch", "iterate_validation"):
        assert callable(getattr(backend, name)) and hasattr(loader.BatchIterator, name)


def test_other_counts_than_those_of_the_records_are_refused(tmp_path):
    write_records(tmp_path, random_images(20), random_images(9))
    with pytest.raises(UserError, match="20 training and 9 validation images, not 21 and 9"):
        open_loaders(tmp_path, 21, 9)
    with pytest.raises(UserError, match="20 training and 9 validation images, not 20 and 8"):
        open_loaders(tmp_path, 20, 8)


@pytest.mark.parametrize("use_dali", [True, False])
@pytest.mark.parametrize("name", ["with space", "a;b?c#d*[e]", "\u00e9", "not utf-8 \udce9"])
def test_a_path_may_have_any_characters(tmp_path, name, use_dali):
    (tmp_path / name).mkdir()
    write_records(tmp_path, random_images(20), random_images(9))
    for path in [*tmp_path.glob("*.rec"), *tmp_path.glob("*.idx")]:
        path.rename(tmp_path / name / path.name)
    config = Config(data_root=str(tmp_path / name), use_dali=use_dali, **SETTINGS)
    loaders = make_loaders(config, 20, 9)
    _, val = loaders.open()
    assert sorted(labels_of(val.batches())) == list(range(9))


def test_links_to_records_are_removed_when_the_records_are_refused(tmp_path, monkeypatch):
    links = tmp_path / "links"
    links.mkdir()
    monkeypatch.setattr(loader.tempfile, "tempdir", str(links))
    write_records(tmp_path, random_images(20), random_images(9))
    config = Config(data_root=str(tmp_path), lazy_init_sanity=True, **SETTINGS)
    loaders = make_loaders(config, 21, 9)
    with pytest.raises(UserError, match="20 training and 9 validation images, not 21 and 9"):
        loaders.open()
    assert list(links.iterdir()) == []


@pytest.mark.parametrize(
    "train, val, use_dali, split",
    [(6, 9, False, "6 training"), (20, 3, True, "3 validation"), (20, 3, False, None)],
)
def test_a_rank_that_would_get_no_image_is_named(tmp_path, train, val, use_dali, split):
    """Of the training images each rank needs one, and DALI makes no empty shard."""
    write_records(tmp_path, random_images(train), random_images(val))
    if split is None:
        open_loaders(tmp_path, train, val, World(0, 4), use_dali=use_dali)
    else:
        with pytest.raises(UserError, match=f"{split} images in .* are too few for 4 ranks: "):
            open_loaders(tmp_path, train, val, World(0, 4), use_dali=use_dali)


@pytest.mark.parametrize("name", ["train.rec", "val.rec", "val.idx"])
def test_a_data_set_that_is_written_during_the_run_is_refused(tmp_path, name):
    write_records(tmp_path, random_images(20), random_images(9))
    _, val = open_loaders(tmp_path, 20, 9)
    content = (tmp_path / name).read_bytes()
    (tmp_path / "other").write_bytes(content)
    (tmp_path / "train.idx").unlink()  # the run has it open
    assert sorted(labels_of(val.batches())) == list(range(9))
    with open(tmp_path / name, "r+b") as file:
        file.write(content[:1])
    with pytest.raises(UserError, match=f"{tmp_path}/{name} was written during the run"):
        list(val.batches())
    (tmp_path / "other").replace(tmp_path / name)
    assert sorted(labels_of(val.batches())) == list(range(9))


@pytest.mark.parametrize("multiplier", [2, 3])
def test_batches_made_several_at_a_time_are_cut_up_in_order(tmp_path, multiplier):
    """The images are those without a multiplier; an epoch's unused batches begin the next one."""
    write_records(tmp_path, random_images(48), random_images(8))
    large, _ = open_loaders(tmp_path, 48, 8, batch_size=8 * multiplier)
    cut, _ = open_loaders(tmp_path, 48, 8, input_batch_multiplier=multiplier)
    expected = [batch.label.asnumpy() for batch in large.batches(4)]
    got = [batch.label.asnumpy() for _ in range(4) for batch in cut.batches(multiplier)]
    np.testing.assert_array_equal(np.concatenate(got), np.concatenate(expected))
    sizes = [batch.image.shape[0] for steps in (1, 3) for batch in cut.batches(steps)]
    assert sizes == [8] * 4


def test_pixels_of_a_batch_survive_the_fetching_of_the_next(tmp_path):
    write_records(tmp_path, random_images(48), random_images(8))
    for multiplier in (1, 2):
        train, _ = open_loaders(tmp_path, 48, 8, input_batch_multiplier=multiplier)
        batches = train.batches(6)
        current = next(batches)
        while current:
            before = current.image.asnumpy()
            following = next(batches, None)
            np.testing.assert_array_equal(current.image.asnumpy(), before)
            current = following


def test_queued_operations_on_a_batch_run_before_its_memory_is_reused(tmp_path):
    """MXNet reads DALI's memory, and here other work delays it."""
    write_records(tmp_path, random_images(96), random_images(8))
    train, _ = open_loaders(tmp_path, 96, 8)
    slow = mx.nd.ones((1000, 1000))
    results, expected = [], []
    for batch in train.batches(12):
        expected.append(batch.image.asnumpy())
        for _ in range(2):
            slow = mx.nd.dot(slow, slow) * 0
        results.append(batch.image + slow[0, 0])
    for array, pixels in zip(results, expected):
        np.testing.assert_array_equal(array.asnumpy(), pixels)


def test_every_rank_can_evaluate_everything(tmp_path):
    write_records(tmp_path, random_images(8), random_images(11))
    for rank in range(3):
        _, val = open_loaders(tmp_path, 8, 11, World(rank, 3), separ_val=True)
        assert sorted(labels_of(val.batches())) == list(range(11))


def test_nothing_is_read_before_the_loaders_are_opened(tmp_path):
    """With --lazy_init_sanity DALI's paths do not exist yet; without, the files do not."""
    config = Config(data_root=str(tmp_path), lazy_init_sanity=True, **SETTINGS)
    for settings in (config, Config(data_root=str(tmp_path), **SETTINGS)):
        loaders = make_loaders(settings, 48, 9)
        write_records(tmp_path, random_images(48), random_images(9))
        _, val = loaders.open()
        assert sum(batch.num_valid for batch in val.batches()) == 9
        for path in tmp_path.glob("*.*"):
            path.unlink()


def test_synthetic_batches_need_no_data():
    config = Config(
        synth_data=1,
        data_root="/nowhere",
        num_examples=64,
        num_classes=10,
        input_batch_multiplier=2,
        **SETTINGS,
    )
    assert describe(config).train_examples == 64
    train, val = make_loaders(config, 64, 50000).open()
    (first, second) = train.batches(2)
    assert first.image.shape == (8, 3, 32, 32) and abs(first.image.asnumpy()).max() <= 1
    assert set(first.label.asnumpy()) <= set(range(10)) and list(val.batches()) == []
