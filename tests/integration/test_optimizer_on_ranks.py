# SPDX-License-Identifier: Apache-2.0
"""Every step of a run of a small network, through Trainer and Horovod, against float64."""

import functools

import numpy as np
import pytest
from support.commands import mpirun

# Arguments: folder for the results; optimizer, schedule and number of groups of each run.
WHOLE_RUNS = """
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

folder, runs = sys.argv[1], sys.argv[2:]
batch_size = 12 // world.size

def two_layers(ops, config, num_classes):
    x = mx.sym.Flatten(mx.sym.var("data"))
    x = mx.sym.FullyConnected(x, num_hidden=16, no_bias=True, name="conv0")
    x = mx.sym.broadcast_mul(x, mx.sym.var("bn0_gamma", shape=(1, 16)))
    x = mx.sym.broadcast_add(x, mx.sym.var("bn0_beta", shape=(1, 16)))
    x = mx.sym.Activation(x, act_type="relu")
    x = mx.sym.FullyConnected(x, num_hidden=num_classes, name="fc1")
    return mx.sym.SoftmaxOutput(x, smooth_alpha=config.label_smoothing, name="softmax")

class FakeOps:
    def for_evaluation(self):
        return self

def parameters(made):
    return {n: a.asnumpy() for n, a in made._module.get_params()[0].items()}

def train(run):
    optimizer, schedule, groups = run.split()
    config = Config(
        image_shape=(3, 4, 4), batch_size=batch_size, optimizer=optimizer,
        lr=0.8 if "lars" in optimizer else 0.05, wd=5e-4, label_smoothing=0.1,
        lr_step_epochs=schedule, num_epochs=9, warmup_epochs=2, lars_eta=0.02,
        num_groups=int(groups))
    plan = make_plan(config, 24, world.size)
    random = np.random.RandomState(0)
    made = trainer.Trainer(config, plan, world, 5, mx.cpu(), FakeOps())
    trainer.seed_everything(7 + world.rank)  # all ranks must get rank 0's weights
    made.initialize()
    made.warm_up()
    first = parameters(made)
    steps = plan.total_steps
    images = random.randn(steps, world.size, batch_size, 3, 4, 4)
    labels = random.randint(0, 5, (steps, world.size, batch_size))
    for step in range(steps):
        image, label = mx.nd.array(images[step, world.rank]), mx.nd.array(labels[step, world.rank])
        made.forward(Batch(image, label, batch_size))
        made.backward()
        made.update()
    made.wait()
    if world.rank == 0:
        np.savez(
            f"{folder}/{run}.npz",
            images=images.reshape(steps, 12, -1), labels=labels.reshape(steps, 12),
            rates=[plan.learning_rate(i) for i in range(steps + 3)],
            **{"first_" + n: a for n, a in first.items()},
            **{"last_" + n: a for n, a in parameters(made).items()})

resnet.build = two_layers
for run in runs:
    train(run)
world.shutdown()
"""


def float64_run(data, optimizer, wd=5e-4, eta=0.02, momentum=0.9, alpha=0.1):
    """Return the last weights, computed by numpy: forward, backward, global mean, update."""
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


# Numbers of ranks -> optimizer, schedule and number of groups of each run.
RUNS = {
    1: ["sgdwfastlars pow2 1"],
    3: [
        "sgdwfastlars pow2 1",
        "sgdwfastlarsv2 pow2 0",
        "sgdwlars 4,7 2",
        "sgd 4,7 1",
    ],
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return results(ranks), the folder with the results of all runs on these ranks."""

    @functools.lru_cache(maxsize=None)
    def run(ranks):
        folder = tmp_path_factory.mktemp(f"runs on {ranks} ranks")
        done = mpirun(ranks, "-c", WHOLE_RUNS, folder, *RUNS[ranks])
        assert done.returncode == 0, done.stderr
        return folder

    return run


@pytest.mark.parametrize("ranks, run", [(ranks, run) for ranks in RUNS for run in RUNS[ranks]])
def test_a_whole_run_equals_float64(results, ranks, run):
    """18 steps of a small network through Trainer and Horovod, warm-up and decay included."""
    data = np.load(results(ranks) / f"{run}.npz")
    expected = float64_run(data, run.split()[0])
    assert len(data["images"]) == 18
    for name, value in expected.items():
        moved = np.linalg.norm(value - data["first_" + name])
        assert moved > 0.001
        np.testing.assert_allclose(
            data["last_" + name], value, rtol=1e-4, atol=1e-4 * moved + 1e-6, err_msg=name
        )
