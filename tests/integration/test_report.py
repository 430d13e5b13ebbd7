# SPDX-License-Identifier: Apache-2.0
"""The report command: its outputs, its exit statuses, and verdicts equal to MLPerf's tools."""

import csv
import io
import json
import os
import shutil

import jsonschema
import pytest
from support.commands import ROOT, python
from support.mlperf_log import check_compliance
from support.report_logs import DEMO, DEMO_LOGS, changed, demo_events, without, write_events

from mxresnet.results.report import main

SCHEMA = json.loads((ROOT / "mxresnet/results/report.schema.json").read_text())
PUBLISHED_SCORE = 28.811467350427350  # in the results table of MLPerf Training v2.1
HOSTILE = "</script><script>alert(1)</script><b>&\x1b[31m\u202e{{7*7}}%{x}=1+1"


def report(tmp_path, *arguments):
    """Run the command in this process without a page; return its status and JSON."""
    path = tmp_path / "report.json"
    status = main([*map(str, arguments), "--no-page", "--json", str(path)])
    return status, json.loads(path.read_text()) if path.exists() else None


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The JSON, CSV and page of the demo."""
    folder = tmp_path_factory.mktemp("demo")
    outputs = [folder / name for name in ("report.json", "report.csv", "report.html")]
    options = ["--json", outputs[0], "--csv", outputs[1], "-o", outputs[2]]
    assert main(["--demo", *map(str, options)]) == 0
    return json.loads(outputs[0].read_text()), *(path.read_text() for path in outputs[1:])


def documented(value, schema, where=""):
    """Yield the fields of JSON content that a schema does not name."""
    for option in schema.get("oneOf", []):
        if isinstance(value, dict) == (option.get("type") == "object"):
            schema = option
    if isinstance(value, dict) and "properties" in schema:
        for key, one in value.items():
            if key not in schema["properties"]:
                yield f"{where}/{key}"
            else:
                yield from documented(one, schema["properties"][key], f"{where}/{key}")
    elif isinstance(value, list):
        for one in value:
            yield from documented(one, schema.get("items", {}), where)


def test_the_json_is_as_documented(demo):
    jsonschema.Draft202012Validator(SCHEMA).validate(demo[0])
    assert list(documented(demo[0], SCHEMA)) == []


def test_the_score_is_the_published_one(demo):
    (series,) = demo[0]["series"]
    assert series["official"]["score_minutes"] == pytest.approx(PUBLISHED_SCORE, abs=1e-9)
    assert series["official"]["scaling"] == pytest.approx(1.0043956043956044, abs=1e-12)
    assert series["official"]["rcp_passed"] is True and series["is_published"]
    assert [run["dropped"] for run in series["runs"]] == [
        *("fastest", None, "as the slowest", None, None),
    ]
    placement = series["placement"]
    assert (placement["kind"], placement["rank"], placement["of"]) == ("8 x A100 SXM 80 GB", 5, 6)
    assert placement["ratio_to_fastest"] == pytest.approx(28.8115 / 27.6883, abs=1e-4)


@pytest.mark.parametrize("number", [0, 2])
def test_the_verdict_on_a_log_is_the_compliance_checkers(demo, number):
    done = check_compliance(DEMO_LOGS[number])
    checker = demo[0]["series"][0]["runs"][number]["checker"]
    assert checker["accepted"] == (done.returncode == 0)
    assert all(message in done.stdout + done.stderr for message in checker["messages"])


@pytest.mark.slow
def test_the_score_is_the_result_summarizers(demo, tmp_path):
    """Its first run writes the scaling factor, its second one applies it."""
    shutil.copytree(DEMO, tmp_path / "demo")
    for _ in range(2):
        done = python(
            *("-m", "mlperf_logging.result_summarizer", tmp_path / "demo", "training", "2.1.0"),
            *("--csv", tmp_path / "summary.csv"),
        )
        assert done.returncode == 0, done.stderr
    (row,) = csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text()))
    assert float(row["resnet"]) == demo[0]["series"][0]["official"]["score_minutes"]


def test_the_csv_has_the_same_numbers(demo):
    rows = list(csv.DictReader(io.StringIO(demo[1])))
    for row, run in zip(rows, demo[0]["series"][0]["runs"]):
        assert row["outcome"] == run["outcome"]
        assert float(row["minutes"]) == run["minutes"]
        assert float(row["accuracy"]) == run["accuracy"]
    assert len(rows) == 5


def test_exit_statuses_and_outcomes(tmp_path, capsys):
    whole = demo_events()
    logs = {
        "missed": (DEMO_LOGS[2], 3),
        "incomplete": (write_events(tmp_path / "cut.log", without(whole, "run_stop")), 4),
        "rejected": (
            write_events(tmp_path / "bad.log", changed(whole, "lars_epsilon", value=0.1)),
            4,
        ),
        "reached": (DEMO_LOGS[0], 0),
    }
    for outcome, (path, expected) in logs.items():
        status, data = report(tmp_path, path)
        (run,) = data["series"][0]["runs"]
        assert (status, run["outcome"]) == (expected, outcome)
        assert data["exit_status"] == expected
        jsonschema.Draft202012Validator(SCHEMA).validate(data)
    assert "NOT VALID" in capsys.readouterr().out


def test_a_resumed_run_is_never_scored(tmp_path):
    folder = tmp_path / "trials"
    folder.mkdir()
    for number in range(5):
        events = demo_events(number)
        if number == 3:
            metadata = {"checkpoint": "c", "epoch_num": 12, "step": 3}
            events.insert(-9, {"time_ms": 1, "key": "resumed", "value": 9.5, "metadata": metadata})
        write_events(folder / f"result_{number}.txt", events)
    status, data = report(tmp_path, folder)
    (series,) = data["series"]
    assert status == 4 and series["official"]["score_minutes"] is None
    assert series["placement"] is None and series["runs"][3]["outcome"] == "resumed"
    assert "resumed" in series["official"]["note"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "is not a log or a folder"),
        (b"", "has no event"),
        (b"\x00\xff" * 999, "has no event"),
        (b':::MLLOG {"key": "submission_benchmark", "value": "bert"}', "of the benchmark bert"),
    ],
)
def test_what_cannot_be_read_is_reported_in_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "log"
    if content is not None:
        path.write_bytes(content)
    assert main([str(path), "--no-page"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and str(path) in error


def test_mistakes_in_the_arguments(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for arguments in (
        [],
        ["--base", str(DEMO)],
        [str(tmp_path / "empty")],
        ["--demo", "--json", "-", "--csv", "-"],
        ["--demo", "-o", str(tmp_path / "none" / "page.html")],
    ):
        assert main([*arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_log_is_never_replaced_and_a_pipe_is_not_read(tmp_path, capsys):
    log = write_events(tmp_path / "result_0.txt", demo_events())
    os.mkfifo(tmp_path / "result_1.txt")
    assert main([str(tmp_path), "--json", str(log)]) == 2
    assert "is one of the logs" in capsys.readouterr().err
    status, data = report(tmp_path, tmp_path)
    assert status == 0 and len(data["series"][0]["runs"]) == 1


def test_characters_that_utf_8_does_not_have(tmp_path):
    events = changed(demo_events(), "submission_org", value="\ud800 Müller")
    log = write_events(tmp_path / os.fsdecode(b"\xff.log"), events)
    page = tmp_path / "page.html"
    arguments = ["-m", "mxresnet.results.report", log, "-o", page, "--csv", tmp_path / "csv"]
    environ = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = python(*arguments, env=environ, errors="surrogateescape")
    assert done.returncode == 0 and "\\ud800 M\\xfcller" in done.stdout
    assert "? Müller" in page.read_text(encoding="utf-8")


def test_a_change_is_compared_with_its_base(tmp_path, capsys):
    change = tmp_path / "after"
    change.mkdir()
    for number in (0, 1, 3, 4):
        events = [
            {**event, "time_ms": 1.7e12 + 1.1 * (event["time_ms"] - 1.6e12)}
            for event in demo_events(number)
        ]
        write_events(change / f"s_{number}.log", events)
    status, data = report(tmp_path, "--base", DEMO, change)
    (compared,) = data["comparison"]["series"]
    minutes = compared["figures"]["minutes"]
    assert minutes["ratio"] == pytest.approx(1.1) and minutes["p_value"] == pytest.approx(2 / 70)
    assert minutes["verdict"].startswith("worse") and compared["unequal"] == []
    assert status == 0 and "Compared with dgxa100_ngc22.04_mxnet" in capsys.readouterr().out
    jsonschema.Draft202012Validator(SCHEMA).validate(data)


def test_hostile_values_stay_text(tmp_path, capsys):
    events = demo_events()
    for key in ("submission_org", "submission_platform", "s_network", "seed", "opt_name"):
        events = changed(events, key, value=HOSTILE)
    path = write_events(tmp_path / "=<img src=x onerror=alert(1)>.log", events)
    output = tmp_path / "report.csv"
    status, data = report(tmp_path, path, "--csv", output)
    printed = capsys.readouterr().out
    assert status == 4 and data["series"][0]["submission"]["org"] == HOSTILE
    assert all(character.isprintable() or character == "\n" for character in printed)
    assert all(character.isprintable() or character == "\n" for character in output.read_text())
    (row,) = csv.DictReader(io.StringIO(output.read_text()))
    assert row["run"].startswith("'=<img")


def test_the_page_needs_plotly_and_jinja2_and_the_rest_does_not(tmp_path):
    block = "import sys; sys.modules.update(plotly=None, jinja2=None); "
    call = "from mxresnet.results.report import main; sys.exit(main(sys.argv[1:]))"
    done = python("-c", block + call, DEMO_LOGS[0], "--json", tmp_path / "report.json")
    assert done.returncode == 0 and "28.41" in done.stdout
    assert "is not installed. pip install" in done.stderr and done.stderr.count("\n") == 1
    assert json.loads((tmp_path / "report.json").read_text())["exit_status"] == 0
    done = python("-c", block + call, DEMO_LOGS[0], "-o", tmp_path / "report.html")
    assert done.returncode == 2 and "pip install" in done.stderr
    assert not (tmp_path / "report.html").exists()


def test_the_official_tools_may_be_missing(tmp_path):
    script = (
        "import sys; from mxresnet.results import official, report; official._run_tools = fail; "
        "sys.exit(report.main(sys.argv[1:]))"
    )
    failing = "\ndef fail(*_): raise ValueError('mlperf-logging is not installed')\n"
    done = python("-c", failing + script, DEMO_LOGS[0], "--no-page")
    assert done.returncode == 4 and "mlperf-logging is not installed" in done.stdout
