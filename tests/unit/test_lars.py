# SPDX-License-Identifier: Apache-2.0
"""LARS against a float64 version in numpy, and mx.optimizer.LARS where the two must agree."""

import mxnet as mx
import numpy as np
import pytest

from mxresnet.lars import DECAYS_BIAS, Lars, sums_of_squares

ETA, WD, MOMENTUM, RESCALE = 0.001, 5e-4, 0.9, 1 / 32
SHAPES = {
    "conv0_weight": (8, 3, 7, 7),
    "bn0_gamma": (8,),
    "bn0_beta": (8,),
    "zero_weight": (4, 4),
    "fc1_weight": (10, 64),
    "fc1_bias": (10,),
}


def rates(update):
    return 0.5 * update if update < 4 else 2.0 / update


def numpy_lars(weights, gradients_of_steps, eps, first_update, decay_bias=True):
    """Return the weights after all steps, computed in float64 from the formula in lars.py."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    m = {name: np.zeros_like(value) for name, value in w.items()}
    for update, gradients in enumerate(gradients_of_steps, start=first_update):
        for name in w:
            plain = name.split("_")[-1] in ("gamma", "beta", "bias")
            undecayed = ("gamma", "beta") if decay_bias else ("gamma", "beta", "bias")
            decay = 0 if name.split("_")[-1] in undecayed else WD
            g = gradients[name].astype(np.float64) * RESCALE
            rate, momentum = rates(update), MOMENTUM
            if not plain:
                w_norm, g_norm = np.sqrt((w[name] ** 2).sum()), np.sqrt((g**2).sum())
                if w_norm > 0 and g_norm > 0:
                    rate *= ETA * w_norm / (g_norm + decay * w_norm + eps)
                if rates(update - 1) > 0:
                    momentum *= rates(update) / rates(update - 1)
            m[name] = momentum * m[name] - rate * (g + decay * w[name])
            w[name] = w[name] + m[name]
    return w


def start(dtype="float32", shapes=SHAPES):
    random = np.random.RandomState(3)
    weights = {
        name: random.randn(*shape).astype(dtype) * (name != "zero_weight")
        for name, shape in shapes.items()
    }
    steps = [
        {name: random.randn(*shape).astype(dtype) * (step != 2) for name, shape in shapes.items()}
        for step in range(8)
    ]
    return weights, steps


def train(optimizer, weights, steps, half=()):
    """Step an optimizer as Module does; names in half are float16, the others float32."""
    arrays = [
        mx.nd.array(value, dtype="float16" if name in half else "float32")
        for name, value in weights.items()
    ]
    updater = mx.optimizer.get_updater(optimizer)
    for gradients in steps:
        updater(
            list(range(len(arrays))),
            [mx.nd.array(gradients[n], dtype=a.dtype) for n, a in zip(weights, arrays)],
            arrays,
        )
    return dict(zip(weights, arrays)), updater


def make_lars(names, eps=0.0, first_update=1, schedule=rates, decay_bias=True):
    optimizer = Lars(
        momentum=MOMENTUM,
        eta=ETA,
        eps=eps,
        decay_bias=decay_bias,
        wd=WD,
        rescale_grad=RESCALE,
        param_idx2name=dict(enumerate(names)),
        begin_num_update=first_update - 1,
    )
    optimizer.lr_scheduler = schedule
    return optimizer


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("first_update", [1, 2])
def test_float32_equals_numpy(eps, first_update):
    weights, steps = start()
    expected = numpy_lars(weights, steps, eps, first_update)
    got, _ = train(make_lars(weights, eps, first_update), weights, steps)
    for name in weights:
        np.testing.assert_allclose(
            got[name].asnumpy(), expected[name], rtol=2e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("name", ["sgdwlars", "sgdwfastlars", "sgdwfastlarsv2"])
def test_the_references_names_differ_in_the_decay_of_the_bias_only(name):
    weights, steps = start()
    got, _ = train(make_lars(weights, decay_bias=DECAYS_BIAS[name]), weights, steps)
    expected = numpy_lars(weights, steps, 0.0, 1, decay_bias=name != "sgdwfastlarsv2")
    for key in weights:
        np.testing.assert_allclose(
            got[key].asnumpy(), expected[key], rtol=2e-5, atol=1e-6, err_msg=key
        )


def test_float16_weights_have_float32_masters():
    weights, steps = start("float16")
    half = ("conv0_weight", "fc1_weight", "zero_weight", "fc1_bias")
    got, updater = train(make_lars(weights), weights, steps, half)
    expected = numpy_lars(weights, steps, 0.0, 1)
    for index, name in enumerate(weights):
        momentum, master = updater.states[index]
        assert momentum.dtype == np.float32
        if name in half:
            assert got[name].dtype == np.float16 and master.dtype == np.float32
            # The norm is that of the rounded working weight: masters differ by that rounding.
            np.testing.assert_allclose(
                master.asnumpy(), expected[name], rtol=2e-3, atol=1e-4, err_msg=name
            )
            np.testing.assert_array_equal(got[name].asnumpy(), master.asnumpy().astype(np.float16))
        else:
            np.testing.assert_allclose(
                got[name].asnumpy(), expected[name], rtol=2e-5, atol=1e-6, err_msg=name
            )


def test_float32_weights_are_their_own_masters():
    weights, steps = start()
    _, updater = train(make_lars(weights), weights, steps)
    assert all(master is None for _, master in updater.states.values())


def test_norms_of_large_tensors_are_exact():
    """MXNet's multi_sum_sq accumulates in float32 on a CPU, which is 0.1 % low here."""
    array = np.random.RandomState(0).randn(1000, 2048).astype("float32")
    (found,) = sums_of_squares([mx.nd.array(array)]).asnumpy()
    np.testing.assert_allclose(found, (array.astype(float) ** 2).sum(), rtol=5e-5)


