# SPDX-License-Identifier: Apache-2.0
"""Batch norm over a group of ranks against one process that has the joined batch."""

import numpy as np
import pytest
from support.commands import SMALL, mpirun

from mxresnet.errors import UserError
from mxresnet.parallel.world import World

LAYER = """
import sys
import numpy as np
from mxresnet.data import loader
from mxresnet.config import Config
loader.load_backend(Config())
from mxresnet.parallel.world import join, start_horovod
group, axis, dtype = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
world = start_horovod(join())
import mxnet as mx
from mxresnet.model.sync_batch_norm import OP_TYPE, set_group_sum_functions
names = ["bnA", "bnB"]
set_group_sum_functions(world.group_sum_functions(group, names))
random = np.random.RandomState(0)
data = (random.randn(world.size * 3, 5, 4, 6) * 3 + 100).astype(dtype)
head = random.randn(*data.shape).astype(dtype)
close = 1e-4 if dtype == "float32" else 2e-3
gamma, beta = random.rand(5).astype("float32") + 0.5, random.randn(5).astype("float32")
first = world.rank // group * group
joined = slice(first * 3, (first + group) * 3)
mine = slice(world.rank * 3, world.rank * 3 + 3)
lay = (lambda a: a.transpose(0, 2, 3, 1)) if axis == 3 else (lambda a: a)
x = mx.sym.var("data")
# Two independent layers, whose sums may be computed in any order.
attributes = dict(op_type=OP_TYPE, eps=1e-5, momentum=0.9, axis=axis)
nets = [mx.sym.Custom(x, name=n, layer=n, **attributes) for n in names]
executor = mx.sym.Group(nets).simple_bind(mx.cpu(), data=lay(data[mine]).shape, type_dict={"data": dtype})
for name in names:
    executor.arg_dict[name + "_gamma"][:] = gamma
    executor.arg_dict[name + "_beta"][:] = beta
    executor.aux_dict[name + "_moving_var"][:] = 1
for _ in range(2):
    outputs = executor.forward(is_train=True, data=mx.nd.array(lay(data[mine]), dtype=dtype))
    executor.backward([mx.nd.array(lay(head[mine]), dtype=dtype)] * 2)
x64, dy = data[joined].astype(float), head[joined].astype(float)
axes = (0, 2, 3)
keep = lambda v: v[None, :, None, None]
mean, var, count = x64.mean(axes), x64.var(axes), x64.size // 5
normal = (x64 - keep(mean)) / np.sqrt(keep(var) + 1e-5)
y = normal * keep(gamma) + keep(beta)
dx = keep(gamma / np.sqrt(var + 1e-5)) * (dy - keep(dy.mean(axes)) - normal * keep((dy * normal).mean(axes)))
part = slice(mine.start - joined.start, mine.stop - joined.start)
for name, output in zip(names, outputs):
    np.testing.assert_allclose(output.asnumpy(), lay(y[part]), rtol=close, atol=close)
    own = dict(gamma=(dy * normal)[part].sum(axes), beta=dy[part].sum(axes))
    for key, value in own.items():
        np.testing.assert_allclose(executor.grad_dict[name + "_" + key].asnumpy(), value, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(executor.aux_dict[name + "_moving_mean"].asnumpy(), 0.19 * mean, rtol=1e-5)
    np.testing.assert_allclose(executor.aux_dict[name + "_moving_var"].asnumpy(), 0.81 + 0.19 * var * count / (count - 1), rtol=1e-4)
np.testing.assert_allclose(executor.grad_dict["data"].asnumpy(), 2 * lay(dx[part]), rtol=10 * close, atol=close)
still = executor.forward(is_train=False)[0].asnumpy()
running = 0.81 + 0.19 * var * count / (count - 1)
np.testing.assert_allclose(
    still, lay((data[mine] - keep(0.19 * mean)) / np.sqrt(keep(running) + 1e-5) * keep(gamma) + keep(beta)), rtol=1e-3, atol=5 * close)
mx.nd.waitall()
world.shutdown()
"""

NETWORK = """
import os, sys
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
    num_layers=18, image_shape=(3, 32, 32), resize=32, batch_size=8 // world.size, bn_group=world.size, optimizer="sgdwfastlars",
    lr=1.0, lr_step_epochs="pow2", num_epochs=3, warmup_epochs=1, bn_gamma_init0=True)
seed_everything(3)
trainer = Trainer(config, make_plan(config, 64, 1), world, 10, mx.cpu(), select_ops(config, on_gpu=False))
trainer.initialize()
trainer.warm_up()
random = np.random.RandomState(1)
images, labels = random.randn(8, 3, 32, 32), random.randint(0, 10, 8)
mine = slice(world.rank * config.batch_size, (world.rank + 1) * config.batch_size)
trainer.forward(Batch(mx.nd.array(images[mine]), mx.nd.array(labels[mine]), config.batch_size))
trainer.backward()
gradients = [arrays[0] for arrays in trainer._module._exec_group.grad_arrays]
world.average(gradients, "gradient", 1)
trainer.wait()
if world.rank == 0:
    per_image = {n: g.asnumpy() / config.batch_size for n, g in zip(trainer._module._exec_group.param_names, gradients)}
    mean = {n: a.asnumpy() for n, a in trainer._module.get_params()[1].items() if n.endswith("mean")}
    np.savez(sys.argv[1], **per_image, **mean)
world.shutdown()
"""


@pytest.mark.parametrize("axis", [1, 3])
@pytest.mark.parametrize(
    "ranks, group, dtype", [(2, 2, "float32"), (4, 2, "float32"), (2, 2, "float16")]
)
def test_a_layer_equals_numpy_on_the_joined_batch(ranks, group, axis, dtype):
    done = mpirun(ranks, "-c", LAYER, group, axis, dtype)
    assert done.returncode == 0, done.stderr


def test_a_network_has_the_gradients_of_one_process_with_the_joined_batch(tmp_path):
    """ResNet-18: two ranks of 4 images with shared statistics, and one of 8 with MXNet's BatchNorm."""
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


def test_machines_with_unequal_numbers_of_ranks_are_refused_by_all():
    """Two ranks on one machine and one on another: the first machine's could form a group."""
    done = mpirun(3, "-c", UNEQUAL, timeout=60)
    assert (
        done.returncode == 0
        and done.stdout.count("--bn-group 2 does not divide the 1 ranks of a machine") == 3
    ), done.stdout + done.stderr


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="--bn-group 2 does not divide the 3 ranks"):
        World(size=3, local_size=3).group_sum_functions(2, ["bn"])
    assert set(World().group_sum_functions(1, ["a", "b"])) == {"a", "b"}


def test_a_run_with_groups_that_do_not_fit_says_so_once(few):
    done = mpirun(3, "-m", "mxresnet", *SMALL, "--bn-group", "2", "--data-root", few, timeout=60)
    said = [line for line in done.stderr.splitlines() if line.startswith("mxresnet: ")]
    assert done.returncode == 2 and len(said) == 1 and "--bn-group 2" in said[0]


def test_a_run_with_groups_trains_and_logs_their_span(few):
    done = mpirun(
        2,
        "-m",
        "mxresnet",
        *SMALL,
        "--num-layers",
        "18",
        "--num-epochs",
        "2",
        "--bn-group",
        "2",
        "--data-root",
        few,
    )
    assert done.returncode == 3 and '"model_bn_span", "value": 32' in done.stdout, done.stderr
