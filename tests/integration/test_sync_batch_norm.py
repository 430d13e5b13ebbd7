# SPDX-License-Identifier: Apache-2.0
"""Batch norm over a group of ranks against one process that has the joined batch."""

import numpy as np
import pytest
from support.commands import SMALL, mpirun

from mxresnet.errors import UserError
from mxresnet.parallel.world import World

# Arguments: ranks of a group; channel axis and data type of each case. Compares the results of each
# rank with numpy on the joined batch of its group.
LAYER = """
import sys
import numpy as np
from mxresnet.data import loader
from mxresnet.config import Config
loader.load_backend(Config())
from mxresnet.parallel.world import join, start_horovod
group, cases = int(sys.argv[1]), sys.argv[2:]
world = start_horovod(join())
import mxnet as mx
from mxresnet.model.sync_batch_norm import OP_TYPE, set_group_sum_functions

names, eps, momentum = ["bnA", "bnB"], 1e-5, 0.9
set_group_sum_functions(world.group_sum_functions(group, names))

def per_channel(values):
    return values[None, :, None, None]

def compare(axis, dtype):
    def to_layout(array):
        return array.transpose(0, 2, 3, 1) if axis == 3 else array

    random = np.random.RandomState(0)
    data = (random.randn(world.size * 3, 5, 4, 6) * 3 + 100).astype(dtype)
    head = random.randn(*data.shape).astype(dtype)
    gamma, beta = random.rand(5).astype("float32") + 0.5, random.randn(5).astype("float32")
    first_rank = world.rank // group * group
    joined = slice(first_rank * 3, (first_rank + group) * 3)
    own = slice(world.rank * 3, world.rank * 3 + 3)
    own_in_joined = slice(own.start - joined.start, own.stop - joined.start)

    # Two independent layers, whose sums may be computed in any order.
    attributes = dict(op_type=OP_TYPE, eps=eps, momentum=momentum, axis=axis)
    shared = mx.sym.var("data")
    layers = [mx.sym.Custom(shared, name=n, layer=n, **attributes) for n in names]
    executor = mx.sym.Group(layers).simple_bind(
        mx.cpu(), data=to_layout(data[own]).shape, type_dict={"data": dtype})
    for name in names:
        executor.arg_dict[name + "_gamma"][:] = gamma
        executor.arg_dict[name + "_beta"][:] = beta
        executor.aux_dict[name + "_moving_var"][:] = 1
    own_data = mx.nd.array(to_layout(data[own]), dtype=dtype)
    for _ in range(2):
        outputs = executor.forward(is_train=True, data=own_data)
        executor.backward([mx.nd.array(to_layout(head[own]), dtype=dtype)] * 2)

    x, dy = data[joined].astype(float), head[joined].astype(float)
    axes = (0, 2, 3)

    mean, var, count = x.mean(axes), x.var(axes), x.size // 5
    normalized = (x - per_channel(mean)) / np.sqrt(per_channel(var) + eps)
    y = normalized * per_channel(gamma) + per_channel(beta)
    dx = per_channel(gamma / np.sqrt(var + eps)) * (
        dy - per_channel(dy.mean(axes)) - normalized * per_channel((dy * normalized).mean(axes)))
    running_mean = 0.19 * mean  # after two steps
    running_var = 0.81 + 0.19 * var * count / (count - 1)

    tolerance = 1e-4 if dtype == "float32" else 2e-3
    close = np.testing.assert_allclose
    for name, output in zip(names, outputs):
        close(output.asnumpy(), to_layout(y[own_in_joined]), rtol=tolerance, atol=tolerance)
        for kind, gradients in (("gamma", dy * normalized), ("beta", dy)):
            found = executor.grad_dict[name + "_" + kind].asnumpy()
            close(found, gradients[own_in_joined].sum(axes), rtol=1e-4, atol=1e-3)
        close(executor.aux_dict[name + "_moving_mean"].asnumpy(), running_mean, rtol=1e-5)
        close(executor.aux_dict[name + "_moving_var"].asnumpy(), running_var, rtol=1e-4)
    found = executor.grad_dict["data"].asnumpy()
    close(found, 2 * to_layout(dx[own_in_joined]), rtol=10 * tolerance, atol=tolerance)
    evaluated = executor.forward(is_train=False)[0].asnumpy()
    expected = (data[own] - per_channel(running_mean)) / np.sqrt(per_channel(running_var) + eps)
    expected = expected * per_channel(gamma) + per_channel(beta)
    close(evaluated, to_layout(expected), rtol=1e-3, atol=5 * tolerance)
    mx.nd.waitall()

for case in cases:
    axis, dtype = case.split()
    compare(int(axis), dtype)
    print("compared", case)
world.shutdown()
"""

