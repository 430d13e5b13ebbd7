# SPDX-License-Identifier: Apache-2.0
"""What a step is: MXNet's Module, its optimizer, and the ranks' average in between. When it happens is loop.py's."""

from __future__ import annotations

import random
from typing import Any, Iterable, List

import mxnet as mx
import numpy as np

from mxresnet.config import Config
from mxresnet.data.loader import Batch
from mxresnet.errors import UserError
from mxresnet.lars import DECAYS_BIAS, Lars
from mxresnet.lr_schedule import Plan
from mxresnet.metrics import Score
from mxresnet.model import resnet
from mxresnet.model.select_ops import NOT_TRIED, select_ops
from mxresnet.model.sync_batch_norm import set_group_sum_functions
from mxresnet.parallel.world import World

# The reference updates once before the clock starts, which uses up the schedule's first value. So do we; unlike it,
# we put weights, momenta and statistics back.
WARM_UP_UPDATES = 1


def choose_device(config: Config, world: World) -> Any:
    """This rank's MXNet context. Raises UserError when the GPU or the layout it needs is not there."""
    found = mx.context.num_gpus()
    gpus = [int(gpu) for gpu in config.gpus.split(",")] if config.gpus else list(range(found))
    if not gpus:
        if config.dtype == "float16":
            raise UserError(
                f"--dtype {config.dtype} needs a GPU and none is found: use --dtype float32 or bfloat16"
            )
        # MXNet's convolution cannot on a CPU, and its batch norm crashes now and then.
        if "NHWC" in (config.conv_layout, config.batchnorm_layout, config.pooling_layout):
            raise UserError(
                "--conv-layout, --batchnorm-layout and --pooling-layout NHWC need a GPU and none is found: use NCHW"
            )
        return mx.cpu()
    if config.dtype == "bfloat16":
        raise UserError("--dtype bfloat16 is for CPUs: use --dtype float16 on a GPU")
    if world.local_rank >= len(gpus):
        raise UserError(
            f"{len(gpus)} GPUs for rank {world.local_rank} of this machine: start fewer ranks or see --gpus"
        )
    return mx.gpu(gpus[world.local_rank])


def check_device(device: Any) -> None:
    """Run a kernel: public MXNet has machine code for some generations of GPUs only. Raises UserError."""
    try:
        mx.nd.zeros((1,), device).asnumpy()
    except mx.MXNetError as error:
        said = [
            line.strip()
            for line in str(error).splitlines()
            if "rror" in line or "Check failed" in line
        ] or [str(error).strip()]
        raise UserError(
            f"MXNet {mx.__version__} cannot use {device}: {said[-1][:200]}; the public GPU package knows compute capabilities 5.0 "
            "to 8.6 (Maxwell to Ampere), not Hopper or later"
        ) from None


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    mx.random.seed(seed)


