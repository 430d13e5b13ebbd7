# SPDX-License-Identifier: Apache-2.0
"""Read the classes of the validation images from label files.

They come from the ImageNet devkit, a shell script that moves the images (valprep.sh) or a text file
with one synset a line.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import shlex
import stat
from typing import Dict, Iterable, List, Optional, Sequence, Set, Tuple

from prepare.devkit import is_devkit, read_train_counts, read_validation_synsets
from prepare.devkit_files import files_read
from prepare.file_state import unchanged_while_read
from prepare.listing import SourceError
from prepare.regular_file import check_regular, open_regular
from prepare.storage_errors import name_in_errors

LABEL_FILE_NAME = re.compile(
    r"ILSVRC2012_devkit_t12(\.tar\.gz)?|valprep.*\.sh|.*(synset|val).*labels.*\.txt", re.IGNORECASE
)
OFFICIAL_NAME = re.compile(r"ILSVRC2012_val_([0-9]{8})\.\w+")
SYNSET = re.compile(r"[^/\s]+")
BYTE_ORDER_MARK = "\ufeff"
MAX_LABEL_FILE_BYTES = 64 << 20  # the labels of ImageNet have 2 MB


def is_label_file_name(name: str) -> bool:
    """Return whether a file of this name in the source folder is read for validation labels."""
    return LABEL_FILE_NAME.fullmatch(name) is not None


def check_label_path(path: str) -> None:
    """Raise NotRegularFileError unless `path` is a file or a folder, or another OSError.

    A conversion reads the labels more than once, which a pipe does not allow.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISDIR(mode):
        check_regular(mode, path)


def image_number(name: str) -> Optional[int]:
    """Return the number in an official image name, such as 7 of ILSVRC2012_val_00000007.JPEG.

    Return None for any other name.
    """
    match = OFFICIAL_NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def image_numbers(names: Iterable[str]) -> Dict[str, int]:
    """Return {name: number} of those of the names that are official."""
    numbers = {name: image_number(name) for name in names}
    return {name: number for name, number in numbers.items() if number is not None}


def natural_key(name: str) -> List[Tuple[str, int]]:
    """Return a sort key by which 9.jpg comes before 10.jpg, and capitals make no difference."""
    parts = re.split(r"([0-9]+)", name.casefold())
    numbers = [int(part) for part in parts[1::2]] + [0]
    return list(zip(parts[::2], numbers))


class LabelFile:
    """The content of one file: classes by image name, or classes in the order of the images."""

    def __init__(
        self,
        path: str,
        by_name: Optional[Dict[str, str]] = None,
        in_order: Sequence[str] = (),
    ) -> None:
        """Hold the content of a file.

        Args:
            path: path of the file, for messages.
            by_name: {image name: class}, or None.
            in_order: the class of each image, in the order of image numbers or names.
        """
        self.path, self._by_name, self._in_order = path, by_name, in_order

    def classes(self) -> Set[str]:
        """Return the classes that the file contains."""
        return set(self._in_order if self._by_name is None else self._by_name.values())

    def identifies(self, name: str) -> bool:
        """Return whether this name alone, without those of the other images, gives the label."""
        return image_number(name) is not None or name in (self._by_name or {})

    def classes_of(self, names: Sequence[str]) -> Dict[str, str]:
        """Return {image name: class}; images without a label here are left out.

        Raises:
            SourceError: the names have no official numbers, and the file has not one line for each
                image, or programs would not agree on the order of the names.
        """
        if self._by_name is not None:
            return {name: self._by_name[name] for name in names if name in self._by_name}
        # Use the numbers where there are any: with positions, one missing image would shift the
        # classes of all later ones.
        numbers = image_numbers(names)
        if numbers:
            return {
                name: self._in_order[number - 1]
                for name, number in numbers.items()
                if 1 <= number <= len(self._in_order)
            }
        if len(names) != len(self._in_order):
            raise SourceError(
                f"{self.path}: has {len(self._in_order)} lines for {len(names)} images: "
                f"it needs one line for each image"
            )
        classes = dict(zip(sorted(names), self._in_order))
        by_value = sorted(names, key=natural_key)
        if classes != dict(zip(by_value, self._in_order)):
            first, second = next(
                pair for pair in zip(sorted(names), by_value) if pair[0] != pair[1]
            )
            raise SourceError(
                f"{self.path}: the order of the images is not clear, because {first} comes before "
                f"{second} as text, but not as a number or without capitals: give the labels as "
                "lines `mv IMAGE CLASS/`"
            )
        return classes

    def missing_images(self, names: Iterable[str]) -> Dict[str, str]:
        """Return {name: class} of the images that have a label here but are not among `names`."""
        names = set(names)
        if self._by_name is not None:
            return {
                name: label for name, label in sorted(self._by_name.items()) if name not in names
            }
        found = set(image_numbers(names).values())  # not names: their extensions may differ
        if names and not found:
            return {}  # the labels are in the order of the names, so there is one for each
        return {
            f"ILSVRC2012_val_{number:08d}.JPEG": label
            for number, label in enumerate(self._in_order, 1)
            if number not in found
        }


