# SPDX-License-Identifier: Apache-2.0
"""Gradients that are not finite, found on the device."""

import dataclasses

import mxnet as mx
import numpy as np
import pytest
from support import checkpoints

from mxresnet.config import Config
from mxresnet.data.loader import Batch
from mxresnet.gradient_check import GradientCheck
from mxresnet.model import resnet
from mxresnet.model.ops import PlainOps

NAMES = resnet.parameter_names(50)


@pytest.fixture(scope="module")
def shapes():
    config = Config(batch_size=2, image_shape=(3, 32, 32))
    network = resnet.build(PlainOps(config), config, 10)
    arguments, _, _ = network.infer_shape(data=(2, 3, 32, 32), softmax_label=(2,))
    inputs = ("data", "softmax_label")
    pairs = dict(zip(network.list_arguments(), arguments))
    assert [name for name in pairs if name not in inputs] == NAMES
    return [pairs[name] for name in NAMES]


def gradients(shapes, dtypes=("float32",), value=1.0):
    return [
        mx.nd.full(shape, value, dtype=dtypes[number % len(dtypes)])
        for number, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_first_parameter_of_the_network_is_named(shapes, value):
    for name in ("conv0_weight", "bn0_gamma", "stage3_unit2_conv2_weight", "fc1_bias"):
        check, arrays = GradientCheck(NAMES), gradients(shapes)
        first = NAMES.index(name)
        for number in {first, *range(first, len(NAMES), 7)}:
            arrays[number].reshape((-1,))[-1:] = value
        check.add(arrays)
        assert check.find(0) == (name, 0)


def test_a_network_of_two_types(shapes):
    check, arrays = GradientCheck(NAMES), gradients(shapes, ("float16", "float32"), 100)
    check.add(arrays)
    assert check.find(0) is None
    for position in (40, 41):
        arrays[position][:1] = np.inf
    check.add(arrays)
    assert check.find(0) == (NAMES[40], 0)


def test_sums_that_are_known_are_not_computed_again(shapes):
    """They are wrong here, so that a second computation would be noticed."""
    check, arrays = GradientCheck(NAMES), gradients(shapes)
    known = [([7, 3], mx.nd.array([1, np.nan])), ([160], mx.nd.array([np.inf]))]
    check.add(arrays, known)
    assert check.find(0) == (NAMES[3], 0)
    arrays[7][:] = np.nan
    check.add(arrays, [([7, 3], mx.nd.array([1, 1])), ([160], mx.nd.array([1]))])
    assert check.find(0) is None


@pytest.mark.parametrize("optimizer", ["sgd", "sgdwlars", "sgdwfastlarsv2"])
def test_every_parameter_of_a_trainer_is_checked_once(optimizer, monkeypatch):
    config = dataclasses.replace(checkpoints.CONFIG, optimizer=optimizer, lr_step_epochs="pow2")
    trainer, seen = checkpoints.trainer(config=config), []
    monkeypatch.setattr(GradientCheck, "find", lambda self, _: seen.append(self._pending[-1]))
    trainer.initialize()
    trainer.warm_up()
    images = mx.nd.random.normal(shape=config.batch_shape)
    for _ in range(2):
        trainer.forward(Batch(images, mx.nd.array([1, 2]), 2))
        trainer.backward()
        trainer.update()
        trainer.bad_gradient(0)
    found = trainer.arrays.gradients
    for order, _ in seen:
        assert sorted(order) == list(range(len(found)))
    expected = [float((found[position].asnumpy() ** 2).sum()) for position in seen[1][0]]
    np.testing.assert_allclose(seen[1][1].asnumpy(), expected, rtol=1e-3)


def test_steps_are_looked_at_when_they_are_old_enough_and_once():
    check = GradientCheck(["w"])
    for value in (1e18, 0.0, np.nan, 1.0, 1.0):
        check.add([mx.nd.full((3,), value)])
        if value != 1.0:
            assert check.find(2) is None
    assert check.find(2) == ("w", 2) and check.find(0) is None
    check.add([mx.nd.full((3,), np.nan)])
    check.clear()
    assert check.find(0) is None
