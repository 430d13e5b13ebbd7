# SPDX-License-Identifier: Apache-2.0
"""python -m prepare.imagenet SRC DST: turns ImageNet, or any folder-per-class data set, into MXNet RecordIO.

The files are byte for byte those of MXNet's im2rec (--list --recursive, then --pass-through).
"""

import argparse
import contextlib
import errno
import os
import shutil
import sys
import traceback

from prepare import image_check, imagenet_spec, record_writer, sources, val_labels
from prepare.convert import BadImages, convert
from prepare.cpus import positive, usable_cpus
from prepare.listing import SourceError
from prepare.plan import check_no_class_lost, make_plan
from prepare.progress_bar import Progress, print_any_name

PREFIXES = ("val", "train")  # the small one first: what is wrong shows early
CHECKS = {
    "none": lambda: image_check.check_nothing,
    "ends": lambda: image_check.check_ends,
    "decode": image_check.DecodeCheck,
}
STATUSES = """\
exit status:
  0    both halves are complete, now or since an earlier run
  1    the source has problems (all are listed), or is not what it should be
  2    wrong command line, or a path that does not exist or may not be read
  3    the destination holds something else: nothing was touched
  4    writing failed, the source went away, or there is not enough space; run it again to go on
  70   a failure, of which the lines before tell; run it again to go on
  130  interrupted; run it again to go on
"""


class Unreadable(PermissionError):
    """The source may not be looked at, which trying again does not change; a destination is another matter."""


class WrongPath(Exception):
    """The command line names a folder that cannot be meant."""


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m prepare.imagenet",
        description=__doc__.split("\n", 1)[1].strip()
        + """

SRC holds train/ and val/ with a folder for each class, or the official archives (ILSVRC2012_img_train.tar and
ILSVRC2012_img_val.tar, read in place; also train/ with an archive for each class). Labels for the validation
archive come from the devkit archive, a valprep.sh or a list of synsets, in SRC or named with --val-labels.""",
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="folder of the data set")
    parser.add_argument(
        "folder",
        metavar="DST",
        help="folder for train.rec, val.rec, their .idx, .lst, .sums and .json",
    )
    parser.add_argument(
        "--val-labels",
        metavar="FILE",
        help="labels of validation images that stand in no class folders: the devkit archive, valprep.sh, or a text file "
        "with one synset a line in the order of the files; found by itself when it is in SRC",
    )
    parser.add_argument(
        "--workers", type=positive, default=None, help="reading threads (default: 4 per usable CPU)"
    )
    parser.add_argument(
        "--check",
        choices=CHECKS,
        default="ends",
        help="what makes an image: its first and last bytes (ends), that DALI decodes it (decode), or nothing (none)",
    )
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="fail: name everything that is wrong and stop; skip: leave it out and name it in the manifest",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="look at the source, say what would be done, write nothing",
    )
    return parser.parse_args(argv)


def main(argv=None):
    """Returns the exit status; STATUSES says what each means."""
    print_any_name()
    arguments = parse(argv)
    try:
        run(arguments)
        return 0
    except (FileNotFoundError, FileExistsError, NotADirectoryError, Unreadable) as error:
        return fail(2, "%s: %s" % (error.filename, error.strerror))
    except WrongPath as error:
        return fail(2, str(error))
    except ImportError as error:
        return fail(2, "--check=decode needs NVIDIA DALI: %s" % error)
    except BadImages as error:
        return report(error.problems)
    except SourceError as error:
        return fail(1, str(error))
    except record_writer.Refused as error:
        return fail(3, str(error))
    except OSError as error:
        where = error.filename or arguments.folder
        return fail(
            4, "%s: %s; when that is mended, the same command goes on" % (where, error.strerror)
        )
    except KeyboardInterrupt:
        return fail(130, "interrupted; run the same command again to go on")
    except Exception:  # no memory, or a mistake of ours; Python's own status for it, 1, stands for a bad source here
        traceback.print_exc()
        return fail(70, "ended by what is shown above; the same command goes on")


def fail(status, text):
    print("prepare.imagenet: " + text, file=sys.stderr)
    return status


def report(problems):
    """Names every problem; returns the exit status."""
    for problem in problems:
        print("prepare.imagenet: %s" % problem, file=sys.stderr)
    return fail(
        1,
        "%d problem%s, so nothing of this was kept: mend them, or leave these images out with --on-error=skip"
        % (len(problems), "" if len(problems) == 1 else "s"),
    )


