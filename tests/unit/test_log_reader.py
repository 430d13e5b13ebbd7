# SPDX-License-Identifier: Apache-2.0
"""The reader of MLPerf logs: figures of a run, logs with missing parts, and damaged lines."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mxresnet.results.log_reader import (
    DamagedLine,
    Evaluation,
    has_evaluation,
    parse_log,
    read_log,
)


def line(key, value=None, time_ms=0, **metadata):
    event = {"namespace": "", "time_ms": time_ms, "event_type": "POINT_IN_TIME"}
    return ":::MLLOG " + json.dumps({**event, "key": key, "value": value, "metadata": metadata})


# Time limits of Hypothesis fail on a busy machine.
without_time_limits = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
WHOLE_RUN = [
    line("submission_org", "Us"),
    line("submission_platform", "four-gpus"),
    line("run_start", time_ms=1_600_000_000_000),
    "Epoch 1: 1234 images/s",
    line("eval_accuracy", 0.5, epoch_num=31),
    line("eval_accuracy", 0.7612, epoch_num=35),
    line("run_stop", time_ms=1_600_000_090_000, status="success"),
]


def parse(lines):
    return parse_log("\n".join(lines).encode())


def without(key):
    return [text for text in WHOLE_RUN if f'"key": "{key}"' not in text]


def check_every_figure(log):
    """Compute every figure of a log."""
    assert log.minutes is None or isinstance(log.minutes, float)
    assert log.last_evaluation is None or isinstance(log.last_evaluation, Evaluation)
    assert all(isinstance(key, str) for key in [*log.submission, *log.missing_keys])


def test_the_figures_of_a_whole_run():
    log = parse(WHOLE_RUN)
    assert log.minutes == 1.5
    assert log.last_evaluation == Evaluation(0.7612, 35)
    assert log.submission == {"submission_org": "Us", "submission_platform": "four-gpus"}
    assert log.missing_keys == [] and log.damaged_lines == []
    assert log.last_event("run_stop").metadata == {"status": "success"}


@pytest.mark.parametrize("key", ["submission_org", "run_start", "eval_accuracy", "run_stop"])
def test_a_log_names_what_is_missing(key):
    log = parse(without(key))
    assert log.missing_keys == [key]
    assert (log.minutes is None) == key.startswith("run_")
    assert (log.last_evaluation is None) == (key == "eval_accuracy")


def test_a_log_that_was_cut_keeps_what_is_whole():
    text = "\n".join(WHOLE_RUN)[:-30]
    log = parse_log(text.encode())
    assert log.missing_keys == ["run_stop"] and log.last_evaluation.epoch == 35
    assert log.damaged_lines == [DamagedLine(len(WHOLE_RUN), WHOLE_RUN[-1][9:-30])]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "7",
        "[]",
        "{}",
        '{"key": 7}',
        '{"key": ',
        "[" * 100_000,
        '{"key": "run_start", "time_ms": ' + "9" * 5000 + "}",
    ],
)
def test_a_line_that_is_not_an_event_is_reported_as_damaged(content):
    log = parse([*WHOLE_RUN, f":::MLLOG {content}"])
    if log.damaged_lines:  # Python before 3.11 parses an integer of any length
        assert [damaged.number for damaged in log.damaged_lines] == [len(WHOLE_RUN) + 1]
        assert log.events == parse(WHOLE_RUN).events
    else:
        assert log.minutes is None


@pytest.mark.parametrize("value", [True, "0.76", None, float("nan"), float("inf"), [0.76]])
def test_an_accuracy_that_is_not_a_number_is_no_evaluation(value):
    log = parse([line("eval_accuracy", value, epoch_num=1)])
    assert log.last_evaluation is None


def test_files_are_read_and_a_missing_file_has_no_evaluation(tmp_path):
    path = tmp_path / "log"
    with pytest.raises(OSError):
        read_log(str(path))
    assert not has_evaluation(str(path))
    path.write_text("\n".join(without("eval_accuracy")))
    assert not has_evaluation(str(path))
    path.write_text("\n".join(WHOLE_RUN))
    assert has_evaluation(str(path)) and read_log(str(path)) == parse(WHOLE_RUN)


@without_time_limits
@given(st.binary())
def test_any_bytes_can_be_read(content):
    check_every_figure(parse_log(content))
    check_every_figure(parse_log(b":::MLLOG " + content))


@without_time_limits
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(WHOLE_RUN) - 1), st.integers(0, 200), st.integers(0, 9), st.binary()
        )
    )
)
def test_mutated_lines_can_be_read_and_whole_ones_are_kept(mutations):
    lines = [text.encode() for text in WHOLE_RUN]
    for index, start, length, replacement in mutations:
        lines[index] = lines[index][:start] + replacement + lines[index][start + length :]
    check_every_figure(parse_log(b"\n".join(lines)))
    changed = {index for index, *_ in mutations}
    log = parse_log(b"\n".join(lines))
    kept = [text for index, text in enumerate(WHOLE_RUN) if index not in changed]
    assert all(event in log.events for event in parse(kept).events)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda children: st.lists(children, max_size=2),
    max_leaves=3,
)


@without_time_limits
@given(
    st.sampled_from(["run_start", "run_stop", "eval_accuracy", "submission_org"]),
    st.dictionaries(st.sampled_from(["value", "time_ms", "metadata", "epoch_num"]), JSON_VALUES),
    st.dictionaries(st.just("epoch_num"), JSON_VALUES),
)
def test_events_with_any_values_can_be_read(key, values, metadata):
    for content in (values, {**values, "metadata": metadata}):
        text = json.dumps({"key": key, **content})
        log = parse([*WHOLE_RUN, f":::MLLOG {text}"])
        check_every_figure(log)
        assert log.damaged_lines == [] and len(log.events) == len(WHOLE_RUN)
