# SPDX-License-Identifier: Apache-2.0
"""The command python -m prepare.imagenet SRC DST: convert a data set to MXNet RecordIO."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
from typing import Dict, Optional, Sequence

from prepare import destination, sources
from prepare import manifest as manifests
from prepare.command import (
    is_shortage,
    print_error,
    report_unexpected,
    start,
    tolerant_output,
)
from prepare.command_paths import (
    WrongPathError,
    check_destination_outside,
    check_destination_path,
    make_destination,
    path_argument,
    wrong_source_is_usage_error,
)
from prepare.convert import convert
from prepare.cpus import MAX_WORKERS, default_workers, worker_count
from prepare.decoder import DecoderError
from prepare.destination import has_same_archive
from prepare.exit_status import ExitStatus, exit_status_help
from prepare.image_check import CHECKS, NO_END_MARKER, ImageCheck
from prepare.listing import BadImagesError, SourceError
from prepare.plan import Plan
from prepare.planning import PREFIXES, make_plans
from prepare.progress_bar import Progress, print_line
from prepare.rerun import check_unchanged
from prepare.storage_errors import describe

MAX_UNUSUAL_SHOWN = 20  # images of a split
DESCRIPTION = """\
Convert ImageNet, or any data set with a folder for each class, to MXNet RecordIO. The files are
identical to those of MXNet's im2rec (--list --recursive, then --pass-through).

SRC contains train/ and val/ with a folder for each class, or the official archives
(ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar, read in place; also train/ with an archive for
each class). Labels for the validation archive come from the devkit archive, a valprep.sh or a list
of synsets, in SRC or given with --val-labels."""
EXIT_STATUS_HELP = exit_status_help(
    {
        ExitStatus.SUCCESS: "both splits are complete, from this run or an earlier one",
        ExitStatus.BAD_DATA: "the source has problems (all are listed), or is unusable",
        ExitStatus.USAGE_ERROR: (
            "wrong command line, or a path that does not exist or may not be read"
        ),
        ExitStatus.BAD_DESTINATION: "the destination has other content, which was not changed",
        ExitStatus.IO_ERROR: (
            "writing failed, the source changed or went away, or there is not enough space or "
            "memory; run it again to resume"
        ),
        ExitStatus.INTERNAL_ERROR: (
            "unexpected error, printed as a traceback; run it again to resume"
        ),
        ExitStatus.INTERRUPTED: "interrupted; run it again to resume",
    }
)


class ReportedError(Exception):
    """Problems of the source were printed while they were found; `errors` holds them by split."""

    def __init__(self, errors: Dict[str, SourceError]) -> None:
        super().__init__()
        self.errors = errors


def parse_arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m prepare.imagenet",
        description=DESCRIPTION,
        epilog=EXIT_STATUS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", type=path_argument, help="folder of the data set")
    parser.add_argument(
        "folder",
        metavar="DST",
        type=path_argument,
        help="folder for train.rec, val.rec, and their .idx, .lst, .sums and .json files",
    )
    parser.add_argument(
        "--val-labels",
        metavar="FILE",
        type=path_argument,
        help="labels of validation images that are not in class folders: the devkit archive, "
        "valprep.sh, or a text file with one synset a line in the order of the file names; "
        "found automatically if it is in SRC",
    )
    parser.add_argument(
        "--workers",
        type=worker_count,
        default=None,
        help=f"reading threads, at most {MAX_WORKERS} (default: 4 per usable CPU)",
    )
    parser.add_argument(
        "--check",
        choices=CHECKS,
        default="ends",
        help="how to check that a file is an image: by its first and last bytes, and by decoding "
        "it if these are unusual (ends, the default); by decoding it with DALI (decode); none",
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="fail (the default): list all problems and stop; skip: omit bad images and list them "
        "in the manifest",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="read the source, print what would be done, write nothing",
    )
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command; return its exit status."""
    with tolerant_output("prepare.imagenet"):
        return run_and_report(argv)


def run_and_report(argv: Optional[Sequence[str]]) -> ExitStatus:
    """Run the command and report every error; return the exit status."""
    arguments = parse_arguments(argv)
    try:
        run(arguments)
        return ExitStatus.SUCCESS
    except WrongPathError as error:
        return report_error(ExitStatus.USAGE_ERROR, str(error))
    except ImportError as error:
        return report_error(ExitStatus.USAGE_ERROR, f"--check=decode needs NVIDIA DALI: {error}")
    except DecoderError as error:
        return report_error(
            ExitStatus.IO_ERROR,
            f"images cannot be checked, because the decoder does not work ({error}); fix this and "
            "run the same command again to resume",
        )
    except ReportedError as error:
        return report_count(error.errors)
    except SourceError as error:
        report_messages(error)
        return report_count({"": error})
    except manifests.DestinationError as error:
        return report_error(ExitStatus.BAD_DESTINATION, str(error))
    except OSError as error:
        return report_error(
            ExitStatus.IO_ERROR,
            f"{describe(error, arguments.folder)}; fix this and run the same command again to "
            "resume",
        )
    except (Exception, KeyboardInterrupt) as error:
        advice = "run the same command again to resume"
        if is_shortage(error):
            advice = f"use fewer --workers; {advice}"
        return report_unexpected("prepare.imagenet", error, advice)


def report_error(status: ExitStatus, text: str) -> ExitStatus:
    """Print an error message; return `status`."""
    print_error("prepare.imagenet", text)
    return status


