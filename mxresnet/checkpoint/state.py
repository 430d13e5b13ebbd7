# SPDX-License-Identifier: Apache-2.0
"""The state of a run in host memory, and the files of a checkpoint that hold it."""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Sequence, Tuple

import numpy as np

from mxresnet.checkpoint.arrays import read_npz, read_params, write_npz, write_params
from mxresnet.checkpoint.manifest import (
    OPTIMIZER_FILE,
    PARAMS_FILE,
    SYMBOL_FILE,
    DamagedError,
    rank_file,
)

Arrays = Dict[str, np.ndarray]
_MOMENTUM, _STATISTIC, _INPUT, _VALUES = "momentum:", "statistic:", "input:", "values"
# A .params file has the axes of NCHW: those of a channel-last weight (O, H, W, I) and back.
_TO_CHANNEL_FIRST, TO_CHANNEL_LAST = (0, 3, 1, 2), (0, 2, 3, 1)


@dataclass(frozen=True)
class NetworkState:
    """What all ranks have in common after a step.

    Attributes:
        weights: float32, by parameter.
        momenta: float32, by parameter.
        updates: optimizer updates done.
        channel_last: whether the convolutions' weights are (O, H, W, I), not (O, I, H, W).
    """

    weights: Arrays
    momenta: Arrays
    updates: int
    channel_last: bool = False


@dataclass(frozen=True)
class InputState:
    """Where a rank's training data continues.

    Attributes:
        values: JSON values.
        arrays: binary parts, such as DALI's state.
    """

    values: Dict[str, Any] = field(default_factory=dict)
    arrays: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class OwnState:
    """What a rank's network has of its own.

    Attributes:
        statistics: its running statistics, float32, by name.
        loss: sum over its images of this epoch so far, and their number.
    """

    statistics: Arrays
    loss: Tuple[float, int] = (0.0, 0)


@dataclass(frozen=True)
class RankState:
    """What differs from rank to rank.

    Attributes:
        own: state of the network.
        input: state of its training data.
        generators: states of the random number generators of Python and NumPy, as JSON values.
    """

    own: OwnState
    input: InputState
    generators: Dict[str, Any]


def generator_states() -> Dict[str, Any]:
    """Return the states of the global random number generators of Python and NumPy.

    MXNet's own cannot be read. A training step does not use it.
    """
    version, words, gauss = random.getstate()
    state = np.random.get_state(legacy=False)
    keys = state["state"]["key"].tolist()
    position, has_gauss = int(state["state"]["pos"]), int(state["has_gauss"])
    return {
        "python": [version, list(words), gauss],
        "numpy": [state["bit_generator"], keys, position, has_gauss, float(state["gauss"])],
    }


def set_generator_states(states: Mapping[str, Any]) -> None:
    """Restore what generator_states() returned.

    Raises:
        DamagedError: a state is not valid.
    """
    try:
        version, words, gauss = states["python"]
        random.setstate((version, tuple(words), gauss))
        kind, keys, *rest = states["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedError(f"a state of a random number generator is not valid ({error})") from None


def size_bytes(network: NetworkState, ranks: Sequence[RankState]) -> int:
    """Return about how many bytes the files of a checkpoint will have."""
    parts: List[Arrays] = [network.weights, network.momenta]
    for rank in ranks:
        parts += [rank.own.statistics, rank.input.arrays]
    overhead = (1 << 20) + 40_000 * len(ranks)
    return sum(array.nbytes for part in parts for array in part.values()) + overhead


def write_state(
    folder: str, symbol_json: str, network: NetworkState, ranks: Sequence[RankState]
) -> None:
    """Write all files of a checkpoint but its manifest.

    Raises:
        OSError: a file cannot be written.
    """
    with open(os.path.join(folder, SYMBOL_FILE), "w", encoding="utf-8") as file:
        file.write(symbol_json)
        file.flush()
        os.fsync(file.fileno())
    model = {
        f"arg:{name}": _to_channel_first(array, network) for name, array in network.weights.items()
    }
    for name in ranks[0].own.statistics:
        model[f"aux:{name}"] = _mean([rank.own.statistics[name] for rank in ranks])
    write_params(os.path.join(folder, PARAMS_FILE), model)
    momenta = {_MOMENTUM + name: array for name, array in network.momenta.items()}
    write_npz(os.path.join(folder, OPTIMIZER_FILE), momenta)
    for number, rank in enumerate(ranks):
        arrays = {_STATISTIC + name: array for name, array in rank.own.statistics.items()}
        arrays.update({_INPUT + name: array for name, array in rank.input.arrays.items()})
        values = {"input": rank.input.values, "generators": rank.generators, "loss": rank.own.loss}
        arrays[_VALUES] = np.frombuffer(json.dumps(values).encode(), dtype=np.uint8)
        write_npz(os.path.join(folder, rank_file(number)), arrays)


def _to_channel_first(array: np.ndarray, network: NetworkState) -> np.ndarray:
    if network.channel_last and array.ndim == 4:
        return array.transpose(_TO_CHANNEL_FIRST)
    return array


def _mean(arrays: Sequence[np.ndarray]) -> np.ndarray:
    if len(arrays) == 1:
        return arrays[0]
    return np.mean(np.stack(arrays), axis=0, dtype=np.float64).astype(np.float32)


def read_network(folder: str, updates: int, channel_last: bool) -> NetworkState:
    """Return the weights and the momenta of a checkpoint.

    Args:
        folder: of the checkpoint.
        updates: from its manifest.
        channel_last: layout of the convolutions' weights to return.

    Raises:
        DamagedError: a file cannot be read.
    """
    weights = read_weights(folder)[0]
    if channel_last:
        weights = {
            name: array.transpose(TO_CHANNEL_LAST) if array.ndim == 4 else array
            for name, array in weights.items()
        }
    arrays = read_npz(os.path.join(folder, OPTIMIZER_FILE))
    momenta = _without_prefix(arrays, _MOMENTUM)
    return NetworkState(weights, momenta, updates, channel_last)


def read_weights(folder: str) -> Tuple[Arrays, Arrays]:
    """Return the weights, in NCHW, and the averaged running statistics of a checkpoint, float32.

    Raises:
        DamagedError: the file cannot be read.
    """
    arrays = read_params(os.path.join(folder, PARAMS_FILE))
    return _without_prefix(arrays, "arg:"), _without_prefix(arrays, "aux:")


def read_rank(folder: str, rank: int) -> RankState:
    """Return the state of a rank.

    Raises:
        DamagedError: its file cannot be read.
    """
    arrays = read_npz(os.path.join(folder, rank_file(rank)))
    try:
        values = json.loads(arrays[_VALUES].tobytes().decode())
        inputs = InputState(values["input"], _without_prefix(arrays, _INPUT))
        total, images = values["loss"]
        own = OwnState(_without_prefix(arrays, _STATISTIC), (float(total), int(images)))
        return RankState(own, inputs, values["generators"])
    except (KeyError, ValueError, TypeError, RecursionError):
        raise DamagedError(f"{rank_file(rank)} is damaged") from None


def _without_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> Arrays:
    """Return the arrays whose names have a prefix, by the rest of the name."""
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
