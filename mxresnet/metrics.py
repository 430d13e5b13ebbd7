# SPDX-License-Identifier: Apache-2.0
"""Accuracy as integer counts that are summed exactly over ranks, and the mean training loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, List, Optional, Protocol, Sequence, Tuple

from mxresnet.errors import UserError

# Smaller probabilities count as this one in the loss, whose terms are thus at most 85.2. It is a
# normal float32 number.
MIN_PROBABILITY = 1e-37


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


class LossMeter:
    """Mean loss of one rank's images: cross-entropy with label smoothing (model/loss.py).

    The arrays are MXNet NDArrays. add() only queues work for the device; take_mean() waits for it.
    """

    def __init__(self, label_smoothing: float):
        self._label_smoothing = label_smoothing
        self._sum: Optional[Any] = None  # float64 (1,)
        self._images = 0

    def add(self, probabilities: Any, labels: Any) -> None:
        """Add a batch without padding.

        Args:
            probabilities: network output, float32 (images, classes).
            labels: class numbers, float32 (images,), on the same device.
        """
        images, classes = probabilities.shape
        # t_k of model/loss.py for the classes that are not the label.
        other = self._label_smoothing / (classes - 1) if classes > 1 else 0.0
        if other:
            log_p = probabilities.clip(MIN_PROBABILITY, 1).log()
            weight = 1 - self._label_smoothing - other
            loss = log_p.pick(labels).sum() * -weight - log_p.sum() * other
        else:
            loss = -probabilities.pick(labels).clip(MIN_PROBABILITY, 1).log().sum()
        loss = loss.astype("float64")
        self._sum = loss if self._sum is None else self._sum + loss
        self._images += images

    def state(self) -> Tuple[float, int]:
        """Return the sum of the losses and the number of images since the last take_mean()."""
        return (0.0 if self._sum is None else float(self._sum.asscalar())), self._images

    def set_state(self, state: Tuple[float, int], like: Any) -> None:
        """Restore what state() returned.

        Args:
            state: the sum and the number of images.
            like: an NDArray on the device of the network.
        """
        total, self._images = state
        zero = like.reshape((-1,))[:1].astype("float64") * 0
        self._sum = zero + total if self._images else None

    def take_mean(self) -> float:
        """Return the mean loss since the previous call; NaN when there was no batch."""
        mean = float("nan") if self._sum is None else float(self._sum.asscalar()) / self._images
        self._sum, self._images = None, 0
        return mean


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
