# SPDX-License-Identifier: Apache-2.0
"""The command python -m prepare.imagenet SRC DST: convert a data set to MXNet RecordIO."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shutil
import sys
import traceback
from typing import Callable, Dict, Iterator, List, Optional, Sequence

from prepare import image_check, imagenet_spec, sources, val_labels
from prepare import manifest as manifests
from prepare.convert import BadImagesError, convert
from prepare.cpus import positive, usable_cpus
from prepare.exit_status import ExitStatus, exit_status_help
from prepare.listing import Problem, SourceError
from prepare.pieces import ImageCheck
from prepare.plan import Plan, check_no_class_lost, make_plan
from prepare.progress_bar import Progress, escape_unencodable_output

PREFIXES = ("val", "train")  # the small split first, to find errors sooner
MAX_IGNORED_SHOWN = 10  # kinds of ignored files
CHECKS: Dict[str, Callable[[], ImageCheck]] = {
    "none": lambda: image_check.check_nothing,
    "ends": lambda: image_check.check_ends,
    "decode": image_check.DecodeCheck,
}
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
            "writing failed, the source went away, or there is not enough space; "
            "run it again to resume"
        ),
        ExitStatus.INTERNAL_ERROR: (
            "unexpected error, printed as a traceback; run it again to resume"
        ),
        ExitStatus.INTERRUPTED: "interrupted; run it again to resume",
    }
)


class UnreadableSourceError(PermissionError):
    """This user may not read the source. A usage error, because a retry cannot help."""


class DestinationInSourceError(Exception):
    """The destination is inside a folder of images of the source."""


def parse_arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m prepare.imagenet",
        description=DESCRIPTION,
        epilog=EXIT_STATUS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="folder of the data set")
    parser.add_argument(
        "folder",
        metavar="DST",
        help="folder for train.rec, val.rec, and their .idx, .lst, .sums and .json files",
    )
    parser.add_argument(
        "--val-labels",
        metavar="FILE",
        help="labels of validation images that are not in class folders: the devkit archive, "
        "valprep.sh, or a text file with one synset a line in the order of the file names; "
        "found automatically if it is in SRC",
    )
    parser.add_argument(
        "--workers", type=positive, default=None, help="reading threads (default: 4 per usable CPU)"
    )
    parser.add_argument(
        "--check",
        choices=CHECKS,
        default="ends",
        help="how to check that a file is an image: its first and last bytes (ends, the default), "
        "DALI can decode it (decode), or no check (none)",
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
    escape_unencodable_output()
    arguments = parse_arguments(argv)
    try:
        run(arguments)
        return ExitStatus.SUCCESS
    except (FileNotFoundError, FileExistsError, NotADirectoryError, UnreadableSourceError) as error:
        return report_error(ExitStatus.USAGE_ERROR, f"{error.filename}: {error.strerror}")
    except DestinationInSourceError as error:
        return report_error(ExitStatus.USAGE_ERROR, str(error))
    except ImportError as error:
        return report_error(ExitStatus.USAGE_ERROR, f"--check=decode needs NVIDIA DALI: {error}")
    except BadImagesError as error:
        return report_problems(error.problems)
    except SourceError as error:
        return report_error(ExitStatus.BAD_DATA, str(error))
    except manifests.DestinationError as error:
        return report_error(ExitStatus.BAD_DESTINATION, str(error))
    except OSError as error:
        where = error.filename or arguments.folder
        return report_error(
            ExitStatus.IO_ERROR,
            f"{where}: {error.strerror}; fix this and run the same command again to resume",
        )
    except KeyboardInterrupt:
        return report_error(
            ExitStatus.INTERRUPTED, "interrupted; run the same command again to resume"
        )
    except Exception:  # out of memory, or a bug
        traceback.print_exc()
        return report_error(
            ExitStatus.INTERNAL_ERROR,
            "failed with the unexpected error above; run the same command again to resume",
        )


def report_error(status: ExitStatus, text: str) -> ExitStatus:
    """Print an error message; return `status`."""
    print(f"prepare.imagenet: {text}", file=sys.stderr)
    return status


def report_problems(problems: List[Problem]) -> ExitStatus:
    """Print all problems of the source; return the exit status."""
    for problem in problems:
        print(f"prepare.imagenet: {problem}", file=sys.stderr)
    count = f"{len(problems)} problem{'' if len(problems) == 1 else 's'}"
    return report_error(
        ExitStatus.BAD_DATA,
        f"{count}, so the records were not written: fix the source, or omit these images with "
        "--on-error=skip",
    )


def print_line(text: str) -> None:
    """Print a line immediately, also when the output is a pipe."""
    print(text, flush=True)


def run(arguments: argparse.Namespace) -> None:
    """Convert the splits that are not finished. Raises the exceptions that `main` handles."""
    folder = arguments.folder
    options: manifests.Options = {"check": arguments.check, "on_error": arguments.on_error}
    with permission_errors_as_unreadable_source():
        splits = sources.find_splits(arguments.source, arguments.val_labels)
        identities = {prefix: splits[prefix].identity() for prefix in PREFIXES}
    check_destination_outside_source(folder, arguments.source)
    unfinished = [
        prefix
        for prefix in PREFIXES
        if not manifests.is_finished(folder, prefix, identities[prefix], options)
    ]
    if not arguments.dry_run:
        for prefix in PREFIXES:
            if prefix not in unfinished:  # a run may have been killed before it removed the folder
                manifests.remove_part_folder(folder, prefix)
    if not unfinished:
        print_line(f"{folder}: already complete from an earlier run")
        return
    workers = arguments.workers or 4 * usable_cpus()
    check = CHECKS[arguments.check]()
    plans = make_plans(splits, workers, options)
    needed_bytes = sum(
        plans[prefix].output_bytes() - manifests.bytes_written(folder, prefix)
        for prefix in unfinished
    )
    check_space(folder, needed_bytes)
    verb = "would write" if arguments.dry_run else "writing"
    print_line(f"{folder}: {verb} {' and '.join(unfinished)}, {needed_bytes / 1e9:.2f} GB")
    if arguments.dry_run:
        return
    os.makedirs(folder, exist_ok=True)
    for prefix in unfinished:
        source: manifests.SourceFacts = {
            "path": os.path.abspath(plans[prefix].top),
            "kind": splits[prefix].kind,
            "identity": identities[prefix],
        }
        convert_split(plans[prefix], folder, workers, check, source, options)


@contextlib.contextmanager
def permission_errors_as_unreadable_source() -> Iterator[None]:
    """Raise UnreadableSourceError for a source that may not be read, or is a link to itself."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ELOOP):
            raise
        raise UnreadableSourceError(error.errno, error.strerror, error.filename) from None


