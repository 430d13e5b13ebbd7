# SPDX-License-Identifier: Apache-2.0
"""Counts of correct predictions and their sum over ranks."""

import mxnet as mx
import pytest

from mxresnet.errors import UserError
from mxresnet.metrics import AccuracyCounter, Score, score_of_all_ranks
from mxresnet.progress import images_per_second

PROBABILITIES = [[0.1, 0.7, 0.2], [0.5, 0.2, 0.3], [0.25, 0.35, 0.4]]


class FakeWorld:
    """Two ranks with the same counts, of which this is rank 1."""

    def sum(self, counts):
        return [2 * count for count in counts]

    def broadcast(self, value):
        return [7, 9, 8]


def count(probabilities, labels, top_k=0):
    counter = AccuracyCounter(top_k)
    counter.add(mx.nd.array(probabilities), mx.nd.array(labels))
    return counter


def test_counts_correct_predictions_over_batches():
    counter = count(PROBABILITIES, [1, 0, 0], top_k=2)
    counter.add(mx.nd.array(PROBABILITIES[:1]), mx.nd.array([2]))
    assert counter.counts() == [2, 4, 3]


def test_a_rank_without_images_counts_nothing():
    assert AccuracyCounter().counts() == [0, 0, 0]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_an_output_that_is_not_finite_is_refused(value):
    with pytest.raises(UserError, match="not finite: training diverged"):
        count([[0.5, value, 0.5]], [0]).counts()


def test_counts_are_summed_unless_every_rank_saw_all_images():
    assert score_of_all_ranks([1, 4, 2], FakeWorld(), same_images=False) == Score(2, 8, 4)
    assert score_of_all_ranks([1, 4, 2], FakeWorld(), same_images=True) == Score(7, 9, 8)


def test_accuracies_are_fractions():
    score = Score(correct=3, total=4, correct_in_top_k=4)
    assert (score.accuracy, score.top_k_accuracy) == (0.75, 1.0)
    assert images_per_second(300, 1.5) == 200