def plan_split(prefix, half, workers, check):
    say("%s: looking at %s (%s)" % (prefix, half.path, half.kind))
    plan = make_plan(prefix, half.list(workers), allow_empty=check == "none")
    say("%s: %s images in %d classes" % (prefix, format(len(plan.paths), ","), len(plan.classes)))
    if plan.ignored:
        kinds = ", ".join(
            "%d %s" % (count, suffix) for suffix, count in sorted(plan.ignored.items())[:10]
        )
        say("%s: other files, left alone: %s" % (prefix, kinds))
    return plan


def say(text):
    print(text, flush=True)  # a log that is a pipe shows it now, not at the end


def check_plans(plans, label_files, keep_going):
    """Refuses what indexing can tell is wrong. Raises BadImages or SourceError."""
    for plan in plans.values():
        plan.problems += imagenet_spec.image_count_problems(plan, val_labels.train_counts(label_files))
    problems = [problem for prefix in PREFIXES for problem in plans[prefix].problems]
    if problems and not keep_going:
        raise BadImages(problems)
    for prefix in PREFIXES:
        check_no_class_lost(plans[prefix], plans[prefix].labels)
    imagenet_spec.check_same_classes(plans["train"], plans["val"])


def check_space(folder, needed):
    """Raises OSError when the file system cannot hold `needed` bytes more."""
    there = os.path.abspath(folder)
    while not os.path.exists(there):
        there = os.path.dirname(there)
    free = shutil.disk_usage(there).free
    if free < needed:
        text = "needs %.2f GB, %.2f GB are free: free the rest" % (needed / 1e9, free / 1e9)
        raise OSError(errno.ENOSPC, text, folder)


@contextlib.contextmanager
def looking_at_the_source():
    """Tells a PermissionError of the source from one of the destination; a link to itself is no better."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ELOOP):
            raise
        raise Unreadable(error.errno, error.strerror, error.filename) from None


def check_apart(folder, source):
    """Raises WrongPath when `folder` is one that images are looked for in: it would be a class of the next run."""
    for prefix in PREFIXES:
        images_there = os.path.realpath(os.path.join(source, prefix))
        if os.path.isdir(images_there) and (os.path.realpath(folder) + os.sep).startswith(
            images_there + os.sep
        ):
            raise WrongPath(
                "%s: is in the source's own folder %s: choose another" % (folder, images_there)
            )


def run(arguments):
    """Does what the command line says. Raises what `main` turns into an exit status."""
    folder = arguments.folder
    workers = arguments.workers or 4 * usable_cpus()
    options = {"check": arguments.check, "on_error": arguments.on_error}
    with looking_at_the_source():
        halves = sources.find_splits(arguments.source, arguments.val_labels)
        identities = {prefix: halves[prefix].identity() for prefix in PREFIXES}
    check_apart(folder, arguments.source)
    todo = [
        prefix
        for prefix in PREFIXES
        if not record_writer.is_finished(folder, prefix, identities[prefix], options)
    ]
    for prefix in PREFIXES:
        if prefix not in todo and not arguments.dry_run:
            record_writer.sweep(folder, prefix)
    if not todo:
        say("%s: complete since an earlier run" % folder)
        return
    check = CHECKS[arguments.check]()
    with looking_at_the_source():
        plans = {
            prefix: plan_split(prefix, halves[prefix], workers, arguments.check)
            for prefix in PREFIXES
        }
        check_plans(plans, halves["val"].label_files, arguments.on_error == "skip")
    needed = sum(
        plans[prefix].output_bytes() - record_writer.bytes_written(folder, prefix)
        for prefix in todo
    )
    check_space(folder, needed)
    say(
        "%s: %s %s, %.2f GB"
        % (
            folder,
            "would write" if arguments.dry_run else "writing",
            " and ".join(todo),
            needed / 1e9,
        )
    )
    if arguments.dry_run:
        return
    os.makedirs(folder, exist_ok=True)
    for prefix in todo:
        plan = plans[prefix]
        source = {
            "path": os.path.abspath(plan.top),
            "kind": halves[prefix].kind,
            "identity": identities[prefix],
        }
        with Progress(prefix, len(plan.paths), int(plan.sizes.sum())) as progress:
            manifest = convert(
                plan,
                folder,
                workers=workers,
                check=check,
                keep_going=arguments.on_error == "skip",
                description={"source": source, "options": options},
                progress=progress,
            )
        say("%s: done: %s, %d left out" % (prefix, progress.summary(), len(manifest["skipped"])))


if __name__ == "__main__":
    sys.exit(main())
