# SPDX-License-Identifier: Apache-2.0
"""CudnnBnOps, on cudnn_bn's CPU library, trains and evaluates ResNet-50 as PlainOps does."""

import dataclasses
import json

import mxnet as mx
import numpy as np
import pytest

from mxresnet import trainer
from mxresnet.config import Config
from mxresnet.data.loader import Batch
from mxresnet.model.cudnn_bn import runtime
from mxresnet.model.ops import CudnnBnOps, PlainOps
from mxresnet.parallel.world import World
from mxresnet.run_plan import make_plan

pytestmark = pytest.mark.usefixtures("cpu_library")
CONFIG = Config(
    image_shape=(4, 32, 32),
    resize=32,
    batch_size=8,
    optimizer="sgdwfastlars",
    lr=0.1,
    lr_step_epochs="pow2",
    warmup_epochs=1,
    num_epochs=5,
    bn_gamma_init0=True,
)


def warmed_up_trainer(ops, config=CONFIG):
    trainer.seed_everything(1)
    plan = make_plan(config, 64, 1)
    warmed_up = trainer.Trainer(config, plan, World(), 10, mx.cpu(), ops(config))
    warmed_up.initialize()
    warmed_up.warm_up()
    return warmed_up


def batches():
    random = np.random.RandomState(2)
    images, labels = (
        lambda: mx.nd.array(random.randn(*CONFIG.batch_shape)),
        lambda: mx.nd.array(random.randint(0, 10, 8)),
    )
    return [Batch(images(), labels(), 8) for _ in range(3)]


def values(trained):
    """Return parameters and running statistics by name."""
    return {n: a.asnumpy() for part in trained._module.get_params() for n, a in part.items()}


def train_two_steps(trained):
    for batch in batches()[:2]:
        trained.forward(batch)
        trained.backward()
        trained.update()
    mx.nd.waitall()


def evaluate(trained):
    score = trained.evaluate(batches())
    return score, trained._evaluator.get_outputs()[0].asnumpy()


@pytest.mark.parametrize("fuse_relu, fuse_add_relu", [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_resnet_50_trains_and_evaluates_as_with_plain_ops(monkeypatch, fuse_relu, fuse_add_relu):
    # On a CPU, not on a GPU, MXNet folds the batch norms of a network that is bound for evaluation
    # into the convolutions, and does not notice when the statistics change.
    monkeypatch.setenv("MXNET_SUBGRAPH_BACKEND", "NONE")
    config = dataclasses.replace(CONFIG, fuse_bn_relu=fuse_relu, fuse_bn_add_relu=fuse_add_relu)
    own, plain = warmed_up_trainer(CudnnBnOps, config), warmed_up_trainer(PlainOps)
    used = [node["op"] for node in json.loads(own._module.symbol.tojson())["nodes"]]
    # Of 53 batch norms, 33 precede a ReLU, 16 an addition; 4 are in shortcuts.
    expected_counts = [53 - 33 * fuse_relu - 16 * fuse_add_relu, 33 * fuse_relu, 16 * fuse_add_relu]
    assert [used.count(name) for name in runtime.OPERATORS] == expected_counts
    assert "BatchNorm" not in used
    evaluated = [node["op"] for node in json.loads(own._evaluator.symbol.tojson())["nodes"]]
    assert [evaluated.count(name) for name in runtime.EVALUATION_OPERATORS] == expected_counts
    assert not {"BatchNorm", *runtime.OPERATORS} & set(evaluated)
    for trained in (own, plain):
        train_two_steps(trained)
    found, expected = values(own), values(plain)
    assert list(found) == list(expected)
    for name, value in expected.items():
        if not name.endswith("moving_var"):  # MXNet's BatchNorm keeps the biased one on a CPU
            error = np.linalg.norm(found[name] - value)
            assert error <= 2e-3 * np.linalg.norm(value) + 1e-5, name
    score, output = evaluate(own)
    for name, value in values(own).items():
        np.testing.assert_array_equal(value, found[name], err_msg=f"evaluation changes {name}")
    plain._module.set_params(*own._module.get_params())
    plain_score, plain_output = evaluate(plain)
    np.testing.assert_allclose(output, plain_output, rtol=1e-4, atol=1e-6)
    assert score == plain_score
