# SPDX-License-Identifier: Apache-2.0
"""Logs of any size and state: damaged, cut, joined by several ranks, in other encodings."""

import json
import resource
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.commands import ROOT
from support.report_logs import DEMO_LOGS, PREFIX, demo_events

from mxresnet.results import log_scan
from mxresnet.results.log_reader import parse_log
from mxresnet.results.log_scan import event_lines, scan_log

EVERYTHING = type("Everything", (), {"__contains__": lambda self, key: True})()
START = '{"key":"run_start","time_ms":1,"value":null,"metadata":{}}'
STOP = '{"key":"run_stop","time_ms":2,"value":null,"metadata":{"status":"success"}}'


def scan(tmp_path, content, wanted=EVERYTHING):
    path = tmp_path / "log"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return scan_log(str(path), wanted)


def test_a_published_log_is_read_as_the_whole_reader_reads_it():
    for path in DEMO_LOGS:
        found = scan_log(str(path), EVERYTHING)
        assert found.events == parse_log(path.read_bytes()).events
        assert found.lines == len(path.read_text().splitlines())
        assert found.size_bytes == path.stat().st_size
        assert (found.damaged, found.joined_lines, found.prefixed_lines, found.cut) == (0, 0, 0, 0)


def test_events_that_are_not_wanted_are_counted():
    found = scan_log(str(DEMO_LOGS[0]), {"run_stop"})
    assert [event.key for event in found.events] == ["run_stop"]
    assert found.counts["weights_initialization"] == 161
    assert sum(found.counts.values()) == len(demo_events())


@pytest.mark.parametrize(
    "text, keys, damaged, joined, prefixed",
    [
        (f"[1,0]<stdout>:{PREFIX}{START}", ["run_start"], 0, 0, 1),
        (f"{PREFIX}{START}{PREFIX}{STOP}", ["run_start", "run_stop"], 0, 1, 0),
        (f"{PREFIX}{START}Epoch 1", ["run_start"], 0, 1, 0),
        (f"{PREFIX}{START[:20]}{PREFIX}{STOP}{START[20:]}", ["run_stop"], 1, 1, 0),
        (f"{PREFIX}{START}\r\n{PREFIX}{STOP}\r\n", ["run_start", "run_stop"], 0, 0, 0),
        (f"{PREFIX}{START[:-5]}\n{PREFIX}{STOP}", ["run_stop"], 1, 0, 0),
        ("no event\n", [], 0, 0, 0),
        ("", [], 0, 0, 0),
    ],
)
def test_lines_of_several_processes(tmp_path, text, keys, damaged, joined, prefixed):
    found = scan(tmp_path, text)
    assert [event.key for event in found.events] == keys
    assert (found.damaged, found.joined_lines, found.prefixed_lines) == (damaged, joined, prefixed)


def test_damage_is_reported_with_its_line(tmp_path):
    found = scan(tmp_path, f"a\nb\n{PREFIX}{START}\nc\n{PREFIX}{{broken\n{PREFIX}{STOP}\n")
    assert [sample.number for sample in found.damaged_samples] == [5]
    assert found.lines == 6 and not found.cut


def test_a_log_that_is_cut_off(tmp_path):
    found = scan(tmp_path, f"{PREFIX}{START}\n{PREFIX}{STOP[:-9]}")
    assert found.cut and found.damaged == 1
    assert [event.key for event in found.events] == ["run_start"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig", "latin-1"])
def test_encodings(tmp_path, encoding):
    text = f'{PREFIX}{{"key":"submission_org","value":"Müller"}}\n{PREFIX}{STOP}\n'
    content = text.encode(encoding)
    if encoding == "utf-16-be":
        content = b"\xfe\xff" + content
    found = scan(tmp_path, content)
    assert [event.key for event in found.events] == ["submission_org", "run_stop"]
    assert found.events[0].value == "Müller"
    assert (found.encoding is not None) == encoding.startswith("utf-16")


def test_repeated_events_are_counted_beyond_a_number(tmp_path, monkeypatch):
    monkeypatch.setattr(log_scan, "MAX_EVENTS_PER_KEY", 3)
    found = scan(tmp_path, f"{PREFIX}{START}\n" * 10 + f"{PREFIX}{STOP}\n")
    assert [event.key for event in found.events] == ["run_start"] * 3 + ["run_stop"]
    assert found.dropped_events == 7 and found.counts["run_start"] == 10


def test_a_line_without_end_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(log_scan, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(log_scan, "_BLOCK_BYTES", 64)
    found = scan(tmp_path, f"{PREFIX}{START}\n{'x' * 5000}\n{PREFIX}{STOP}\n")
    assert [event.key for event in found.events] == ["run_start", "run_stop"]
    assert found.long_lines == 1 and found.lines == 3


@settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.lists(
        st.sampled_from(
            [f"{PREFIX}{START}", f"{PREFIX}{STOP}", "Epoch", PREFIX, "\n", "\r\n", "{", "é", "\0"]
        ),
        max_size=30,
    ),
    st.integers(1, 200),
)
def test_block_sizes_do_not_matter(tmp_path, monkeypatch, parts, block_bytes):
    monkeypatch.setattr(log_scan, "_BLOCK_BYTES", block_bytes)
    content = "".join(parts).encode()
    found, whole = scan(tmp_path, content), parse_log(content)
    assert found.events == whole.events
    assert found.damaged == len(whole.damaged_lines)
    assert found.damaged_samples == whole.damaged_lines[:5]
    lines = [line for line in content.split(b"\n") if PREFIX.encode() in line]
    assert list(event_lines(str(tmp_path / "log"))) == lines


@pytest.mark.slow
@pytest.mark.parametrize("key", ["epoch_start", "tracked_stats", None])
def test_a_log_of_a_gigabyte(tmp_path, key):
    """It is read in less than 60 s and 300 MB, whatever it is full of, and reported on."""
    events = [json.dumps(event) for event in demo_events()]
    filling = (
        "Epoch 1: 27000 images/s and more text of a progress line\n"
        if key is None
        else next(f"{PREFIX}{event}\n" for event in events if f'"{key}"' in event)
    )
    path = tmp_path / "result_0.txt"
    with open(path, "w") as file:
        file.write("".join(f"{PREFIX}{event}\n" for event in events[:-1]))
        block = filling * (8_000_000 // len(filling))
        for _ in range(1 + 1_000_000_000 // len(block)):
            file.write(block)
        file.write(f"{PREFIX}{events[-1]}\n")
    start = time.monotonic()
    script = (
        "import re, sys; from mxresnet.results.report import main; "
        "status = main(sys.argv[1:]); "
        # Not ru_maxrss, which includes the peak of the process that started this one.
        "peak = re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read()).group(1); "
        "print(status, peak)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path), "--no-page"],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    seconds = time.monotonic() - start
    status, kibibytes = done.stdout.splitlines()[-1].split()
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"{key}: {seconds:.1f} s, {kibibytes} KiB, official tools {children} KiB")
    assert "28.41" in done.stdout and status in ("0", "4")
    assert int(kibibytes) < 300_000
    path.unlink()  # pytest keeps the folders of the last runs
