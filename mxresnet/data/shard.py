# SPDX-License-Identifier: Apache-2.0
"""Which part of a record file each rank reads: the input of every data loading backend.

The backends map a shard to record numbers (shard_sizes() in dali_graph.py; image_record_iter.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Mapping

from mxresnet.config import Config
from mxresnet.data.dataset import DataSet
from mxresnet.errors import UserError
from mxresnet.parallel.world import World


@dataclass(frozen=True)
class RecordShard:
    """One rank's shard of the training or the validation records.

    Attributes:
        training: True for the training records, False for the validation records.
        records_path: path of the .rec file to open.
        index_path: path of the .idx file to open.
        name: name of the .rec file in error messages; records_path may be a temporary link.
        rank: index of the shard; 0 <= rank < num_ranks.
        num_ranks: number of shards.
        batch_size: images in each batch that the backend returns.
        num_classes: number of classes; a label is from 0 to num_classes - 1.
        seed: seed of the shuffle order and of the random augmentation.
    """

    training: bool
    records_path: str
    index_path: str
    name: str
    rank: int
    num_ranks: int
    batch_size: int
    num_classes: int
    seed: int

    @property
    def split(self) -> str:
        """Name of the split in messages."""
        return "training" if self.training else "validation"

    def too_few_images(self, num_images: int) -> UserError:
        """Return the error for a number of images of which a rank would get none."""
        alternative = "" if self.training else ", or set --separ-val"
        return UserError(
            f"{num_images} {self.split} images in {self.name} are too few for {self.num_ranks} "
            f"ranks: start fewer ranks{alternative}"
        )

    def read_error(self, reason: str) -> UserError:
        """Return the error for records that cannot be read or decoded."""
        return UserError(
            f"rank {self.rank}, {self.split} data {self.name} cannot be read: {reason} (python -m "
            "prepare.verify finds damaged records; python -m prepare.imagenet --check=decode "
            "finds files that are not images)"
        )


def train_shard(
    config: Config, dataset: DataSet, opened_paths: Mapping[str, str], world: World, seed: int
) -> RecordShard:
    """Return this rank's shard of the training records: part `world.rank` of `world.size`.

    Args:
        config: the settings.
        dataset: the data set, for its number of classes.
        opened_paths: path to open, by name of the setting; it may be a temporary link.
        world: the ranks.
        seed: seed of this rank's shuffle order and augmentation.
    """
    return RecordShard(
        training=True,
        records_path=opened_paths["data_train"],
        index_path=opened_paths["data_train_idx"],
        name=config.path("data_train"),
        rank=world.rank,
        num_ranks=world.size,
        batch_size=config.batch_size * config.input_batch_multiplier,
        num_classes=dataset.classes,
        seed=seed,
    )


def val_shard(
    config: Config, dataset: DataSet, opened_paths: Mapping[str, str], world: World, seed: int
) -> RecordShard:
    """Return this rank's shard of the validation records; with --separ-val, all of them.

    The arguments are those of train_shard().
    """
    return RecordShard(
        training=False,
        records_path=opened_paths["data_val"],
        index_path=opened_paths["data_val_idx"],
        name=config.path("data_val"),
        rank=0 if config.separ_val else world.rank,
        num_ranks=1 if config.separ_val else world.size,
        batch_size=config.batch_size,
        num_classes=dataset.classes,
        seed=seed,
    )