def read_label_file(path: str) -> LabelFile:
    """Read a label file of any kind, recognized by its content, or an unpacked devkit folder.

    Raises:
        SourceError: the content is malformed.
        OSError: the file cannot be read, or has changed while it was read.
    """
    with unchanged_while_read(files_read(path)):
        return parse_label_file(path)


def parse_label_file(path: str) -> LabelFile:
    """Read a label file that may change meanwhile; errors as of `read_label_file`."""
    if is_devkit(path):
        return LabelFile(path, in_order=read_validation_synsets(path))
    lines = [line for line in read_lines(path) if line]
    if any(line.startswith("mv ") for line in lines):
        return LabelFile(path, by_name=parse_moves(path, lines))
    lines = [line for line in lines if not line.startswith("#")]
    malformed = [line for line in lines if not (SYNSET.fullmatch(line) and line.isprintable())]
    if malformed or not lines:
        fault = repr(malformed[0]) if malformed else "it is empty"
        raise SourceError(f"{path}: not a list with one synset a line: {fault}")
    return LabelFile(path, in_order=lines)


def read_lines(path: str) -> List[str]:
    """Return the lines of a text file without the white space around them.

    The text may be UTF-8, or UTF-16 with the byte order mark that Windows' programs write.

    Raises:
        SourceError: the file is no text, or too large.
        OSError: the file cannot be read.
    """
    with open_regular(path) as stream, name_in_errors(path):
        content = stream.read(MAX_LABEL_FILE_BYTES + 1)
    if len(content) > MAX_LABEL_FILE_BYTES:
        raise SourceError(
            f"{path}: more than {MAX_LABEL_FILE_BYTES >> 20} MiB, too large for labels"
        )
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = content.decode("utf-16" if is_utf16 else "utf-8")
    except UnicodeDecodeError:
        raise SourceError(f"{path}: neither a devkit archive nor a text file of labels") from None
    lines = io.StringIO(text, newline=None)  # a line may end with a carriage return
    return [line.replace(BYTE_ORDER_MARK, "").strip() for line in lines]


def parse_moves(path: str, lines: Iterable[str]) -> Dict[str, str]:
    """Return {image name: class} of the lines `mv IMAGE CLASS/` of a shell script.

    Args:
        path: path of the script, for messages.
        lines: its lines; those without an `mv` command are ignored.

    Raises:
        SourceError: an `mv` command is malformed, or two of them disagree.
    """
    classes: Dict[str, str] = {}
    for line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # an unterminated quotation
            words = line.split()[:1]
        if not words or words[0] != "mv":
            continue
        target = words[-1].rstrip("/")
        if len(words) != 3 or "/" in target or not target.strip():
            raise SourceError(f"{path}: not a line `mv IMAGE CLASS/`: {line}")
        name = os.path.basename(words[1])
        if classes.setdefault(name, target) != target:
            raise SourceError(f"{path}: moves {name} to {classes[name]} and to {target}")
    return classes


def train_counts(paths: Iterable[str]) -> Dict[str, int]:
    """Return {synset: number of training images} from the first devkit that contains them.

    Args:
        paths: label files of any kind.

    Returns:
        The counts; empty when no file contains them.

    Raises:
        SourceError: a devkit is malformed.
    """
    for path in paths:
        if is_devkit(path):
            counts = read_train_counts(path)
            if counts is not None:
                return counts
    return {}


def read_label_files(paths: Sequence[str]) -> List[LabelFile]:
    """Read label files of any kind.

    Raises:
        SourceError: one or more are malformed; all of them are named.
        OSError: a file cannot be read.
    """
    label_files: List[LabelFile] = []
    messages: List[str] = []
    for path in paths:
        try:
            label_files.append(read_label_file(path))
        except SourceError as error:
            messages += error.messages
    if messages:
        raise SourceError(*messages)
    return label_files
