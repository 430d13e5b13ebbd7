# SPDX-License-Identifier: Apache-2.0
"""The trained network in a checkpoint, for everything but resuming its run. Needs no framework."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np

from mxresnet import config_parser
from mxresnet.checkpoint import manifest as manifests
from mxresnet.checkpoint import state, store
from mxresnet.checkpoint.manifest import DamagedError, Manifest
from mxresnet.config import FIELDS, Config, flag_of
from mxresnet.data.dataset import DataSet
from mxresnet.errors import UserError

# Settings of a run that --evaluate takes from its checkpoint: the network, the validation data and
# how it is read. The other ones have their defaults.
EVALUATION_SETTINGS = (
    *("network", "num_layers", "image_shape", "dtype", "batch_size", "resize", "top_k"),
    *("input_layout", "conv_layout", "batchnorm_layout", "pooling_layout", "batchnorm_eps"),
    *("fuse_bn_relu", "fuse_bn_add_relu", "conv_algo", "force_tensor_core"),
    *("data_root", "data_train", "data_train_idx", "data_val", "data_val_idx", "use_dali"),
    *(name for name in FIELDS if name.startswith("dali_")),
)
FIRST_WEIGHT, HEAD = "conv0_weight", ("fc1_weight", "fc1_bias")


@dataclass(frozen=True)
class SavedModel:
    """A network with its weights.

    Attributes:
        path: the folder of the checkpoint.
        manifest: what it contains and where it comes from.
        config: settings of the run that matter for the network and its input (Config's defaults
            for the others).
        class_names: in the order of the labels; empty if the data set has no manifest.
        weights: float32, by parameter; those of convolutions are (O, I, H, W).
        statistics: running statistics, float32, averaged over the ranks.
    """

    path: str
    manifest: Manifest
    config: Config
    class_names: List[str]
    weights: Dict[str, np.ndarray]
    statistics: Dict[str, np.ndarray]

    @property
    def classes(self) -> int:
        return len(self.weights[HEAD[1]])

    @property
    def symbol_path(self) -> str:
        return os.path.join(self.path, manifests.SYMBOL_FILE)

    def has_other_classes(self, dataset: DataSet) -> bool:
        """Return whether a data set has another number of classes, or other names of them."""
        names = list(dataset.class_names)
        differ = names and self.class_names and names != self.class_names
        return bool(differ) or dataset.classes != self.classes


def load(path: str) -> SavedModel:
    """Return the network in a checkpoint, or in the best one of the folder of a run.

    Raises:
        UserError: it is not one, or is damaged.
    """
    path = store.find_model(path)
    try:
        manifest = manifests.read_manifest(path)
        weights, statistics = state.read_weights(path)
    except DamagedError as error:
        raise UserError(f"checkpoint {path} cannot be used: {error}: name another one") from None
    if not {FIRST_WEIGHT, *HEAD} <= weights.keys():
        raise UserError(f"checkpoint {path} is not that of a network of this program")
    config, _ = config_parser.parse([], _variables_of(manifest.settings))
    names = manifest.fingerprint.data.get("class_names") or []
    return SavedModel(path, manifest, config, list(map(str, names)), weights, statistics)


def evaluation_config(arguments: Sequence[str], path: str) -> Config:
    """Return the settings of an evaluation: those of the flags, then those of the checkpoint.

    Args:
        arguments: flags of python -m mxresnet.
        path: of the checkpoint.

    Raises:
        UserError: a setting is wrong, or the checkpoint cannot be used.
    """
    path = store.find_model(path)
    try:
        manifest = manifests.read_manifest(path)
    except DamagedError as error:
        raise UserError(f"checkpoint {path} cannot be used: {error}: name another one") from None
    return config_parser.parse(arguments, _variables_of(manifest.settings))[0]


def portable(config: Config) -> Config:
    """Return the settings of the same network in float32 and NCHW, as in a checkpoint."""
    return dataclasses.replace(
        config,
        dtype="float32",
        input_layout="NCHW",
        conv_layout="NCHW",
        batchnorm_layout="NCHW",
        pooling_layout="NCHW",
    )


def _variables_of(settings: Mapping[str, Any]) -> Dict[str, str]:
    """Return settings of EVALUATION_SETTINGS as environment variables."""
    return {
        FIELDS[name].metadata["env"]: _text(settings[name])
        for name in EVALUATION_SETTINGS
        if settings.get(name) is not None
    }


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(int(value)) if isinstance(value, bool) else str(value)


def fit(
    values: np.ndarray, shape: Sequence[int], is_first_weight: bool = False
) -> Optional[np.ndarray]:
    """Return an array of a checkpoint in the shape of a network, or None if it does not fit.

    The axes of a convolution's weight may be (O, I, H, W) or (O, H, W, I). The input may have a
    fourth channel, which is always zero (--image-shape).
    """
    if is_first_weight and values.ndim == 4:
        channels = 4 if 4 in (shape[1], shape[3]) else 3
        padding = [(0, 0), (0, max(0, channels - values.shape[1])), (0, 0), (0, 0)]
        values = np.pad(values[:, :channels], padding)
    if values.shape == tuple(shape):
        return values
    if values.ndim == 4 and values.transpose(state.TO_CHANNEL_LAST).shape == tuple(shape):
        return values.transpose(state.TO_CHANNEL_LAST)
    return None


def to_json_line(content: Mapping[str, Any]) -> str:
    """Return JSON on one line, with a line break."""
    return json.dumps(content) + "\n"


def copy_weights(
    saved: SavedModel, arrays: Mapping[str, Any], new: Sequence[str] = ()
) -> Dict[str, np.ndarray]:
    """Return the values of a checkpoint for the parameters and statistics of a network.

    Args:
        saved: the checkpoint.
        arrays: those of the network, by name, with shapes.
        new: names of parameters that keep their values.

    Raises:
        UserError: the network is another one.
    """
    sources, result = {**saved.weights, **saved.statistics}, {}
    for name, array in arrays.items():
        if name in new:
            continue
        values = sources.get(name)
        fitted = None if values is None else fit(values, array.shape, name == FIRST_WEIGHT)
        if fitted is None:
            found = "nothing" if values is None else " x ".join(map(str, values.shape))
            layers = saved.config.num_layers
            raise UserError(
                f"checkpoint {saved.path} has {found} for {name}, and this network needs "
                f"{' x '.join(map(str, array.shape))}: the network of the checkpoint has "
                f"{flag_of('num_layers')} {layers}"
            )
        result[name] = fitted
    return result
