# SPDX-License-Identifier: Apache-2.0
"""python -m prepare.digits DST: scikit-learn's handwritten digits as a folder of JPEGs laid out like ImageNet.

1,797 real scans in 10 classes. Every fifth image of each class goes to val/, the rest to train/; nothing is augmented.
"""

import argparse
import os
import shutil
import sys
import tempfile

from prepare.progress_bar import escape_unencodable_output

SIDE = 32  # pixels; the scans are 8 x 8 and a ResNet-50 halves its input five times
HOLDOUT = 5  # every fifth image of a class is for validation
QUALITY = 95  # JPEG


def images():
    """Yields (relative path, JPEG bytes) of all 1,797 images, in a fixed order."""
    import cv2
    from sklearn.datasets import load_digits

    scans = load_digits()
    seen = [0] * 10
    for pixels, digit in zip(scans.images, scans.target):
        number = seen[digit]
        seen[digit] += 1
        grey = (
            (pixels * (255.0 / 16.0)).round().astype("uint8")
        )  # the scans count 0 to 16 dots per cell
        large = cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        _, jpeg = cv2.imencode(
            ".jpg", cv2.cvtColor(large, cv2.COLOR_GRAY2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
        )
        half = "val" if number % HOLDOUT == HOLDOUT - 1 else "train"
        yield os.path.join(half, "digit_%d" % digit, "%04d.jpg" % number), jpeg.tobytes()


def is_complete(folder, wanted):
    """Whether `folder` holds exactly the files of `wanted` (relative path -> bytes) with exactly these bytes."""
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(parent, name)
            want = wanted.get(os.path.relpath(path, folder))
            if want is None:
                return False
            with open(path, "rb") as stream:
                if stream.read() != want:
                    return False
            found += 1
    return found == len(wanted)


def write(folder):
    """Writes the data set to `folder`; returns False if it was there already.

    Raises FileExistsError when something else is there.
    """
    wanted = dict(images())
    folder = os.path.abspath(folder)
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        if os.path.isdir(folder) and is_complete(folder, wanted):
            return False
        raise FileExistsError(
            "%s exists and is not the digits data set: remove it or choose another folder" % folder
        )
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    # A sibling, so that the rename below stays in one file system and the folder appears whole or not at all.
    scratch = tempfile.mkdtemp(
        prefix=os.path.basename(folder) + ".", suffix=".part", dir=os.path.dirname(folder)
    )
    try:
        for path, jpeg in wanted.items():
            path = os.path.join(scratch, path)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "wb") as stream:
                stream.write(jpeg)
        os.chmod(scratch, 0o755)  # mkdtemp makes it private
        os.rename(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def main(argv=None):
    """Returns the exit status: 0 written or already there, 2 something else is there or it cannot be written."""
    parser = argparse.ArgumentParser(
        prog="python -m prepare.digits", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "folder", metavar="DST", help="folder to make; it will hold train/ and val/"
    )
    folder = parser.parse_args(argv).folder
    escape_unencodable_output()
    try:
        written = write(folder)
    except OSError as error:
        print("prepare.digits: %s" % error, file=sys.stderr)
        return 2
    except ImportError as error:
        print(
            "prepare.digits: needs scikit-learn and opencv-python-headless: %s" % error,
            file=sys.stderr,
        )
        return 2
    print("%s: 10 classes, 1,797 images%s" % (folder, "" if written else " (already there)"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
