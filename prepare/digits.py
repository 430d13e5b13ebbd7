# SPDX-License-Identifier: Apache-2.0
"""python -m prepare.digits DST: write scikit-learn's handwritten digits as JPEGs in class folders.

1,797 real scans in 10 classes, in the layout of ImageNet. Every fifth image of each class goes to
val/, the others to train/; nothing is augmented.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from typing import Dict, Iterator, Optional, Sequence, Tuple

from prepare.command import (
    print_error,
    report_unexpected,
    start,
    tolerant_output,
)
from prepare.command_paths import path_argument
from prepare.exit_status import ExitStatus
from prepare.regular_file import NotRegularFileError, open_regular
from prepare.storage_errors import describe

SIDE_PIXELS = 32  # the scans are 8 x 8, but a ResNet-50 halves its input five times
VAL_INTERVAL = 5  # every fifth image of a class is for validation
JPEG_QUALITY = 95
MAX_INTENSITY = 16  # each of the 8 x 8 values is a number of dots from 0 to 16


def digit_images() -> Iterator[Tuple[str, bytes]]:
    """Yield (relative path, JPEG bytes) of all 1,797 images, in a fixed order.

    Raises:
        ImportError: scikit-learn or OpenCV is not installed.
    """
    import cv2
    from sklearn.datasets import load_digits

    scans = load_digits()
    counts = [0] * 10
    for pixels, digit in zip(scans.images, scans.target):
        number = counts[digit]
        counts[digit] += 1
        gray = (pixels * (255.0 / MAX_INTENSITY)).round().astype("uint8")
        large = cv2.resize(gray, (SIDE_PIXELS, SIDE_PIXELS), interpolation=cv2.INTER_CUBIC)
        color = cv2.cvtColor(large, cv2.COLOR_GRAY2BGR)
        _, jpeg = cv2.imencode(".jpg", color, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
        split = "val" if number % VAL_INTERVAL == VAL_INTERVAL - 1 else "train"
        yield os.path.join(split, f"digit_{digit}", f"{number:04d}.jpg"), jpeg.tobytes()


def is_complete(folder: str, expected: Dict[str, bytes]) -> bool:
    """Return whether `folder` contains exactly the files `expected` (relative path -> content)."""
    num_found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            content = expected.get(os.path.relpath(path, folder))
            if content is None:
                return False
            try:
                with open_regular(path) as stream:
                    if stream.read() != content:
                        return False
            except NotRegularFileError:
                return False
            num_found += 1
    return num_found == len(expected)


def write_dataset(folder: str) -> bool:
    """Write the data set to `folder`; return False if the complete data set exists there already.

    Raises:
        FileExistsError: `folder` contains something else.
        OSError: the data set cannot be written.
        ImportError: scikit-learn or OpenCV is not installed.
    """
    images = dict(digit_images())
    folder = os.path.abspath(folder)
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        if os.path.isdir(folder) and is_complete(folder, images):
            return False
        raise FileExistsError(
            f"{folder} exists and is not the digits data set: remove it or choose another folder"
        )
    parent, name = os.path.split(folder)
    os.makedirs(parent, exist_ok=True)
    # In the same parent, and so in the same file system: one rename publishes the complete folder.
    scratch = tempfile.mkdtemp(prefix=f"{name}.", suffix=".part", dir=parent)
    try:
        for path, jpeg in images.items():
            path = os.path.join(scratch, path)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as stream:
                stream.write(jpeg)
        os.chmod(scratch, 0o755)  # only its owner may read a folder made by mkdtemp
        try:
            os.rename(scratch, folder)
        except OSError:  # another process may have been faster
            if not (os.path.isdir(folder) and is_complete(folder, images)):
                raise
            return False
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command.

    Returns:
        The exit status: 0 if the data set is written or there already, 2 if the folder contains
        something else, cannot be written, or a package is missing.
    """
    with tolerant_output("prepare.digits"):
        return run(argv)


def run(argv: Optional[Sequence[str]]) -> int:
    """Run the command and report every error; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m prepare.digits", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument(
        "folder",
        metavar="DST",
        type=path_argument,
        help="folder to make; it will contain train/ and val/",
    )
    folder = parser.parse_args(argv).folder
    # Remove the unfinished folder.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        written = write_dataset(folder)
    except OSError as error:
        reason = str(error) if error.errno is None else describe(error, folder)
        print_error("prepare.digits", reason)
        return ExitStatus.USAGE_ERROR
    except ImportError as error:
        reason = f"needs scikit-learn and opencv-python-headless: {error}"
        print_error("prepare.digits", reason)
        return ExitStatus.USAGE_ERROR
    except (Exception, KeyboardInterrupt) as error:
        return report_unexpected("prepare.digits", error, "run the same command again")
    print(f"{folder}: 10 classes, 1,797 images{'' if written else ' (already there)'}")
    return 0


if __name__ == "__main__":
    start("prepare.digits")
    sys.exit(main())
