# SPDX-License-Identifier: Apache-2.0
"""Report on runs: valid or not, time to train, rank among published systems, time by part.

`python -m mxresnet.results.report LOG_OR_FOLDER...` reads MLPerf ResNet logs, of this program or of
others, prints a summary and writes a page. Each folder is one series of trials; single logs are one
series together. Several series are compared with the first, or with that of --base.

Exit status: 0 valid and the target was reached; 3 a run missed it; 4 not valid (rejected by
MLPerf's tools, incomplete, resumed, or not judged); 2 a mistake in the arguments or an unreadable
log. Of several series, the highest.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import sys
from typing import Any, Callable, Dict, List, Optional, Sequence

from mxresnet.errors import UserError
from mxresnet.results.log_files import Series, describe, find_series
from mxresnet.results.official import DEFAULT_RULESET, RULESETS, judge
from mxresnet.results.report_csv import format_csv
from mxresnet.results.report_data import report_data
from mxresnet.results.report_terminal import format_report
from mxresnet.results.run_figures import RunFigures, read_figures
from mxresnet.results.submission import describe_system
from mxresnet.results.verdict import ReportStatus

NAME = "mxresnet-report"
DEMO = os.path.join(os.path.dirname(os.path.abspath(__file__)), "demo")
DEFAULT_PAGE = "report.html"
INSTALL = "pip install -c constraints.txt -e '.[report]' (plotly and jinja2)"


def _make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("logs", metavar="LOG_OR_FOLDER", nargs="*")
    parser.add_argument("--base", metavar="LOG_OR_FOLDER", help="compare the others with this one")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=f"the page (default: ./{DEFAULT_PAGE} where plotly and jinja2 are installed)",
    )
    parser.add_argument("--no-page", action="store_true", help="write no page")
    parser.add_argument(
        "--json", metavar="FILE", help="write all numbers as JSON (docs/report.md); -: print them"
    )
    parser.add_argument("--csv", metavar="FILE", help="write one row for each run; -: print them")
    parser.add_argument(
        "--ruleset",
        choices=RULESETS,
        help="rules of MLPerf's tools (default: those of the round in the path, such as "
        f"training_results_v3.0, else {DEFAULT_RULESET})",
    )
    parser.add_argument("--accelerator", metavar="NAME", help='such as "A100-SXM-40GB"')
    parser.add_argument(
        "--this-machine",
        action="store_true",
        help="the runs were on this machine: describe it where no description is beside the logs",
    )
    parser.add_argument("--demo", action="store_true", help="report on an example that is included")
    return parser


def read_series(series: Series) -> List[RunFigures]:
    """Read the logs of a series.

    Raises:
        UserError: A log cannot be read, or has no events.
    """
    found = []
    for path in series.paths:
        try:
            figures = read_figures(path)
        except OSError as error:
            raise UserError(f"log {path} cannot be read: {error.strerror or error}") from error
        if not figures.scan.counts:
            raise UserError(f"{path} is not an MLPerf log: it has no event (:::MLLOG)")
        benchmark = figures.submission.get("benchmark", "resnet")
        if benchmark != "resnet":
            raise UserError(f"{path} is a log of the benchmark {benchmark}, not of resnet")
        found.append(figures)
    return found


def choose_ruleset(series: Series, wanted: Optional[str]) -> str:
    """Return the rules to judge with: as asked for, of the round in the path, or the default."""
    hint = f"{series.round_hint}.0"
    return wanted or (hint if hint in RULESETS else DEFAULT_RULESET)


def make_report(options: argparse.Namespace) -> Dict[str, Any]:
    """Read the logs that the options name and return the content of the report.

    Raises:
        UserError: A log cannot be read, or the arguments name none.
    """
    has_base = options.base is not None
    arguments = [*([options.base] if has_base else []), *options.logs]
    if options.demo:
        arguments.append(DEMO)
    if not arguments:
        raise UserError("no log: name logs or folders, or use --demo")
    if has_base and len(arguments) < 2:
        raise UserError(f"--base {options.base}: name what to compare with it, too")
    series = find_series(arguments, first_alone=has_base)
    _check_outputs(options, series)
    if options.this_machine:
        for one in series:
            if not one.hardware:
                describe(one, describe_system(platform.node(), {"submission_org": ""}, nodes=1))
    if options.accelerator:
        for one in series:
            one.accelerator = options.accelerator
    runs = [read_series(one) for one in series]
    verdicts = judge(runs, [choose_ruleset(one, options.ruleset) for one in series])
    return report_data(series, runs, verdicts)


def _check_outputs(options: argparse.Namespace, series: Sequence[Series]) -> None:
    """Raise UserError if an output would replace a log."""
    logs = [path for one in series for path in one.paths]
    for output in (options.json, options.csv, options.output or DEFAULT_PAGE):
        exists = output and os.path.exists(output)
        if exists and any(os.path.samefile(output, log) for log in logs):
            raise UserError(f"the output {output} is one of the logs: name another file")


def write_file(path: str, content: str) -> None:
    """Write a file that appears complete or not at all; "-": standard output.

    Raises:
        OSError: It cannot be written.
    """
    if path == "-":
        sys.stdout.write(content)
        return
    part = f"{path}.{os.getpid()}.part"
    try:
        # A log or a file name may have characters that UTF-8 does not have.
        with open(part, "w", encoding="utf-8", errors="replace", newline="") as file:
            file.write(content)
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(part)
        raise


def load_renderer(options: argparse.Namespace) -> Optional[Callable[[Dict[str, Any]], str]]:
    """Return the function that renders the page; without plotly or jinja2 print what to install.

    Raises:
        UserError: A page was asked for and the packages are missing.
    """
    if options.no_page:
        return None
    try:
        from mxresnet.results.report_page import render_page
    except ImportError as error:
        if options.output is not None:
            raise UserError(f"--output {options.output} needs {error.name}: {INSTALL}") from None
        print(f"No page: {error.name} is not installed. {INSTALL}", file=sys.stderr)
        return None
    return render_page


def write_page(page: str, path: Optional[str]) -> None:
    """Write the page and print its path.

    Raises:
        OSError: It cannot be written.
    """
    write_file(path or DEFAULT_PAGE, page)
    if path != "-":
        print(f"report: {os.path.abspath(path or DEFAULT_PAGE)}", file=sys.stderr)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Write a report; return the exit status."""
    options = _make_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without UTF-8
    outputs = [options.json, options.csv, options.output]
    try:
        if outputs.count("-") > 1:
            raise UserError("only one of --json, --csv and --output can be - (standard output)")
        render_page = load_renderer(options)
        data = make_report(options)
        if "-" not in outputs:
            sys.stdout.write(format_report(data))
            sys.stdout.flush()
        if options.json:
            write_file(options.json, json.dumps(data, indent=1, allow_nan=False) + "\n")
        if options.csv:
            write_file(options.csv, format_csv(data))
        if render_page:
            write_page(render_page(data), options.output)
        sys.stdout.flush()
    except (UserError, OSError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        return ReportStatus.UNREADABLE
    return int(data["exit_status"])


if __name__ == "__main__":
    sys.exit(main())