class Trainer:
    """One rank's network and optimizer. Calls return as soon as MXNet has queued them; wait() waits for them.

    cudnn_bn_unavailable_reason is op_sets.cudnn_bn_unavailable_reason()'s answer, the same on all ranks. Raises UserError when --bn-group does
    not fit the ranks.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        world: World,
        classes: int,
        device: Any,
        cudnn_bn_unavailable_reason: str = NOT_TRIED,
    ):
        self._config, self._plan, self._world, self._device = config, plan, world, device
        set_group_sum_functions(
            world.group_sum_functions(
                config.bn_group, [bn for _, bn in resnet.layer_names(config.num_layers)]
            )
        )
        ops = select_ops(config, device.device_type == "gpu", cudnn_bn_unavailable_reason)
        self._module = mx.mod.Module(resnet.build(ops, config, classes), context=device)
        self._evaluator = self._module
        evaluation_ops = ops.for_evaluation()
        if evaluation_ops is not ops:
            self._evaluator = mx.mod.Module(
                resnet.build(evaluation_ops, config, classes), context=device
            )

    def initialise(self) -> List[str]:
        """Allocate, draw the first weights, take rank 0's; return the parameters' names."""
        config = self._config
        shapes = {
            "data_shapes": [
                mx.io.DataDesc("data", config.batch_shape, config.input_dtype, config.input_layout)
            ],
            "label_shapes": [mx.io.DataDesc("softmax_label", (config.batch_size,), "float32")],
        }
        self._module.bind(**shapes)
        self._module.init_params(resnet.initializer(config))
        arguments, statistics = self._module.get_params()
        self._world.broadcast_parameters(arguments)
        self._world.broadcast_parameters(statistics)
        self._module.set_params(arguments, statistics)
        if self._evaluator is not self._module:
            self._evaluator.bind(
                **shapes, for_training=False, shared_module=self._module
            )  # parameters and statistics are the same arrays
        mx.nd.waitall()
        return list(arguments)

    def _start_optimizer(self, updates_done: int) -> None:
        config = self._config
        common = {
            "learning_rate": config.lr,
            "wd": config.wd,
            "momentum": config.mom,
            "rescale_grad": 1 / config.batch_size,
            "param_idx2name": dict(enumerate(self._module._exec_group.param_names)),
            "begin_num_update": updates_done,
        }
        if config.optimizer == "sgd":
            optimizer = mx.optimizer.SGD(multi_precision=True, **common)
        else:
            optimizer = Lars(
                eta=config.lars_eta,
                eps=config.lars_eps,
                decay_bias=DECAYS_BIAS[config.optimizer],
                **common,
            )
        # After the constructor, which would otherwise assign learning_rate to the schedule.
        optimizer.lr_scheduler = self._plan.learning_rate
        self._module.init_optimizer(kvstore=None, optimizer=optimizer, force_init=True)

    def warm_up(self) -> None:
        """Run every kernel of training and evaluation once on invented data, and leave no trace of it."""
        arguments, statistics = (
            {name: array.copy() for name, array in part.items()}
            for part in self._module.get_params()
        )
        self._start_optimizer(updates_done=0)
        config = self._config
        batch = Batch(
            mx.nd.zeros(config.batch_shape, self._device, dtype=config.input_dtype),
            mx.nd.zeros((config.batch_size,), self._device),
            num_valid=config.batch_size,
        )
        for _ in range(WARM_UP_UPDATES):
            self.forward(batch)
            self.backward()
            self.update()
        mx.nd.waitall()
        self._evaluator.forward(mx.io.DataBatch([batch.image], [batch.label]), is_train=False)
        mx.nd.waitall()
        self._module.set_params(arguments, statistics)
        self._start_optimizer(updates_done=WARM_UP_UPDATES)
        mx.nd.waitall()

    def forward(self, batch: Batch) -> None:
        self._module.forward(mx.io.DataBatch([batch.image], [batch.label]), is_train=True)

    def backward(self) -> None:
        self._module.backward()

    def update(self) -> None:
        """Average the gradients over the ranks and step the optimizer."""
        gradients = [arrays[0] for arrays in self._module._exec_group.grad_arrays]
        self._world.average(gradients, "gradient", self._config.num_groups)
        self._module.update()

    def evaluate(self, batches: Iterable[Batch]) -> Score:
        """Count over all ranks, with the running statistics averaged over the ranks first.

        Raises UserError when the network's output is no longer finite.
        """
        # MXNet's operators look up whether they train when they run, not when they are queued: no step may be pending
        # here, nor any of these forward passes at the end. And on CPU the running statistics are written by the backward
        # pass, unseen by readers' dependencies.
        mx.nd.waitall()
        self._world.average(
            [arrays[0] for arrays in self._module._exec_group.aux_arrays], "statistics", groups=1
        )
        correct, in_top_k, finite, total = [], [], [], 0
        for batch in batches:
            self._evaluator.forward(mx.io.DataBatch([batch.image], [batch.label]), is_train=False)
            if batch.num_valid:
                output = self._evaluator.get_outputs()[0][: batch.num_valid]
                label = batch.label[: batch.num_valid].as_in_context(output.context)
                correct.append((output.argmax(axis=1) == label).sum())
                if self._config.top_k:
                    likeliest = output.topk(axis=1, k=self._config.top_k)
                    in_top_k.append((likeliest == label.reshape((-1, 1))).sum())
                finite.append(mx.nd.contrib.isfinite(output).min())
                total += batch.num_valid
        if not all(value.asscalar() for value in finite):
            raise UserError(
                "the network's output is not finite any more: training diverged; lower --lr or warm up longer"
            )
        mx.nd.waitall()
        counts = [
            sum(int(value.asscalar()) for value in correct),
            total,
            sum(int(value.asscalar()) for value in in_top_k),
        ]
        # With --separ-val every rank has seen every image; rank 0 speaks, so that all decide alike.
        return Score(
            *(self._world.broadcast(counts) if self._config.separ_val else self._world.sum(counts))
        )

    def start_profile(self) -> None:
        """Let MXNet's own profiler write what happens from now on to --profile-worker-suffix's file."""
        if self._config.profile_worker_suffix:
            mx.profiler.set_config(
                profile_all=True,
                filename=f"rank{self._world.rank}_{self._config.profile_worker_suffix}",
            )
            mx.profiler.set_state("run")

    def stop_profile(self) -> None:
        if self._config.profile_worker_suffix:
            mx.profiler.set_state("stop")
            mx.profiler.dump()

    def wait(self) -> None:
        """Wait until the device has done all that was queued."""
        mx.nd.waitall()
