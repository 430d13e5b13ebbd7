# SPDX-License-Identifier: Apache-2.0
"""Summary of the times of an epoch's steps, compared with numpy's percentiles."""

import numpy as np
import pytest

from mxresnet.step_times import StepClock, StepTimes, percentile


@pytest.mark.parametrize("count", [1, 2, 3, 99, 100, 101, 1000])
@pytest.mark.parametrize("percent", [50, 99, 100])
def test_percentiles_equal_numpy(count, percent):
    values = np.sort(np.random.RandomState(count).rand(count))
    assert percentile(values, percent) == np.percentile(values, percent, method="inverted_cdf")


def test_each_step_lasts_from_the_end_of_the_one_before():
    ticks = iter([10.0, 10.5, 10.75, 12.75])
    clock = StepClock(lambda: next(ticks))
    for _ in range(3):
        clock.step_done()
    assert clock.summary(0.12345678) == StepTimes(500.0, 2000.0, 2000.0, 0.123457)


def test_a_resumed_epoch_may_have_no_step_left():
    assert StepClock().summary(0.0) == StepTimes(0.0, 0.0, 0.0, 0.0)
