# SPDX-License-Identifier: Apache-2.0
"""Accuracy as integer counts that are summed exactly over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, List, Protocol, Sequence

from mxresnet.errors import UserError


@dataclass(frozen=True)
class Score:
    """Numbers of correctly classified and of all images of an evaluation, without padding."""

    correct: int
    total: int
    correct_in_top_k: int = 0

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def top_k_accuracy(self) -> float:
        return self.correct_in_top_k / self.total


class AccuracyCounter:
    """Counts the correct predictions of one rank.

    The arrays are MXNet NDArrays. add() only queues work for the device; counts() waits for it.
    """

    def __init__(self, top_k: int = 0):
        self._top_k = top_k
        self._correct: List[Any] = []
        self._correct_in_top_k: List[Any] = []
        self._finite: List[Any] = []
        self._total = 0

    def add(self, probabilities: Any, labels: Any) -> None:
        """Count a batch without padding.

        Args:
            probabilities: network output, float32 (images, classes).
            labels: class numbers, float32 (images,), on the same device.
        """
        self._correct.append((probabilities.argmax(axis=1) == labels).sum())
        if self._top_k:
            top_classes = probabilities.topk(axis=1, k=self._top_k)
            self._correct_in_top_k.append((top_classes == labels.reshape((-1, 1))).sum())
        # x - x is NaN where x is NaN or infinite. A comparison with inf, as in nd.contrib.isfinite,
        # raises an error when this thread's errno is ERANGE from an earlier call: MXNet converts
        # the scalar to text and parses it, and does not reset errno before that.
        self._finite.append(((probabilities - probabilities) == 0).min())
        self._total += len(labels)

    def counts(self) -> List[int]:
        """Return correct, total and correct in top k.

        Raises:
            UserError: an output of the network was not finite.
        """
        if not all(flag.asscalar() for flag in self._finite):
            raise UserError(
                "the network's output is not finite: training diverged; lower --lr or use more "
                "--warmup-epochs"
            )
        correct = sum(int(count.asscalar()) for count in self._correct)
        correct_in_top_k = sum(int(count.asscalar()) for count in self._correct_in_top_k)
        return [correct, self._total, correct_in_top_k]


class Ranks(Protocol):
    """The part of World that score_of_all_ranks uses."""

    def sum(self, counts: Sequence[int]) -> List[int]: ...

    def broadcast(self, value: Any) -> Any: ...


def score_of_all_ranks(counts: List[int], ranks: Ranks, same_images: bool) -> Score:
    """Return the accuracy over all ranks: the sum of their counts, or rank 0's for the same images.

    It is the same on every rank.

    Args:
        counts: correct, total and correct in top k of this rank.
        ranks: collective operations.
        same_images: whether every rank evaluated the whole validation set (--separ-val). If so,
            nothing is summed: rank 0's counts are the result, so that all ranks stop together.
    """
    return Score(*(ranks.broadcast(counts) if same_images else ranks.sum(counts)))
