# SPDX-License-Identifier: Apache-2.0
"""Make checkpoints of a small network without training it."""

import numpy as np

from mxresnet.checkpoint import state, store
from mxresnet.checkpoint.fingerprint import Fingerprint, effective_settings
from mxresnet.checkpoint.manifest import Manifest, Position
from mxresnet.config import Config

CONFIG = Config(num_layers=18, image_shape=(3, 32, 32), resize=32, batch_size=2)
CLASSES = 10
START = Position(1, 2)


def bound_module(config=CONFIG, classes=CLASSES):
    """Return a Module with the network of a run, and random weights and running statistics."""
    import mxnet as mx

    from mxresnet.model import resnet
    from mxresnet.model.ops import PlainOps

    module = mx.mod.Module(resnet.build(PlainOps(config), config, classes), context=mx.cpu())
    module.bind(
        [("data", config.batch_shape)],
        [("softmax_label", (config.batch_size,))],
        for_training=False,
    )
    module.init_params(mx.init.Xavier())
    weights, statistics = module.get_params()
    for name, array in statistics.items():
        statistics[name] = mx.nd.random.uniform(0.5, 1.5, array.shape)
    module.set_params(weights, statistics)
    return module


def states_of(module, ranks=1):
    """Return the states of a network with these weights; momenta are the negative weights."""
    weights, statistics = (
        {name: array.asnumpy() for name, array in part.items()} for part in module.get_params()
    )
    network = state.NetworkState(weights, {n: -a for n, a in weights.items()}, updates=3)
    inputs = [
        state.InputState({"since": rank}, {"dali": np.arange(5, dtype="u1")})
        for rank in range(ranks)
    ]
    return network, [
        state.RankState(
            state.OwnState({n: a + rank for n, a in statistics.items()}),
            inputs[rank],
            state.generator_states(),
        )
        for rank in range(ranks)
    ]


def fingerprint_of(config=CONFIG, ranks=1, **data):
    return Fingerprint(effective_settings(config), {"train": 20, **data}, ranks, {"mxnet": "1.9.1"})


def publish(folder, network, ranks, position=START, symbol="{}", **changes):
    """Write a checkpoint; return its path. changes: fields of its manifest."""
    fields = {
        "run_id": "run",
        "position": position,
        "updates": network.updates,
        "seed": 5,
        "accuracy": None,
        "best_accuracy": None,
        "is_best": False,
        "created": 2.0,
        "run_started": 1.0,
        "fingerprint": fingerprint_of(ranks=len(ranks)),
        **changes,
    }
    return store.publish(
        str(folder),
        position,
        state.size_bytes(network, ranks),
        lambda path: state.write_state(path, symbol, network, ranks),
        lambda files: Manifest(files=files, **fields),
    )


def tiny_states(ranks=1):
    """Return states with three numbers."""
    network = state.NetworkState({"w": np.ones(2, "f4")}, {"w": np.zeros(2, "f4")}, updates=3)
    generators = state.generator_states()
    own = [state.OwnState({"m": np.full(1, rank, "f4")}, (rank, 1)) for rank in range(ranks)]
    return network, [
        state.RankState(own[rank], state.InputState({"since": rank}), generators)
        for rank in range(ranks)
    ]


def publish_model(folder, config=CONFIG, **data):
    """Write a checkpoint with a network that can be used; data: facts about its data set."""
    module = bound_module(config)
    network, ranks = states_of(module)
    fingerprint = fingerprint_of(config, **data)
    symbol = module.symbol.tojson()
    return publish(folder, network, ranks, symbol=symbol, fingerprint=fingerprint)


def trainer(classes=CLASSES, config=CONFIG):
    """Return the trainer of one rank on the CPU, not initialized."""
    import mxnet as mx

    from mxresnet.model.select_ops import select_ops
    from mxresnet.parallel.world import World
    from mxresnet.run_plan import make_plan
    from mxresnet.trainer import Trainer

    ops = select_ops(config, on_gpu=False)
    return Trainer(config, make_plan(config, 20, 1), World(), classes, mx.cpu(), ops)
