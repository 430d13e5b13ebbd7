# SPDX-License-Identifier: Apache-2.0
"""The arrays of an MXNet Module, and copies of them in host memory.

Module and its Updater have no public access to momenta and master weights, except as a pickle.
"""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

import mxnet as mx
import numpy as np

from mxresnet.checkpoint.state import NetworkState


class BoundArrays:
    """The arrays that a bound Module computes on: the same objects in every step, not copies.

    Module's public methods return copies. Only this class uses Module's private executor group.
    """

    def __init__(self, module: Any):
        self._group = module._exec_group

    @property
    def parameter_names(self) -> List[str]:
        return list(self._group.param_names)

    @property
    def gradients(self) -> List[Any]:
        """Gradients of the parameters, in the order of parameter_names."""
        return [arrays[0] for arrays in self._group.grad_arrays]

    @property
    def parameters(self) -> List[Any]:
        """The parameters, in the order of parameter_names."""
        return [arrays[0] for arrays in self._group.param_arrays]

    @property
    def statistic_names(self) -> List[str]:
        return list(self._group.aux_names)

    @property
    def labels(self) -> Any:
        """The labels of the batch that the forward pass got last, on the device."""
        return self._group.label_arrays[0][0][1]

    @property
    def running_statistics(self) -> List[Any]:
        return [arrays[0] for arrays in self._group.aux_arrays]


def _momentum_and_master(state: Any) -> Tuple[Optional[Any], Optional[Any]]:
    """Return the momentum and the float32 master of a parameter; None for what it does not have.

    Args:
        state: its entry in Updater.states: a pair, or the momentum alone.
    """
    if isinstance(state, (tuple, list)):
        momentum, master = state
        return momentum, master
    return state, None


def network_state(module: Any, arrays: BoundArrays, channel_last: bool) -> NetworkState:
    """Return a copy of the weights, float32, and of the momenta.

    Args:
        module: bound Module whose optimizer has done an update.
        arrays: its arrays.
        channel_last: see NetworkState.
    """
    weights, momenta = {}, {}
    for index, (name, weight) in enumerate(zip(arrays.parameter_names, arrays.parameters)):
        momentum, master = _momentum_and_master(module._updater.states.get(index))
        weights[name] = (
            (weight if master is None else master).asnumpy().astype(np.float32, copy=False)
        )
        if momentum is not None:
            momenta[name] = momentum.asnumpy()
    return NetworkState(weights, momenta, module._optimizer.num_update, channel_last)


def restore_network(
    module: Any, arrays: BoundArrays, network: NetworkState, statistics: Dict[str, np.ndarray]
) -> None:
    """Set weights, running statistics and momenta; the optimizer must be new."""
    weights = {name: mx.nd.array(array) for name, array in network.weights.items()}
    module.set_params(weights, {name: mx.nd.array(array) for name, array in statistics.items()})
    updater, optimizer = module._updater, module._optimizer
    for index, (name, weight) in enumerate(zip(arrays.parameter_names, arrays.parameters)):
        state = optimizer.create_state_multi_precision(index, weight)
        momentum, master = _momentum_and_master(state)
        if momentum is not None and name in network.momenta:
            momentum[:] = mx.nd.array(network.momenta[name])
        if master is not None:
            master[:] = weights[name]
        updater.states[index], updater.states_synced[index] = state, True
