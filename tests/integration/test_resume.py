# SPDX-License-Identifier: Apache-2.0
"""A run that is killed and started again ends with the same bytes as one that was not."""

import pytest
from support.resumable_run import Run, assert_same_result


@pytest.fixture(scope="module")
def whole(few, tmp_path_factory):
    """Return a function that makes an uninterrupted run of some flags and ranks, once each."""
    runs = {}

    def make(*flags, ranks=1):
        if (flags, ranks) not in runs:
            run = Run(tmp_path_factory.mktemp("whole"), few, "--seed", "3", *flags, ranks=ranks)
            run.finish()
            runs[flags, ranks] = run
        return runs[flags, ranks]

    return make


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_once(few, tmp_path, whole, ranks):
    run = Run(tmp_path, few, "--seed", "3", ranks=ranks)
    run.killed(kill_step=9)
    run.finish()
    assert len(run.resumed()) == 1
    assert_same_result(run, whole(ranks=ranks))
