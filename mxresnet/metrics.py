# SPDX-License-Identifier: Apache-2.0
"""What an evaluation found, as integers that add up exactly over ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """Correctly classified images and all images seen; padding counts in neither."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total
