# SPDX-License-Identifier: Apache-2.0
"""The part of a record file that one rank reads: the input of every data loading backend."""

from __future__ import annotations

from dataclasses import dataclass

from mxresnet.errors import UserError


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
        seed: seed of the shuffle order and of the random augmentation.
    """

    training: bool
    records_path: str
    index_path: str
    name: str
    rank: int
    num_ranks: int
    batch_size: int
    seed: int

    def read_error(self, reason: str) -> UserError:
        """Return the error for records that cannot be read or decoded."""
        split = "training" if self.training else "validation"
        return UserError(
            f"rank {self.rank}, {split} data {self.name} cannot be read: {reason} (python -m "
            "prepare.verify finds damaged records; python -m prepare.imagenet --check=decode "
            "finds files that are not images)"
        )
