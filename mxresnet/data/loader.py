# SPDX-License-Identifier: Apache-2.0
"""Batches for one rank from DALI, MXNet's ImageRecordIter or random numbers.

Nothing is read from the data set before DataLoaders.open().
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import tempfile
from dataclasses import dataclass
from typing import Any, Iterator, Protocol, Tuple, Type

from mxresnet.config import Config
from mxresnet.data.dataset import DataSet
from mxresnet.data.shard import RecordShard, train_shard, val_shard
from mxresnet.errors import UserError
from mxresnet.parallel.world import World

# Paths that the libraries open unchanged. They take text as UTF-8, whatever the encoding of the
# file system's names is, and ImageRecordIter takes ; ? # and other characters as operators.
_PLAIN_PATH = re.compile(r"[\w/.,=+@ -]*", re.ASCII)

NDArray = Any  # mxnet.nd.NDArray; MXNet is imported by the backends only
Context = Any  # mxnet.Context

# Backend modules, imported only when used, and their iterator classes.
_ITERATOR_CLASSES = {
    "dali": "DaliIterator",
    "image_record_iter": "ImageRecordIterator",
    "synthetic": "SyntheticIterator",
}


@dataclass(frozen=True)
class Batch:
    """One batch of images and labels on this rank.

    The arrays are reused: two batches later an array is overwritten, once MXNet has finished the
    operations that are queued on it.

    Attributes:
        image: NDArray of shape config.batch_shape and dtype config.input_dtype.
        label: float32 NDArray of shape (batch,).
        num_valid: number of images to count; the images after these are padding.
    """

    image: NDArray
    label: NDArray
    num_valid: int


class BatchIterator(Protocol):
    """What a backend provides: batches of one shard of the training or validation records."""

    # Seconds in which the caller has waited for images, without waiting for the device.
    wait_seconds: float

    def __init__(self, config: Config, shard: RecordShard, device: Context) -> None:
        """Prepare to read; must not open the record file."""

    def num_examples(self) -> int:
        """Check the record file, open it, and return the number of all its images.

        Raises:
            UserError: the records cannot be read or are damaged.
        """

    def next_train_batch(self) -> Tuple[NDArray, NDArray]:
        """Return the next images and labels of the endless training data.

        Raises:
            UserError: a record cannot be decoded, or its label is not the number of a class.
        """

    def iterate_validation(self) -> Iterator[Tuple[NDArray, NDArray, int]]:
        """Yield (images, labels, num_valid) for one pass over this shard of the validation data.

        Raises:
            UserError: a record cannot be decoded, or its label is not the number of a class.
        """


def choose_backend(config: Config) -> str:
    """Return the name of the backend module: a key of _ITERATOR_CLASSES.

    Without DALI, or with --use-dali 0, this is MXNet's own ImageRecordIter.
    """
    if config.synth_data:
        return "synthetic"
    has_dali = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    return "dali" if config.use_dali and has_dali else "image_record_iter"


def load_backend(config: Config) -> Type[BatchIterator]:
    """Import the backend and return its iterator class. Call this before Horovod is loaded.

    Horovod loads libmxnet with its symbols visible to all libraries. If DALI is loaded after
    that, it calls MXNet's copies of C++ templates that both libraries contain. Those copies
    match another version of the C++ library, and DALI crashes at its first batch.
    """
    name = choose_backend(config)
    module = importlib.import_module(f"mxresnet.data.{name}")
    return getattr(module, _ITERATOR_CLASSES[name])


class DataLoaders:
    """The training and the validation iterator of one rank, which open() opens."""

    def __init__(
        self,
        backend: Type[BatchIterator],
        config: Config,
        dataset: DataSet,
        world: World,
        device: Context,
        seed: int,
    ):
        self._config, self._dataset = config, dataset
        self._data_paths = {
            name: config.path(name)
            for name in ("data_train", "data_train_idx", "data_val", "data_val_idx")
        }
        # With --lazy_init_sanity the iterators get paths that open() creates: reading earlier is
        # an error. Paths that they would not open as they are need links too.
        plain = all(map(_PLAIN_PATH.fullmatch, self._data_paths.values()))
        self._links_folder = (
            tempfile.TemporaryDirectory(prefix="mxresnet-")
            if config.lazy_init_sanity or not plain
            else None
        )
        self._opened_paths = (
            {name: os.path.join(self._links_folder.name, name) for name in self._data_paths}
            if self._links_folder
            else self._data_paths
        )
        shards = [
            make(config, dataset, self._opened_paths, world, seed)
            for make in (train_shard, val_shard)
        ]
        self._train, self._val = (backend(config, shard, device) for shard in shards)

    def open(self) -> Tuple[TrainLoader, ValLoader]:
        """Open the record files for the first time, and compare their counts with `dataset`'s.

        Raises:
            UserError: the records cannot be read, or the counts differ.
        """
        if self._links_folder:
            for name, path in self._data_paths.items():
                os.symlink(os.path.abspath(path), self._opened_paths[name])
        try:
            self._check_counts(self._train.num_examples(), self._val.num_examples())
        except UserError:
            if self._links_folder:  # MPI may end this process before Python does
                self._links_folder.cleanup()
            raise
        config = self._config
        return (
            TrainLoader(self._train, config.batch_size, config.input_batch_multiplier),
            ValLoader(self._val),
        )

    def _check_counts(self, train_examples: int, val_examples: int) -> None:
        data = self._dataset
        if train_examples < data.train_examples or val_examples != data.val_examples:
            raise UserError(
                f"the data set has {train_examples} training and {val_examples} validation "
                f"images, not {data.train_examples} and {data.val_examples}: set --num-examples "
                "and --num-val-examples to its counts, or convert it again with python -m "
                "prepare.imagenet"
            )


class TrainLoader:
    """Endless training batches of this rank.

    Args:
        iterator: returns images and labels of `multiplier` batches at a time.
        batch_size: images in one batch.
        multiplier: --input-batch-multiplier, batches cut from each result of the iterator.
    """

    def __init__(self, iterator: BatchIterator, batch_size: int, multiplier: int):
        self._iterator = iterator
        self._endless_batches = _cut_batches(iterator, batch_size, multiplier)

    @property
    def wait_seconds(self) -> float:
        """Time in which the rank has waited for images so far, not for the device."""
        return self._iterator.wait_seconds

    def batches(self, steps: int) -> Iterator[Batch]:
        """Yield `steps` batches, continuing where the previous call stopped."""
        for _ in range(steps):
            yield next(self._endless_batches)


def _cut_batches(iterator: BatchIterator, batch_size: int, multiplier: int) -> Iterator[Batch]:
    """Yield batches without end; each result of the iterator holds `multiplier` batches."""
    while True:
        image, label = iterator.next_train_batch()
        if multiplier == 1:
            yield Batch(image, label, batch_size)
            continue
        for first in range(0, multiplier * batch_size, batch_size):
            last = first + batch_size
            yield Batch(image[first:last], label[first:last], batch_size)


class ValLoader:
    """This rank's shard of the validation set."""

    def __init__(self, iterator: BatchIterator):
        self._iterator = iterator

    def batches(self) -> Iterator[Batch]:
        """Yield every image of the shard once."""
        for image, label, num_valid in self._iterator.iterate_validation():
            yield Batch(image, label, num_valid)
