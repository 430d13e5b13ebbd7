# SPDX-License-Identifier: Apache-2.0
"""LARS against an independent float64 version, and against mx.optimizer.LARS where the two must agree."""

import mxnet as mx
import numpy as np
import pytest
from support.commands import mpirun

from mxresnet.lars import DECAYS_BIAS, Lars, _squares

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
    """The update written from the paper and the description of the benchmark, in float64."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    m = {name: np.zeros_like(value) for name, value in w.items()}
    for update, gradients in enumerate(gradients_of_steps, start=first_update):
        for name in w:
            plain = name.split("_")[-1] in ("gamma", "beta", "bias")
            decay = (
                0 if name.split("_")[-1] in ("gamma", "beta") + ("bias",) * (not decay_bias) else WD
            )
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


def ours(names, eps=0.0, first_update=1, schedule=rates, decay_bias=True):
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
    got, _ = train(ours(weights, eps, first_update), weights, steps)
    for name in weights:
        np.testing.assert_allclose(
            got[name].asnumpy(), expected[name], rtol=2e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.parametrize("name", ["sgdwlars", "sgdwfastlars", "sgdwfastlarsv2"])
def test_the_references_names_differ_in_the_decay_of_the_bias_only(name):
    weights, steps = start()
    got, _ = train(ours(weights, decay_bias=DECAYS_BIAS[name]), weights, steps)
    expected = numpy_lars(weights, steps, 0.0, 1, decay_bias=name != "sgdwfastlarsv2")
    for key in weights:
        np.testing.assert_allclose(
            got[key].asnumpy(), expected[key], rtol=2e-5, atol=1e-6, err_msg=key
        )


def test_float16_weights_have_float32_masters():
    weights, steps = start("float16")
    half = ("conv0_weight", "fc1_weight", "zero_weight", "fc1_bias")
    got, updater = train(ours(weights), weights, steps, half)
    expected = numpy_lars(weights, steps, 0.0, 1)
    for index, name in enumerate(weights):
        momentum, master = updater.states[index]
        assert momentum.dtype == np.float32
        if name in half:
            assert got[name].dtype == np.float16 and master.dtype == np.float32
            # The norm is taken of the rounded working weight, so the masters differ from float64 by that rounding.
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
    _, updater = train(ours(weights), weights, steps)
    assert all(master is None for _, master in updater.states.values())


def test_norms_of_large_tensors_are_exact():
    """MXNet's multi_sum_sq adds up naively on a CPU, which is 0.1 % low here."""
    array = np.random.RandomState(0).randn(1000, 2048).astype("float32")
    (found,) = _squares([mx.nd.array(array)]).asnumpy()
    np.testing.assert_allclose(found, (array.astype(float) ** 2).sum(), rtol=5e-5)


@pytest.mark.parametrize("half", [False, True])
def test_more_tensors_than_a_kernel_holds(half):
    shapes = {f"layer{i}_{kind}": (5, 3) for i in range(70) for kind in ("weight", "gamma")}
    weights, steps = start("float16", shapes)
    got, _ = train(ours(weights), weights, steps, half=tuple(shapes) if half else ())
    expected = numpy_lars(weights, steps, 0.0, 1)
    for name in weights:
        np.testing.assert_allclose(
            got[name].asnumpy(),
            expected[name],
            rtol=5e-3 if half else 2e-5,
            atol=2e-3 if half else 1e-6,
        )


def test_equals_mxnets_lars_where_both_mean_the_same():
    """A constant rate has no momentum correction; without a bias there is no difference in what is decayed."""
    shapes = {name: shape for name, shape in SHAPES.items() if not name.endswith("bias")}
    weights, steps = start(shapes=shapes)
    got, _ = train(ours(weights, schedule=lambda update: 0.3), weights, steps)
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
    still = [{name: np.zeros_like(value) for name, value in weights.items()}]
    got, _ = train(ours(weights, schedule=lambda update: 0.3), weights, still)
    np.testing.assert_allclose(
        got["fc1_bias"].asnumpy(), weights["fc1_bias"] * (1 - 0.3 * WD), rtol=1e-6
    )
    for name in ("bn0_gamma", "bn0_beta"):
        np.testing.assert_array_equal(got[name].asnumpy(), weights[name])


