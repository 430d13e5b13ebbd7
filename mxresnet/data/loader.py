# SPDX-License-Identifier: Apache-2.0
"""Batches for one rank from DALI, MXNet's ImageRecordIter or random numbers.

Nothing is read from the data set before DataLoaders.open().
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import re
import tempfile
from dataclasses import dataclass
from typing import Any, Iterator, Optional, Protocol, Tuple, Type

from mxresnet.checkpoint.state import InputState
from mxresnet.config import Config
from mxresnet.data.dataset import DataSet
from mxresnet.data.file_changes import FileChanges
from mxresnet.data.shard import RecordShard, train_shard, val_shard
from mxresnet.errors import UserError
from mxresnet.parallel.world import World

# Paths that the libraries open unchanged. They take text as UTF-8, whatever the encoding of the
# file system's names is, and ImageRecordIter takes ; ? # and other characters as operators.
_PLAIN_PATH = re.compile(r"[\w/.,=+@ -]*", re.ASCII)

# Values in the state of a TrainLoader.
_ITERATOR, _CUT = "iterator", "cut"
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

    def __init__(
        self,
        config: Config,
        shard: RecordShard,
        device: Context,
        saves_state: bool = False,
        state: Optional[InputState] = None,
    ) -> None:
        """Prepare to read; must not open the record file.

        Args:
            config: the settings.
            shard: what to read.
            device: where the batches are needed.
            saves_state: whether state() will be called.
            state: what an earlier iterator's state() returned, to continue after it.
        """

    @property
    def restores_exactly(self) -> bool:
        """Whether an iterator with this one's state() continues with the same batches."""

    def state(self) -> InputState:
        """Return the position after the last training batch."""

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
        saves_state: bool = False,
        state: Optional[InputState] = None,
    ):
        """Create the iterators.

        Args:
            backend: class of the iterators.
            config: the settings.
            dataset: the data set.
            world: the ranks.
            device: MXNet context.
            seed: seed of this rank.
            saves_state: whether TrainLoader.state() will be called.
            state: what it returned in the run that is resumed.
        """
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
        self._saves_state, self._state = saves_state, state or InputState()
        of_iterator = dataclasses.replace(state, values=state.values[_ITERATOR]) if state else None
        self._train = backend(config, shards[0], device, saves_state, of_iterator)
        self._val = backend(config, shards[1], device)

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
            TrainLoader(
                self._train,
                config.batch_size,
                config.input_batch_multiplier,
                self._saves_state,
                self._state.values.get(_CUT, 0),
            ),
            ValLoader(self._val, FileChanges(self._data_paths.values())),
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
    """Endless training batches of this rank."""

    def __init__(
        self,
        iterator: BatchIterator,
        batch_size: int,
        multiplier: int,
        saves_state: bool = False,
        cut: int = 0,
    ):
        """Take the iterator; nothing is read yet.

        Args:
            iterator: returns images and labels of `multiplier` batches at a time.
            batch_size: images in one batch.
            multiplier: --input-batch-multiplier, batches cut from each result of the iterator.
            saves_state: whether state() will be called.
            cut: batches of the iterator's next result that an earlier loader has delivered.
        """
        self._iterator, self._batch_size, self._multiplier = iterator, batch_size, multiplier
        self._saves_state = saves_state
        self._large: Optional[Tuple[NDArray, NDArray]] = None
        self._cut = cut
        # State before the current result of the iterator, where it may be needed.
        self._state_before: Optional[InputState] = iterator.state() if cut else None

    @property
    def wait_seconds(self) -> float:
        """Time in which the rank has waited for images so far, not for the device."""
        return self._iterator.wait_seconds

    @property
    def restores_exactly(self) -> bool:
        """Whether a loader with this one's state() continues with the same batches."""
        return self._iterator.restores_exactly

    @property
    def can_save(self) -> bool:
        """Whether state() can be called now: not amid a result of the iterator, if it was long."""
        return self._cut in (0, self._multiplier) or self._state_before is not None

    def state(self) -> InputState:
        """Return the position after the last batch; requires `can_save`."""
        amid = self._state_before if self._cut not in (0, self._multiplier) else None
        state = amid or self._iterator.state()
        values = {_ITERATOR: state.values, _CUT: self._cut if amid else 0}
        return InputState(values, state.arrays)

    def batches(self, steps: int) -> Iterator[Batch]:
        """Yield the `steps` batches up to the end of an epoch; continue after the previous ones."""
        for step in range(steps):
            yield self._next(remaining_steps=steps - step)

    def _next(self, remaining_steps: int) -> Batch:
        if self._large is None or self._cut == self._multiplier:
            resumed_amid = self._large is None and self._cut > 0
            if not resumed_amid:
                self._cut = 0
                # A checkpoint may be taken at the end of the epoch.
                ends_epoch = self._saves_state and remaining_steps < self._multiplier
                self._state_before = self._iterator.state() if ends_epoch else None
            self._large = self._iterator.next_train_batch()
        image, label = self._large
        first = self._cut * self._batch_size
        self._cut += 1
        if self._multiplier == 1:
            return Batch(image, label, self._batch_size)
        last = first + self._batch_size
        return Batch(image[first:last], label[first:last], self._batch_size)


class ValLoader:
    """This rank's shard of the validation set."""

    def __init__(self, iterator: BatchIterator, changes: FileChanges):
        self._iterator, self._changes = iterator, changes

    def batches(self) -> Iterator[Batch]:
        """Yield every image of the shard once.

        Raises:
            UserError: a file of the data set was written since the start of the run.
        """
        for image, label, num_valid in self._iterator.iterate_validation():
            yield Batch(image, label, num_valid)
        self._changes.check()
