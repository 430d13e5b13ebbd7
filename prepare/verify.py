# SPDX-License-Identifier: Apache-2.0
"""The command python -m prepare.verify DST: read a converted data set back and check all of it."""

from __future__ import annotations

import argparse
import os
import sys
from typing import List, Optional, Sequence

from prepare import record_check, sources
from prepare.command import (
    print_error,
    report_unexpected,
    start,
    tolerant_output,
)
from prepare.command_paths import WrongPathError, path_argument, wrong_source_is_usage_error
from prepare.cpus import MAX_WORKERS, default_workers, worker_count
from prepare.exit_status import ExitStatus, exit_status_help
from prepare.listing import SourceError
from prepare.manifest import VERSION_WITHOUT_SUM, DestinationError, manifest_path
from prepare.plan import make_plan
from prepare.progress_bar import Progress
from prepare.record_set import RecordSet, UnreadableTablesError
from prepare.storage_errors import name_in_errors

PREFIXES = ("train", "val")
MAX_ERRORS_SHOWN = 50  # per split; the others are only counted
DESCRIPTION = """\
Read a converted data set back and check that it is complete and undamaged; name what is damaged."""
EXIT_STATUS_HELP = exit_status_help(
    {
        ExitStatus.SUCCESS: "everything agrees with the manifests (and with SRC, with --against)",
        ExitStatus.BAD_DATA: "something is damaged, missing or different; all of it is named",
        ExitStatus.USAGE_ERROR: (
            "wrong command line, or a path that does not exist or may not be read"
        ),
        ExitStatus.BAD_DESTINATION: "DST is not a finished data set",
        ExitStatus.IO_ERROR: "a file could not be read, or the memory is full: no known damage",
        ExitStatus.INTERNAL_ERROR: "unexpected error, printed as a traceback",
        ExitStatus.INTERRUPTED: "interrupted",
    }
)


def parse_arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m prepare.verify",
        description=DESCRIPTION,
        epilog=EXIT_STATUS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", metavar="DST", type=path_argument, help="folder that prepare.imagenet wrote"
    )
    parser.add_argument(
        "--against",
        metavar="SRC",
        type=path_argument,
        help="also compare each record with the image in the source",
    )
    parser.add_argument(
        "--val-labels",
        metavar="FILE",
        type=path_argument,
        help="as given to prepare.imagenet, for --against",
    )
    parser.add_argument(
        "--fast",
        action="store_true",
        help="read no images: only the index, the list and each record's header",
    )
    parser.add_argument(
        "--workers",
        type=worker_count,
        default=None,
        help=f"reading threads, at most {MAX_WORKERS} (default: 4 per usable CPU)",
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command; return its exit status."""
    with tolerant_output("prepare.verify"):
        return run(argv)


def run(argv: Optional[Sequence[str]]) -> ExitStatus:
    """Run the command and report every error; return the exit status."""
    arguments = parse_arguments(argv)
    try:
        with wrong_source_is_usage_error():
            return verify(arguments)
    except WrongPathError as error:
        return report_error(ExitStatus.USAGE_ERROR, str(error))
    except DestinationError as error:
        return report_error(ExitStatus.BAD_DESTINATION, str(error))
    except SourceError as error:
        for message in error.messages:
            report_error(ExitStatus.BAD_DATA, message)
        return ExitStatus.BAD_DATA
    except (Exception, KeyboardInterrupt) as error:
        return report_unexpected("prepare.verify", error, "run the same command again")


def verify(arguments: argparse.Namespace) -> ExitStatus:
    """Check both splits and print the errors found; return the exit status."""
    os.listdir(arguments.folder)  # raises the OSError of a wrong path
    workers = arguments.workers or default_workers()
    source = (
        sources.find_splits(arguments.against, arguments.val_labels) if arguments.against else {}
    )
    status = ExitStatus.SUCCESS
    for prefix in PREFIXES:
        try:
            errors = verify_split(arguments, prefix, source.get(prefix), workers)
        except DestinationError as error:
            status = report_error(ExitStatus.BAD_DESTINATION, str(error))
            continue
        if errors:
            status = max(status, report_split_errors(errors))
    return status


def verify_split(
    arguments: argparse.Namespace, prefix: str, source: Optional[sources.Split], workers: int
) -> List[str]:
    """Check one split and print the result; return the errors found.

    Raises:
        DestinationError: The split is not finished, or its manifest is invalid.
    """
    if not os.path.exists(manifest_path(arguments.folder, prefix)):
        raise DestinationError(
            f"{arguments.folder}: there is no {prefix}.json here: the conversion is not finished"
        )
    records = RecordSet(arguments.folder, prefix)
    check_split(records, source, arguments.fast, workers)
    count = len(records.errors)
    result = f"{count} error{'' if count == 1 else 's'}" if count else "complete and undamaged"
    manifest = records.manifest
    if manifest["version"] == VERSION_WITHOUT_SUM:
        print(
            f"{prefix}: its manifest is of version {VERSION_WITHOUT_SUM}, which has no sum of "
            "its own: not all damage in it can be noticed"
        )
    print(
        f"{prefix}: {manifest['examples']:,} records in {len(manifest['classes'])} classes, "
        f"{result}"
    )
    return records.errors


def check_split(
    records: RecordSet, source: Optional[sources.Split], fast: bool, workers: int
) -> None:
    """Check one split; the errors are added to `records`.

    Args:
        source: Compare the records with this source too.
        fast: Read only the header of each record.
        workers: Number of reading threads.
    """
    try:
        records.read_tables()
        count, size = len(records.paths), records.expected_size
        record_file_errors = name_in_errors(records.path(".rec"))
        with Progress(f"verify {records.prefix}", count, size) as progress, record_file_errors:
            if fast:
                record_check.check_headers(records, workers, progress)
            else:
                record_check.check_all_bytes(records, progress)
        if source is not None:
            plan = make_plan(
                records.prefix,
                source.list(workers),
                allow_empty=records.manifest["options"]["check"] == "none",
            )
            records.errors += [str(fault) for fault in plan.problems if not fault.skippable]
            for note in plan.notes:
                print(f"{records.prefix}: {note}")
            record_file_errors = name_in_errors(records.path(".rec"))
            with Progress(f"compare {records.prefix}", count, size) as progress, record_file_errors:
                record_check.compare_with_source(records, plan, workers, progress)
    except UnreadableTablesError as error:
        records.errors.append(str(error))
    except SourceError as error:
        records.errors += error.messages


def report_split_errors(errors: List[str]) -> ExitStatus:
    """Print the errors of one split; return the exit status."""
    for error in errors[:MAX_ERRORS_SHOWN]:
        report_error(ExitStatus.BAD_DATA, error)
    if len(errors) > MAX_ERRORS_SHOWN:
        report_error(ExitStatus.BAD_DATA, f"and {len(errors) - MAX_ERRORS_SHOWN} more")
    return ExitStatus.BAD_DATA


def report_error(status: ExitStatus, text: str) -> ExitStatus:
    """Print an error message; return `status`."""
    print_error("prepare.verify", text)
    return status


if __name__ == "__main__":
    start("prepare.verify")
    sys.exit(main())
