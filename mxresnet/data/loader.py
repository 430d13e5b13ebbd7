# SPDX-License-Identifier: Apache-2.0
"""Batches for a rank, from DALI, MXNet's ImageRecordIter or nowhere. Nothing of the data is read before open().

A backend module offers Stream(config, paths, rank, ranks, device, seed, training): examples() counts the images of the
file, next() returns the next training images and labels, evaluation() yields (images, labels, num_valid) of one evaluation.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from typing import Any, Iterator, Tuple

from mxresnet.config import Config
from mxresnet.data.dataset import DataSet
from mxresnet.errors import UserError
from mxresnet.parallel.world import World


@dataclass(frozen=True)
class Batch:
    """image: NDArray of config.batch_shape and precision; label: float32 NDArray (batch,); num_valid: images that count.

    The images behind the first `num_valid` are padding. The arrays are overwritten two batches later, when MXNet has done what it
    was told to do with them.
    """

    image: Any
    label: Any
    num_valid: int


# Class names by module; each is imported only when it is used.
_ITERATORS = {
    "dali": "DaliIterator",
    "image_record_iter": "ImageRecordIterator",
    "synthetic": "SyntheticIterator",
}


def choose_backend(config: Config) -> str:
    """Return the name of the module to read with; MXNet's own iterator where DALI is not installed."""
    if config.synth_data:
        return "synthetic"
    has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    return "dali" if config.use_dali and has_dali else "image_record_iter"


def load_backend(config: Config) -> Any:
    """Load the backend; must come before Horovod is loaded.

    Horovod loads libmxnet with its symbols visible to all. DALI, loaded after that, would call MXNet's copies of the
    C++ templates that both contain, which fit another C++ library, and crash at its first batch.
    """
    name = choose_backend(config)
    return getattr(importlib.import_module(f"mxresnet.data.{name}"), _ITERATORS[name])


class DataLoaders:
    """Both pipelines of a rank, built but not opened."""

    def __init__(
        self, backend: Any, config: Config, dataset: DataSet, world: World, device: Any, seed: int
    ):
        self._config, self._dataset = config, dataset
        self._paths = {
            name: config.path(name)
            for name in ("data_train", "data_train_idx", "data_val", "data_val_idx")
        }
        # With --lazy_init_sanity the pipelines know only names that come into being when the clock runs.
        self._hidden = (
            tempfile.TemporaryDirectory(prefix="mxresnet-") if config.lazy_init_sanity else None
        )
        paths = (
            {name: os.path.join(self._hidden.name, name) for name in self._paths}
            if self._hidden
            else self._paths
        )
        self._train = backend(config, paths, world.rank, world.size, device, seed, training=True)
        val_part = (0, 1) if config.separ_val else (world.rank, world.size)
        self._val = backend(config, paths, *val_part, device, seed, training=False)

    def open(self) -> Tuple[TrainLoader, ValLoader]:
        """Touch the data for the first time and compare the counts. Raises UserError when they are not as promised."""
        if self._hidden:
            for name, path in self._paths.items():
                os.symlink(os.path.abspath(path), os.path.join(self._hidden.name, name))
        data = self._dataset
        train_examples, val_examples = self._train.examples(), self._val.examples()
        if train_examples < data.train_examples or val_examples != data.val_examples:
            raise UserError(
                f"the data set has {train_examples} training and {val_examples} validation images, "
                f"not {data.train_examples} and {data.val_examples}: set --num-examples and --num-val-examples, or make it again"
            )
        return TrainLoader(
            self._train, self._config.batch_size, self._config.input_batch_multiplier
        ), ValLoader(self._val)


class TrainLoader:
    """Endless training batches of this rank; each is a slice when the pipeline makes several at a time."""

    def __init__(self, stream: Any, batch_size: int, multiplier: int):
        self._batch_size = batch_size
        self._all = self._endless(stream, multiplier)

    def _endless(self, stream: Any, multiplier: int) -> Iterator[Batch]:
        while True:
            image, label = stream.next()
            for first in range(0, multiplier * self._batch_size, self._batch_size):
                last = first + self._batch_size
                yield (
                    Batch(image[first:last], label[first:last], self._batch_size)
                    if multiplier > 1
                    else Batch(image, label, last)
                )

    def batches(self, steps: int) -> Iterator[Batch]:
        """`steps` batches. What a pipeline has made and an epoch does not use, the next epoch does."""
        for _ in range(steps):
            yield next(self._all)


class ValLoader:
    """This rank's share of the validation set, once a call."""

    def __init__(self, stream: Any):
        self._stream = stream

    def batches(self) -> Iterator[Batch]:
        for image, label, num_valid in self._stream.evaluation():
            yield Batch(image, label, num_valid)