@pytest.mark.parametrize("half", [False, True])
def test_more_tensors_than_a_kernel_holds(half):
    shapes = {f"layer{i}_{kind}": (5, 3) for i in range(70) for kind in ("weight", "gamma")}
    weights, steps = start("float16", shapes)
    got, _ = train(make_lars(weights), weights, steps, half=tuple(shapes) if half else ())
    expected = numpy_lars(weights, steps, 0.0, 1)
    for name in weights:
        np.testing.assert_allclose(
            got[name].asnumpy(),
            expected[name],
            rtol=5e-3 if half else 2e-5,
            atol=2e-3 if half else 1e-6,
        )


def test_equals_mxnets_lars_where_both_mean_the_same():
    """A constant rate needs no momentum correction; without a bias both decay the same tensors."""
    shapes = {name: shape for name, shape in SHAPES.items() if not name.endswith("bias")}
    weights, steps = start(shapes=shapes)
    got, _ = train(make_lars(weights, schedule=lambda update: 0.3), weights, steps)
    stock = mx.optimizer.LARS(
        momentum=MOMENTUM,
        eta=ETA,
        eps=0,
        wd=WD,
        rescale_grad=RESCALE,
        learning_rate=0.3,
        param_idx2name=dict(enumerate(weights)),
    )
    expected, _ = train(stock, weights, steps)
    for name in weights:
        np.testing.assert_allclose(
            got[name].asnumpy(), expected[name].asnumpy(), rtol=1e-5, atol=1e-7, err_msg=name
        )


def test_differs_from_mxnets_lars_in_the_decay_of_the_bias():
    weights, _ = start()
    zero_gradients = [{name: np.zeros_like(value) for name, value in weights.items()}]
    got, _ = train(make_lars(weights, schedule=lambda update: 0.3), weights, zero_gradients)
    np.testing.assert_allclose(
        got["fc1_bias"].asnumpy(), weights["fc1_bias"] * (1 - 0.3 * WD), rtol=1e-6
    )
    for name in ("bn0_gamma", "bn0_beta"):
        np.testing.assert_array_equal(got[name].asnumpy(), weights[name])
