# SPDX-License-Identifier: Apache-2.0
"""Gradients that are not finite, found on the device."""

import mxnet as mx
import numpy as np
import pytest

from mxresnet.config import Config
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
