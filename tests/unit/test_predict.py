# SPDX-License-Identifier: Apache-2.0
"""python -m mxresnet.predict: preprocessing, probabilities, output and bad input."""

import json
import pathlib
import shutil

import cv2
import mxnet as mx
import numpy as np
import pytest
from support import checkpoints

from mxresnet import predict, saved_model
from mxresnet.config import Config
from mxresnet.data import dali, shard
from mxresnet.data.dataset import describe
from mxresnet.data.image_file import ImageReader
from mxresnet.model.inference import Network
from mxresnet.parallel.world import World

NAMES = [f"digit_{number}" for number in range(checkpoints.CLASSES)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return checkpoints.publish_model(tmp_path_factory.mktemp("run"), class_names=NAMES)


@pytest.fixture(scope="module")
def images(few):
    """Files of the validation set, in the order of its records."""
    lines = (few / "val.lst").read_text().splitlines()
    return [few.parent / "images" / "val" / line.split("\t")[2] for line in lines]


@pytest.mark.parametrize("shape", [(3, 224, 224), (4, 64, 64), (3, 32, 32)])
def test_an_image_is_preprocessed_as_in_the_validation_pipeline(few, images, shape):
    config = Config(data_root=str(few), image_shape=shape, resize=shape[1] * 8 // 7, batch_size=4)
    paths = {name: config.path(name) for name in ("data_train", "data_train_idx")}
    paths.update({name: config.path(name) for name in ("data_val", "data_val_idx")})
    val = shard.val_shard(config, describe(config), paths, World(), seed=0)
    batch, _, _ = next(dali.DaliIterator(config, val, mx.cpu()).iterate_validation())
    reader = ImageReader(config)
    for expected, path in zip(batch.asnumpy(), images):
        np.testing.assert_array_equal(reader.read(str(path))[0], expected)


def test_probabilities_are_those_of_the_network(checkpoint, images):
    saved = saved_model.load(checkpoint)
    image = ImageReader(saved.config).read(str(images[0]))
    found = Network(saved).probabilities(image)
    trainer = checkpoints.trainer()
    trainer.start_from(saved, new_head=False)
    trainer.initialize()
    batch = mx.nd.array(np.concatenate([image, image]))
    trainer._module.forward(mx.io.DataBatch([batch]), is_train=False)
    expected = trainer._module.get_outputs()[0].asnumpy()[0]
    assert 0 < expected.max() < 1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_files_and_folders_as_text_and_json(checkpoint, images, tmp_path, capfd):
    folder = tmp_path / "some images"
    (folder / "a").mkdir(parents=True)
    shutil.copy(images[0], folder / "a")
    pixels = cv2.imread(str(images[1]))
    for name in ("b.png", "c.JPG", "d.bmp", "notes.txt"):
        encoded = cv2.imencode(pathlib.Path(name).suffix if name[0] != "n" else ".png", pixels)[1]
        (folder / name).write_bytes(encoded.tobytes())
    assert predict.main([checkpoint, str(folder), str(images[2]), "--json"]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    expected = [folder / "a" / images[0].name, *(folder / n for n in ("b.png", "c.JPG", "d.bmp"))]
    assert [row["image"] for row in rows] == [str(path) for path in [*expected, images[2]]]
    for row in rows:
        values = [prediction["probability"] for prediction in row["predictions"]]
        assert len(values) == 5 and values == sorted(values, reverse=True)
        for prediction in row["predictions"]:
            assert prediction["class"] == NAMES[prediction["label"]]
    assert predict.main([checkpoint, str(images[2]), "--top", "2"]) == 0
    lines = capfd.readouterr().out.splitlines()
    best = rows[-1]["predictions"][0]
    assert lines[:2] == [str(images[2]), f"  {best['probability']:.4f}  {best['class']}"]
    assert len(lines) == 3


def test_a_bad_image_is_one_line_and_the_others_are_classified(checkpoint, images, tmp_path, capfd):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image at all")
    (tmp_path / "empty.png").touch()
    paths = [str(bad), str(tmp_path / "missing.png"), str(tmp_path / "empty.png"), str(images[0])]
    assert predict.main([checkpoint, *paths, "--top", "1"]) == 2
    seen = capfd.readouterr()
    errors = [line for line in seen.err.splitlines() if line.startswith("mxresnet.predict: ")]
    assert [path in line for path, line in zip(paths, errors)] == [True] * 3
    assert "can be decoded" in errors[0] and "does not exist" in errors[1] and len(errors) == 3
    assert seen.out.splitlines()[0] == str(images[0])


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["/nowhere", "x.jpg"], "/nowhere is not a folder"),
        (["{checkpoint}"], "required: IMAGE"),
        (["{checkpoint}", "x.jpg", "--top", "0"], "--top 0 must be 1 or more"),
        (["{checkpoint}", "{empty}"], "has no image"),
    ],
)
def test_wrong_arguments(checkpoint, tmp_path, capfd, arguments, expected):
    filled = [text.format(checkpoint=checkpoint, empty=tmp_path) for text in arguments]
    assert predict.main(filled) == 2
    assert expected in capfd.readouterr().err


def test_classes_without_names(tmp_path, images, capfd):
    path = checkpoints.publish_model(tmp_path)
    assert predict.main([path, str(images[0]), "--top", "1"]) == 0
    assert "  class " in capfd.readouterr().out
