# SPDX-License-Identifier: Apache-2.0
"""The published round, the place of a result in it, and the test between two series."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mxresnet.results.compare import SIGNIFICANCE, Spread, difference, permutation_p, smallest_p
from mxresnet.results.published_round import (
    accuracy_band,
    parse_kind,
    place,
    published_systems,
    same_batch,
    systems_of_kind,
)

SETTINGS = {"global_batch_size": 1024, "s_network": "resnet-v1b-stats-fl"}


def test_the_published_scores():
    """Scores that MLCommons published, of the smallest and the largest systems."""
    scores = {system.label: system.score_minutes for system in published_systems()}
    assert len(scores) == 41
    assert scores["NVIDIA dgxa100_ngc22.04_mxnet"] == pytest.approx(28.811, abs=1e-3)
    assert scores["NVIDIA dgxa100_n527_ngc22.04_mxnet"] == pytest.approx(0.319, abs=1e-3)
    assert scores["Lenovo SR670v2-4xA100_SXM4_40GB_400W"] == pytest.approx(61.999, abs=1e-3)
    assert scores["Fujitsu rx_A30x2_mxnet_NGC_22.04"] == pytest.approx(239.359, abs=1e-3)


def test_the_band_of_accuracies():
    band = {point.epoch: point for point in accuracy_band(3264)}
    assert band[35].runs >= 80 and band[35].mean == pytest.approx(0.7605, abs=2e-4)
    assert band[3].low < band[3].mean < band[3].high
    assert accuracy_band(7) == [] and accuracy_band(None) == []
    assert len(same_batch(3264)) > 15


@pytest.mark.parametrize(
    "name, kind",
    [
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40 GB"),
        ("NVIDIA A100-PCIe-80GB", "A100 PCIe 80 GB"),
        ("NVIDIA A100-SXM-80GB CTS", "A100 SXM 80 GB"),
        ("A100-SXM-40GB", "A100 SXM 40 GB"),
        ("NVIDIA H100-SXM5-80GB", "H100 SXM 80 GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80 GB"),
        ("Tesla V100-SXM2-16GB", "V100 SXM 16 GB"),
        ("NVIDIA RTX A5000", "A5000"),
        ("NVIDIA A30", "A30"),
        ("Habana Gaudi2", "Gaudi 2"),
        ("Tesla T4 16 GB", "T4 16 GB"),
        ("", "None"),
        ("<b>A1000</b>", "None"),
    ],
)
def test_kinds_of_accelerators(name, kind):
    assert str(parse_kind(name)) == kind


def test_a_part_of_a_name_that_is_missing_matches_any():
    assert parse_kind("H100 80GB").matches(parse_kind("H100-SXM5-80GB"))
    assert not parse_kind("A100-SXM-40GB").matches(parse_kind("A100-SXM-80GB"))
    assert not parse_kind("A100-SXM-80GB").matches(parse_kind("A100-PCIe-80GB"))


def test_the_place_of_a_result():
    kind = parse_kind("A100-SXM-40GB")
    found = place(62.1, 4, kind, "Us here", SETTINGS)
    assert (found.label, found.rank, len(found.peers)) == ("4 x A100 SXM 40 GB", 2, 2)
    assert found.ratio == pytest.approx(62.1 / 61.9987, rel=1e-5)
    assert found.differences == [] and not found.is_published
    assert place(10.0, 4, kind, "Us here", SETTINGS).rank == 1
    unequal = place(62.1, 4, kind, "Us here", {"global_batch_size": 64, "s_network": "other"})
    assert [text.split()[0] for text in unequal.differences] == ["global", "network"]


def test_a_published_result_is_not_its_own_rival():
    kind = parse_kind("A100-SXM-40GB")
    own = place(62.0, 4, kind, "Lenovo SR670v2-4xA100_SXM4_40GB_400W", SETTINGS)
    assert own.is_published and own.rank == 1 and len(own.peers) == 1
    assert systems_of_kind(None, 4) == []


VALUES = st.lists(st.integers(0, 20).map(float), min_size=2, max_size=5)


@settings(deadline=None, max_examples=40)
@given(VALUES, VALUES)
def test_p_is_that_of_scipy(base, change):
    def statistic(x, y, axis=-1):
        return np.abs(np.mean(x, axis=axis) - np.mean(y, axis=axis))

    expected = stats.permutation_test(
        (base, change), statistic, vectorized=True, n_resamples=np.inf, alternative="greater"
    )
    assert permutation_p(base, change) == pytest.approx(expected.pvalue, abs=1e-12)


def test_what_few_trials_can_tell():
    near, far = Spread([28.0, 28.1, 28.2, 28.3, 28.4]), Spread([29.0, 29.1, 29.2, 29.3, 29.4])
    worse = difference(near, far, less_is_better=True)
    assert worse.p_value == pytest.approx(2 / 252) == smallest_p(5, 5)
    assert worse.verdict.startswith("worse, beyond the spread")
    assert difference(far, near, True).verdict.startswith("better")
    assert difference(far, near, False).verdict.startswith("worse")
    assert difference(near, near, True).verdict.startswith("within the spread")
    few = difference(Spread([1.0, 1.1, 1.2]), Spread([9.0, 9.1, 9.2]), True)
    assert few.p_value == pytest.approx(0.1) and few.p_value > SIGNIFICANCE
    assert few.verdict.startswith("too few trials")
    assert difference(Spread([1.0]), near, True).p_value is None


def test_many_trials_are_sampled():
    drawing = np.random.default_rng(0)
    base, change = drawing.normal(10, 1, 30), drawing.normal(10, 1, 30)
    ours = permutation_p(list(base), list(change))
    assert ours == pytest.approx(stats.ttest_ind(base, change).pvalue, abs=0.03)