def report_messages(error: SourceError) -> None:
    """Print everything that is wrong with the source."""
    for message in error.messages:
        report_error(ExitStatus.BAD_DATA, message)


def report_count(errors: Dict[str, SourceError]) -> ExitStatus:
    """Print the number of problems and what to do, unless a single message has it all.

    Args:
        errors: by split, or all of them under "".

    Returns:
        The exit status.
    """
    count = sum(len(error.messages) for error in errors.values())
    skippable = all(
        isinstance(error, BadImagesError) and error.skippable for error in errors.values()
    )
    if count > 1 or skippable:
        records = " and ".join(f"{prefix} records" for prefix in errors if prefix) or "records"
        advice = ", or omit these images with --on-error=skip" if skippable else ""
        problems = f"{count} problem{'' if count == 1 else 's'}"
        report_error(
            ExitStatus.BAD_DATA,
            f"{problems}, so the {records} were not written: fix the source{advice}; "
            "the same command continues from there",
        )
    return ExitStatus.BAD_DATA


def run(arguments: argparse.Namespace) -> None:
    """Convert the splits that are not finished. Raises the exceptions that `main` handles."""
    folder = arguments.folder
    options: manifests.Options = {"check": arguments.check, "on_error": arguments.on_error}
    with wrong_source_is_usage_error():
        splits = sources.find_splits(arguments.source, arguments.val_labels)
        facts = {prefix: source_facts(splits[prefix]) for prefix in PREFIXES}
    check_destination_path(folder)
    for prefix in PREFIXES:
        check_destination_outside(folder, os.path.join(arguments.source, prefix))
    faulty = any(split.faults for split in splits.values())  # make_plans names everything wrong
    finished = [
        prefix
        for prefix in PREFIXES
        if not faulty and destination.is_finished(folder, prefix, facts[prefix], None, options)
    ]
    unfinished = [prefix for prefix in PREFIXES if prefix not in finished]
    workers = arguments.workers or default_workers()
    unknown = [prefix for prefix in finished if not has_same_archive(folder, prefix, facts[prefix])]
    if unfinished or unknown:
        plans = make_plans(
            splits,
            folder,
            workers,
            allow_empty=arguments.check == "none",
            skip_bad_images=arguments.on_error == "skip",
        )
        for prefix in unknown:
            check_unchanged(folder, plans[prefix])
    if not arguments.dry_run:
        for prefix in finished:  # a run may have been killed before it removed the folder
            destination.remove_part_folder(folder, prefix)
    if not unfinished:
        print_line(f"{folder}: already complete from an earlier run")
        return
    check = ImageCheck(arguments.check)
    check.require_decoder()
    needed_bytes = sum(
        plans[prefix].output_bytes() - destination.bytes_written(folder, prefix)
        for prefix in unfinished
    )
    check_space(folder, needed_bytes)
    verb = "would write" if arguments.dry_run else "writing"
    print_line(f"{folder}: {verb} {' and '.join(unfinished)}, {needed_bytes / 1e9:.2f} GB")
    if arguments.dry_run:
        return
    make_destination(folder)
    errors: Dict[str, SourceError] = {}
    with check:
        for prefix in unfinished:
            try:
                convert_split(plans[prefix], folder, workers, check, facts[prefix], options)
            except SourceError as error:
                report_messages(error)  # now, because the other split may take hours
                errors[prefix] = error
    if errors:
        raise ReportedError(errors)
    for prefix in PREFIXES:
        destination.check_still_there(folder, prefix)


def source_facts(split: sources.Split) -> manifests.SourceFacts:
    """Return what a manifest contains about the source."""
    return {
        "path": os.path.abspath(split.path),
        "kind": split.kind,
        "identity": split.identity(),
    }


def check_space(folder: str, needed_bytes: int) -> None:
    """Raise OSError if the file system of `folder`, which need not exist, has too little space."""
    existing = os.path.abspath(folder)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        text = (
            f"not enough space: needs {needed_bytes / 1e9:.2f} GB, "
            f"{free_bytes / 1e9:.2f} GB are free"
        )
        raise OSError(errno.ENOSPC, text, folder)


def convert_split(
    plan: Plan,
    folder: str,
    workers: int,
    check: ImageCheck,
    source: manifests.SourceFacts,
    options: manifests.Options,
) -> None:
    """Write the files of one split and show the progress."""
    with Progress(plan.prefix, len(plan.paths), int(plan.sizes.sum())) as progress:
        manifest = convert(plan, folder, workers, check, source, options, progress)
    unusual = manifest.get("unusual", [])
    for image in unusual[:MAX_UNUSUAL_SHOWN]:
        print_line(f"{plan.prefix}: kept: {image['path']}: {image['description']}")
    if len(unusual) > MAX_UNUSUAL_SHOWN:
        more = len(unusual) - MAX_UNUSUAL_SHOWN
        print_line(f"{plan.prefix}: kept: and {more} more, in {plan.prefix}.json")
    no_end = sum(image["description"].startswith(NO_END_MARKER) for image in unusual)
    if no_end:
        print_line(
            f"{plan.prefix}: kept: {no_end} of them without an end marker: on a CPU, "
            "--dali-roi-decode 1 ends the training where it reads their lowest rows"
        )
    counts = f"{len(manifest['skipped'])} left out, {len(unusual)} unusual but kept"
    print_line(f"{plan.prefix}: done: {progress.summary()}, {counts}")


if __name__ == "__main__":
    start("prepare.imagenet")
    sys.exit(main())