WHOLE_RUN = """
import sys
import numpy as np
from mxresnet.data import loader
from mxresnet.config import Config
loader.load_backend(Config())
from mxresnet.parallel.world import join, start_horovod
world = start_horovod(join())
import mxnet as mx
from mxresnet.model import resnet
from mxresnet import trainer
from mxresnet.data.loader import Batch
from mxresnet.run_plan import make_plan

def two_layers(ops, config, classes):
    x = mx.sym.FullyConnected(mx.sym.Flatten(mx.sym.var("data")), num_hidden=16, no_bias=True, name="conv0")
    x = mx.sym.broadcast_add(mx.sym.broadcast_mul(x, mx.sym.var("bn0_gamma", shape=(1, 16))), mx.sym.var("bn0_beta", shape=(1, 16)))
    x = mx.sym.FullyConnected(mx.sym.Activation(x, act_type="relu"), num_hidden=classes, name="fc1")
    return mx.sym.SoftmaxOutput(x, smooth_alpha=config.label_smoothing, name="softmax")

resnet.build = two_layers
class NoOps:
    def for_evaluation(self): return self
config = Config(
    image_shape=(3, 4, 4), batch_size=4, optimizer=sys.argv[2], lr=0.8 if "lars" in sys.argv[2] else 0.05, wd=5e-4, label_smoothing=0.1,
    lr_step_epochs=sys.argv[3], num_epochs=9, warmup_epochs=2, lars_eta=0.02, num_groups=int(sys.argv[4]))
plan = make_plan(config, 24, 3)
random = np.random.RandomState(0)
made = trainer.Trainer(config, plan, world, 5, mx.cpu(), NoOps())
trainer.seed_everything(7 + world.rank)  # rank 0's weights win
made.initialize()
made.warm_up()
first = {n: a.asnumpy() for n, a in made._module.get_params()[0].items()}
steps = plan.total_steps
images, labels = random.randn(steps, 3, 4, 3, 4, 4), random.randint(0, 5, (steps, 3, 4))
if world.size == 1:
    images, labels = images.reshape(steps, 1, 12, 3, 4, 4), labels.reshape(steps, 1, 12)
for step in range(steps):
    made.forward(Batch(mx.nd.array(images[step, world.rank]), mx.nd.array(labels[step, world.rank]), 4))
    made.backward()
    made.update()
made.wait()
if world.rank == 0:
    np.savez(sys.argv[1], images=images.reshape(steps, 12, -1), labels=labels.reshape(steps, 12), rates=[plan.learning_rate(i) for i in range(steps + 3)],
             **{"first_" + n: a for n, a in first.items()}, **{"last_" + n: a.asnumpy() for n, a in made._module.get_params()[0].items()})
world.shutdown()
"""


def float64_run(data, optimizer, wd=5e-4, eta=0.02, momentum=0.9, alpha=0.1):
    """The whole run again in numpy: forward, backward, mean over the global batch, update."""
    w = {n[6:]: data[n].astype(float) for n in data.files if n.startswith("first_")}
    m = {n: np.zeros_like(v) for n, v in w.items()}
    for step, (x, label) in enumerate(zip(data["images"], data["labels"])):
        rate, last_rate = data["rates"][step + 2], data["rates"][step + 1]
        h = x @ w["conv0_weight"].T
        s = h * w["bn0_gamma"] + w["bn0_beta"]
        r = np.maximum(s, 0)
        logits = r @ w["fc1_weight"].T + w["fc1_bias"]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        target = np.full_like(p, alpha / (p.shape[1] - 1))
        target[np.arange(len(label)), label] = 1 - alpha
        d = (p - target) / len(label)
        ds = d @ w["fc1_weight"] * (s > 0)
        g = {
            "fc1_weight": d.T @ r,
            "fc1_bias": d.sum(0),
            "bn0_gamma": (ds * h).sum(0, keepdims=True),
            "bn0_beta": ds.sum(0, keepdims=True),
            "conv0_weight": (ds * w["bn0_gamma"]).T @ x,
        }
        for n in w:
            kind = n.split("_")[1]
            trust = correction = 1.0
            if optimizer == "sgd":
                decay = wd * (kind in ("weight", "gamma"))
            else:
                decay = wd * (kind == "weight" or kind == "bias" and optimizer != "sgdwfastlarsv2")
                if kind == "weight":
                    w_norm, g_norm = np.linalg.norm(w[n]), np.linalg.norm(g[n])
                    trust = eta * w_norm / (g_norm + decay * w_norm)
                    correction = rate / last_rate
            m[n] = momentum * correction * m[n] - trust * rate * (g[n] + decay * w[n])
            w[n] = w[n] + m[n]
    return w


@pytest.mark.parametrize(
    "ranks, optimizer, schedule, groups",
    [
        (1, "sgdwfastlars", "pow2", 1),
        (3, "sgdwfastlars", "pow2", 1),
        (3, "sgdwfastlarsv2", "pow2", 0),
        (3, "sgdwlars", "4,7", 2),
        (3, "sgd", "4,7", 1),
    ],
)
def test_a_whole_run_equals_float64(tmp_path, ranks, optimizer, schedule, groups):
    """18 steps of a small network through Trainer and Horovod, warm-up and decay included."""
    script = WHOLE_RUN if ranks == 3 else WHOLE_RUN.replace("batch_size=4", "batch_size=12")
    script = (
        script
        if ranks == 3
        else script.replace("make_plan(config, 24, 3)", "make_plan(config, 24, 1)")
    )
    done = mpirun(ranks, "-c", script, tmp_path / "run.npz", optimizer, schedule, groups)
    assert done.returncode == 0, done.stderr
    data = np.load(tmp_path / "run.npz")
    expected = float64_run(data, optimizer)
    assert len(data["images"]) == 18
    for name, value in expected.items():
        moved = np.linalg.norm(value - data["first_" + name])
        assert moved > 0.001
        np.testing.assert_allclose(
            data["last_" + name], value, rtol=1e-4, atol=1e-4 * moved + 1e-6, err_msg=name
        )
