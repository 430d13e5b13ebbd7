# SPDX-License-Identifier: Apache-2.0
"""A training step and an evaluation, with MXNet's Module and averages over the ranks.

train_loop.py calls them in the order of a run. The loss, softmax cross-entropy with label
smoothing, is the network's last operator (model/loss.py).
"""

from __future__ import annotations

import random
from typing import Any, Dict, Iterable, List, Optional, Tuple

import mxnet as mx
import numpy as np

from mxresnet.checkpoint.state import NetworkState, OwnState
from mxresnet.config import Config
from mxresnet.data.loader import Batch
from mxresnet.device import memory_bytes
from mxresnet.gradient_check import GradientCheck
from mxresnet.lars import DECAYS_BIAS, Lars
from mxresnet.memory import check_memory
from mxresnet.metrics import AccuracyCounter, LossMeter, Score, score_of_all_ranks
from mxresnet.model import portable, resnet
from mxresnet.model.initializers import initializer
from mxresnet.model.ops import PlainOps
from mxresnet.model.sync_batch_norm import set_group_sum_functions
from mxresnet.parallel.world import World
from mxresnet.run_plan import Plan
from mxresnet.saved_model import HEAD, SavedModel, copy_weights
from mxresnet.trainer_state import BoundArrays, network_state, restore_network

# The reference benchmark updates the weights once before the clock starts, which consumes the
# schedule's first value. This program consumes it too, but restores weights, momenta and
# statistics.
WARM_UP_UPDATES = 1


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    mx.random.seed(seed)