# Argument: the file for the gradients and running means of ResNet-18 after one step of 8 images.
NETWORK = """
import sys
import numpy as np
from mxresnet.data import loader
from mxresnet.config import Config
loader.load_backend(Config())
from mxresnet.parallel.world import join, start_horovod
world = start_horovod(join())
import mxnet as mx
from mxresnet.data.loader import Batch
from mxresnet.model.select_ops import select_ops
from mxresnet.run_plan import make_plan
from mxresnet.trainer import Trainer, seed_everything

config = Config(
    num_layers=18, image_shape=(3, 32, 32), resize=32, batch_size=8 // world.size,
    bn_group=world.size, optimizer="sgdwfastlars", lr=1.0, lr_step_epochs="pow2", num_epochs=3,
    warmup_epochs=1, bn_gamma_init0=True)
seed_everything(3)
ops = select_ops(config, on_gpu=False)
trainer = Trainer(config, make_plan(config, 64, 1), world, 10, mx.cpu(), ops)
trainer.initialize()
trainer.warm_up()
random = np.random.RandomState(1)
images, labels = random.randn(8, 3, 32, 32), random.randint(0, 10, 8)
own = slice(world.rank * config.batch_size, (world.rank + 1) * config.batch_size)
trainer.forward(Batch(mx.nd.array(images[own]), mx.nd.array(labels[own]), config.batch_size))
trainer.backward()
group = trainer._module._exec_group
gradients = [arrays[0] for arrays in group.grad_arrays]
world.average(gradients, "gradient", 1)
trainer.wait()
if world.rank == 0:
    results = {n: g.asnumpy() / config.batch_size for n, g in zip(group.param_names, gradients)}
    statistics = trainer._module.get_params()[1]
    results.update({n: a.asnumpy() for n, a in statistics.items() if n.endswith("mean")})
    np.savez(sys.argv[1], **results)
world.shutdown()
"""


@pytest.mark.parametrize(
    "ranks, group, dtypes", [(2, 2, ["float32", "float16"]), (4, 2, ["float32"])]
)
def test_a_layer_equals_numpy_on_the_joined_batch(ranks, group, dtypes):
    cases = [f"{axis} {dtype}" for dtype in dtypes for axis in (1, 3)]
    done = mpirun(ranks, "-c", LAYER, group, *cases)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compared") == ranks * len(cases)


def test_a_network_has_the_gradients_of_one_process_with_the_joined_batch(tmp_path):
    """Compare ResNet-18 on two ranks of 4 images, and on one rank of 8 with MXNet's BatchNorm."""
    for ranks in (1, 2):
        done = mpirun(ranks, "-c", NETWORK, tmp_path / f"{ranks}.npz")
        assert done.returncode == 0, done.stderr
    one, two = np.load(tmp_path / "1.npz"), np.load(tmp_path / "2.npz")
    # With the last gammas at zero, what comes before them has no gradient yet.
    errors = {
        n: np.linalg.norm(two[n] - one[n]) / np.linalg.norm(one[n])
        for n in one.files
        if np.linalg.norm(one[n]) > 1e-7
    }
    assert len(errors) > 30 and max(errors.values()) < 1e-3, errors


UNEQUAL = """
import dataclasses
from mxresnet.errors import UserError
from mxresnet.parallel.world import join
world = join()
world = dataclasses.replace(world, local_size=2 - world.rank // 2)
try:
    world.run_on_all_ranks(lambda: world.group_sum_functions(2, ["bn"]))
except UserError as error:
    print(f"rank {world.rank}: {error}")
world.stop_watchdog()
"""


def test_machines_with_unequal_numbers_of_ranks_are_rejected_by_all_ranks():
    """With two ranks on one machine and one on another, only the first could form a group."""
    done = mpirun(3, "-c", UNEQUAL, timeout=60)
    assert (
        done.returncode == 0
        and done.stdout.count("--bn-group 2 does not divide the 1 ranks of a machine") == 3
    ), done.stdout + done.stderr


def test_unsuitable_groups_are_rejected():
    with pytest.raises(UserError, match="--bn-group 2 does not divide the 3 ranks"):
        World(size=3, local_size=3).group_sum_functions(2, ["bn"])
    assert set(World().group_sum_functions(1, ["a", "b"])) == {"a", "b"}


def test_run_with_unsuitable_groups_reports_it_once(few):
    done = mpirun(3, "-m", "mxresnet", *SMALL, "--bn-group", "2", "--data-root", few, timeout=60)
    lines = [line for line in done.stderr.splitlines() if line.startswith("mxresnet: ")]
    assert done.returncode == 2 and len(lines) == 1 and "--bn-group 2" in lines[0]


def test_a_run_with_groups_trains_and_logs_their_span(few):
    flags = [*SMALL, "--num-epochs", "2", "--bn-group", "2", "--data-root", few]
    done = mpirun(2, "-m", "mxresnet", *flags)
    assert done.returncode == 3 and '"model_bn_span", "value": 32' in done.stdout, done.stderr