def check_destination_outside_source(folder: str, source: str) -> None:
    """Raise DestinationInSourceError if `folder` is in train/ or val/ of the source.

    The next run would take it for a class.
    """
    destination = os.path.realpath(folder) + os.sep
    for prefix in PREFIXES:
        image_folder = os.path.realpath(os.path.join(source, prefix))
        if os.path.isdir(image_folder) and destination.startswith(image_folder + os.sep):
            raise DestinationInSourceError(
                f"{folder}: is in the source's own folder {image_folder}: "
                "choose another destination"
            )


def make_plans(
    splits: Dict[str, sources.Split], workers: int, options: manifests.Options
) -> Dict[str, Plan]:
    """List the source and plan the records of both splits.

    Raises:
        BadImagesError: Problems were found without reading an image, and on_error is "fail".
        SourceError: The source is not a usable data set.
        UnreadableSourceError: The source may not be read.
    """
    allow_empty = options["check"] == "none"
    with permission_errors_as_unreadable_source():
        plans = {
            prefix: plan_split(prefix, splits[prefix], workers, allow_empty) for prefix in PREFIXES
        }
        check_plans(plans, splits["val"].label_files, options["on_error"] == "skip")
    return plans


def plan_split(prefix: str, split: sources.Split, workers: int, allow_empty: bool) -> Plan:
    """List the images of a split and plan its records."""
    print_line(f"{prefix}: listing {split.path} ({split.kind})")
    plan = make_plan(prefix, split.list(workers), allow_empty=allow_empty)
    print_line(f"{prefix}: {len(plan.paths):,} images in {len(plan.classes)} classes")
    if plan.ignored:
        shown = sorted(plan.ignored.items())[:MAX_IGNORED_SHOWN]
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in shown)
        print_line(f"{prefix}: other files, ignored: {kinds}")
    return plan


def check_plans(plans: Dict[str, Plan], label_files: Sequence[str], skip_bad_images: bool) -> None:
    """Raise BadImagesError or SourceError for problems that are found without reading an image."""
    for plan in plans.values():
        plan.problems += imagenet_spec.image_count_problems(
            plan, val_labels.train_counts(label_files)
        )
    problems = [problem for prefix in PREFIXES for problem in plans[prefix].problems]
    if problems and not skip_bad_images:
        raise BadImagesError(problems)
    for prefix in PREFIXES:
        check_no_class_lost(plans[prefix], plans[prefix].labels)
    imagenet_spec.check_same_classes(plans["train"], plans["val"])


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
    skipped = len(manifest["skipped"])
    print_line(f"{plan.prefix}: done: {progress.summary()}, {skipped} left out")


if __name__ == "__main__":
    sys.exit(main())
