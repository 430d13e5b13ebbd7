# SPDX-License-Identifier: Apache-2.0
"""Counts of correct predictions and their sum over ranks; the mean loss."""

import math

import mxnet as mx
import numpy as np
import pytest

from mxresnet.errors import UserError
from mxresnet.metrics import AccuracyCounter, LossMeter, Score, score_of_all_ranks
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


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("classes", [1, 2, 10])
def test_the_mean_loss_equals_numpy(smoothing, classes):
    """The loss whose gradient is softmax - target, from the logits in float64."""
    random, meter, losses = np.random.RandomState(classes), LossMeter(smoothing), []
    for images in (4, 3):
        logits = random.randn(images, classes) * 5
        labels = random.randint(0, classes, images)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        target = np.full(logits.shape, smoothing / max(1, classes - 1))
        target[np.arange(images), labels] = 1 - smoothing if classes > 1 else 1
        losses += list(-(target * log_p).sum(1))
        output = mx.nd.SoftmaxOutput(mx.nd.array(logits), mx.nd.array(labels))
        meter.add(output, mx.nd.array(labels))
    assert meter.take_mean() == pytest.approx(np.mean(losses), rel=1e-5, abs=1e-6)
    assert math.isnan(meter.take_mean())


def test_the_loss_of_a_probability_of_0_is_large_and_finite():
    for smoothing in (0.0, 0.1):
        meter = LossMeter(smoothing)
        meter.add(mx.nd.array([[0.0, 1.0]]), mx.nd.array([0]))
        assert 76 < meter.take_mean() < 86
