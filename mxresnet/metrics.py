# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found, as integers that add up exactly over ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """Correctly classified images and all images seen; padding counts in neither."""

    correct: int
    total: int
    correct_in_top_k: int = 0

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def top_k_accuracy(self) -> float:
        return self.correct_in_top_k / self.total
