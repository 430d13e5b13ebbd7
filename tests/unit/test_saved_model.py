# SPDX-License-Identifier: Apache-2.0
"""The network in a checkpoint: settings, class names, weights for other layouts and classes."""

import dataclasses
import os

import numpy as np
import pytest
from support import checkpoints

from mxresnet import saved_model
from mxresnet.data.dataset import DataSet
from mxresnet.errors import UserError
from mxresnet.evaluation import initial_weights, load

NAMES = [f"digit_{number}" for number in range(checkpoints.CLASSES)]
DATA = DataSet(20, 10, checkpoints.CLASSES, True, class_names=tuple(NAMES))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return saved_model.load(
        checkpoints.publish_model(tmp_path_factory.mktemp("run"), class_names=NAMES)
    )


def test_settings_and_classes_are_those_of_the_run(saved):
    config = checkpoints.CONFIG
    for name in ("num_layers", "image_shape", "resize", "batch_size"):
        assert getattr(saved.config, name) == getattr(config, name)
    assert saved.class_names == NAMES and saved.classes == 10


def test_flags_override_the_settings_of_the_checkpoint(saved):
    config = saved_model.evaluation_config(
        ["--evaluate", saved.path, "--batch-size", "7"], saved.path
    )
    assert (config.batch_size, config.num_layers, config.evaluate) == (7, 18, saved.path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed", "manifest", "no checkpoint"])
def test_a_checkpoint_that_cannot_be_used_is_named_in_one_line(tmp_path, damage):
    path = checkpoints.publish_model(tmp_path)
    params = os.path.join(path, "model-0000.params")
    if damage == "truncated":
        os.truncate(params, 1000)
    elif damage == "flipped":
        with open(params, "r+b") as file:
            file.seek(5000)
            byte = file.read(1)
            file.seek(5000)
            file.write(bytes([byte[0] ^ 1]))
    elif damage == "removed":
        os.remove(params)
    elif damage == "manifest":
        os.truncate(os.path.join(path, "manifest.json"), 100)
    else:
        path = str(tmp_path / "nothing")
        os.mkdir(path)
    with pytest.raises(UserError) as error:
        saved_model.load(path)
    assert path in str(error.value)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("channel_last", [False, True])
def test_weights_in_other_layouts_and_with_a_fourth_channel(channels, channel_last):
    values = np.random.RandomState(0).rand(8, 3, 7, 7).astype("f4")
    expected = np.concatenate([values, np.zeros((8, 1, 7, 7), "f4")], 1)[:, :channels]
    back = values
    if channel_last:
        expected = expected.transpose(0, 2, 3, 1)
    found = saved_model.fit(values, expected.shape, is_first_weight=True)
    np.testing.assert_array_equal(found, expected)
    four = np.pad(back, [(0, 0), (0, 1), (0, 0), (0, 0)])
    np.testing.assert_array_equal(saved_model.fit(four, expected.shape, True), expected)


def test_weights_of_another_network_do_not_fit(saved):
    arrays = {**saved.weights, "stage1_unit1_conv1_weight": np.zeros((64, 64, 1, 1))}
    with pytest.raises(UserError, match="64 x 64 x 3 x 3 for stage1_unit1_conv1_weight.*layers 18"):
        saved_model.copy_weights(saved, arrays)
    with pytest.raises(UserError, match="nothing for stage9"):
        saved_model.copy_weights(saved, {"stage9_weight": np.zeros(3)})


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, None),
        ({"classes": 12, "class_names": ()}, "fc1 is new: the data set has 12 classes and"),
        ({"class_names": tuple(reversed(NAMES))}, "fc1 is new: the data set has other classes"),
        ({"class_names": ()}, None),
    ],
)
def test_the_head_is_new_for_other_classes(saved, changes, expected):
    dataset = dataclasses.replace(DATA, **changes)
    initial = initial_weights(saved.path, dataset, rank=0)
    assert initial.new_head == (expected is not None)
    assert saved.path in initial.notes[0] and (expected or "(--init-from)") in initial.notes[0]
    assert initial_weights(saved.path, dataset, rank=1).saved is None
    if expected:
        with pytest.raises(UserError, match="data set is not that of checkpoint"):
            load(saved.path, dataset, rank=0)
    else:
        assert load(saved.path, dataset, rank=0).path == saved.path


@pytest.mark.parametrize("classes", [10, 7])
def test_a_trainer_starts_from_the_weights(saved, classes):
    trainer = checkpoints.trainer(classes)
    trainer.start_from(saved, new_head=classes != 10)
    trainer.initialize()
    weights, statistics = trainer._module.get_params()
    for name, values in {**saved.weights, **saved.statistics}.items():
        found = {**weights, **statistics}[name].asnumpy()
        if name.startswith("fc1") and classes != 10:
            assert len(found) == classes
        else:
            np.testing.assert_array_equal(found, values, err_msg=name)