class Trainer:
    """One rank's network and optimizer.

    Calls return as soon as MXNet has queued the work; wait() waits for it.
    """

    def __init__(
        self,
        config: Config,
        plan: Plan,
        world: World,
        num_classes: int,
        device: Any,
        ops: PlainOps,
    ):
        """Build the network of an operator backend (select_ops()) on an MXNet context.

        Raises:
            UserError: --bn-group does not divide the ranks of a machine, or the batch does not fit
                in memory.
        """
        self._config, self._plan, self._world, self._device = config, plan, world, device
        self._loss = LossMeter(config.label_smoothing)
        self._initial: Optional[SavedModel] = None
        self._new_head = False
        batch_norms = [bn for _, bn in resnet.layer_names(config.num_layers)]
        set_group_sum_functions(world.group_sum_functions(config.bn_group, batch_norms))
        self._ops, self._num_classes = ops, num_classes
        network = resnet.build(ops, config, num_classes)
        check_memory(config, network, memory_bytes(device, world))
        self._module = mx.mod.Module(network, context=device)
        self._evaluator = self._module
        evaluation_ops = ops.for_evaluation()
        if evaluation_ops is not ops:
            evaluation_network = resnet.build(evaluation_ops, config, num_classes)
            self._evaluator = mx.mod.Module(evaluation_network, context=device)

    @property
    def arrays(self) -> BoundArrays:
        """The network's gradients and running statistics, after initialize()."""
        return BoundArrays(self._module)

    def start_from(self, saved: Optional[SavedModel], new_head: bool) -> None:
        """Make initialize() take the weights and running statistics of a checkpoint.

        Args:
            saved: the checkpoint, on rank 0; the other ranks get rank 0's weights.
            new_head: whether the fully connected layer gets random weights nevertheless.
        """
        self._initial, self._new_head = saved, new_head

    def _set_initial_weights(self, arrays: Dict[str, Any]) -> None:
        """Overwrite the weights and running statistics, by name, with those of the checkpoint."""
        if self._initial is None:
            return
        new = HEAD if self._new_head else ()
        for name, values in copy_weights(self._initial, arrays, new).items():
            arrays[name][:] = values

    def initialize(self) -> List[str]:
        """Allocate the network and draw its initial weights; return the parameters' names.

        Every rank gets rank 0's weights.

        Raises:
            UserError: the checkpoint of start_from() has another network.
        """
        config = self._config
        shapes = {
            "data_shapes": [
                mx.io.DataDesc("data", config.batch_shape, config.input_dtype, config.input_layout)
            ],
            "label_shapes": [mx.io.DataDesc("softmax_label", (config.batch_size,), "float32")],
        }
        self._module.bind(**shapes)
        self._module.init_params(initializer(config))
        parameters, statistics = self._module.get_params()
        self._world.run_on_all_ranks(
            lambda: self._set_initial_weights({**parameters, **statistics})
        )
        self._world.broadcast_parameters(parameters)
        self._world.broadcast_parameters(statistics)
        self._module.set_params(parameters, statistics)
        if self._evaluator is not self._module:
            # shared_module: parameters and statistics are the same arrays in both.
            self._evaluator.bind(**shapes, for_training=False, shared_module=self._module)
        mx.nd.waitall()
        self._gradient_check = GradientCheck(self.arrays.parameter_names)
        return list(parameters)

    def warm_up(self) -> None:
        """Run every kernel of training and evaluation on zeros, then restore the initial state."""
        parameters, statistics = (
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
        self._module.set_params(parameters, statistics)
        self._start_optimizer(updates_done=WARM_UP_UPDATES)
        self.take_loss()
        self._gradient_check.clear()
        mx.nd.waitall()

    def _start_optimizer(self, updates_done: int) -> None:
        """Create the optimizer, with zero momentum, as if it had done a number of updates."""
        config = self._config
        common: Dict[str, Any] = {
            "learning_rate": config.lr,
            "wd": config.wd,
            "momentum": config.mom,
            "rescale_grad": 1 / config.batch_size,
            "param_idx2name": dict(enumerate(self.arrays.parameter_names)),
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
        # Not passed to the constructor, which would set an attribute of the schedule object.
        optimizer.lr_scheduler = self._plan.learning_rate
        self._module.init_optimizer(kvstore=None, optimizer=optimizer, force_init=True)
        self.optimizer = optimizer

    def forward(self, batch: Batch) -> None:
        self._module.forward(mx.io.DataBatch([batch.image], [batch.label]), is_train=True)
        self._loss.add(self._module.get_outputs()[0], self.arrays.labels)

    def backward(self) -> None:
        self._module.backward()

    def update(self) -> None:
        """Average the gradients over the ranks and step the optimizer."""
        gradients = self.arrays.gradients
        self._world.average(gradients, "gradient", self._config.num_groups)
        self._module.update()
        self._gradient_check.add(gradients, getattr(self.optimizer, "gradient_sums", ()))

    def bad_gradient(self, max_pending: int) -> Optional[Tuple[str, int]]:
        """Return the first averaged gradient that is not finite: parameter, steps ago.

        It is the same on every rank.

        Each step is looked at once. The last `max_pending` steps are left for later calls, because
        the device may not have finished them.
        """
        return self._gradient_check.find(max_pending)

    def take_loss(self) -> float:
        """Return the mean loss of this rank's training images since the previous call.

        This waits for the last forward pass.
        """
        return self._loss.take_mean()

    def evaluate(self, batches: Iterable[Batch], averages_statistics: bool = True) -> Score:
        """Average the running statistics over the ranks, then evaluate; return all ranks' score.

        Args:
            batches: those of this rank.
            averages_statistics: False where the statistics are the same on all ranks.

        Raises:
            UserError: the network's output is not finite.
        """
        # MXNet's operators read the training flag when they run, not when they are queued. So no
        # training step may be pending when these forward passes start, and no forward pass may be
        # pending when training continues. On a CPU the backward pass also writes the running
        # statistics, a dependency that MXNet's engine does not know.
        mx.nd.waitall()
        if averages_statistics:
            self._world.average(self.arrays.running_statistics, "statistics", groups=1)
        counter = AccuracyCounter(self._config.top_k)
        for batch in batches:
            self._evaluator.forward(mx.io.DataBatch([batch.image], [batch.label]), is_train=False)
            if batch.num_valid:
                output = self._evaluator.get_outputs()[0][: batch.num_valid]
                label = batch.label[: batch.num_valid].as_in_context(output.context)
                counter.add(output, label)
        mx.nd.waitall()
        counts = self._world.run_on_all_ranks(counter.counts)
        return score_of_all_ranks(counts, self._world, self._config.separ_val)

    def symbol_json(self) -> str:
        """Return the network for inference as the text of an MXNet symbol."""
        return portable.symbol_json(self._config, self._num_classes)

    def network_state(self) -> NetworkState:
        """Copy weights and momenta to host memory, after all queued work. They are all ranks'."""
        self.wait()
        return network_state(self._module, self.arrays, self.has_channel_last_weights)

    def own_state(self) -> OwnState:
        """Copy this rank's running statistics and its loss so far to host memory."""
        self.wait()
        arrays = self.arrays
        statistics = dict(zip(arrays.statistic_names, arrays.running_statistics))
        return OwnState({n: a.asnumpy() for n, a in statistics.items()}, self._loss.state())

    def restore(self, network: NetworkState, own: OwnState) -> None:
        """Continue after the step at which the states were copied."""
        self._start_optimizer(updates_done=network.updates)
        restore_network(self._module, self.arrays, network, own.statistics)
        self._loss.set_state(own.loss, self.arrays.running_statistics[0])
        self.wait()

    @property
    def has_channel_last_weights(self) -> bool:
        """Whether network_state() has weights of convolutions as (O, H, W, I)."""
        return self._ops.has_channel_last_weights

    def start_profile(self) -> None:
        """Start MXNet's own profiler when --profile-worker-suffix names its file."""
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
        """Wait until the device has finished all queued work."""
        mx.nd.waitall()
