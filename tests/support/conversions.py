# SPDX-License-Identifier: Apache-2.0
"""Run prepare's commands in this process, which is faster than a process for each."""

from __future__ import annotations

import contextlib
import io
from typing import Dict, List, NamedTuple, Tuple

from prepare import imagenet, verify
from support.image_fixtures import jpeg


class Result(NamedTuple):
    """The exit status of a command and what it printed."""

    status: int
    stdout: str
    stderr: str

    @property
    def lines(self) -> List[str]:
        """Return the lines on standard error."""
        return self.stderr.splitlines()


def run_main(main, *arguments: object) -> Result:
    """Run a command's main function with these arguments."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit_request:  # argparse
            status = exit_request.code
    return Result(status, stdout.getvalue(), stderr.getvalue())


def convert(*arguments: object) -> Result:
    """Run prepare.imagenet."""
    return run_main(imagenet.main, *arguments)


def verify_records(*arguments: object) -> Result:
    """Run prepare.verify."""
    return run_main(verify.main, *arguments)


def official_name(number: int, extension: str = ".JPEG") -> str:
    """Return the name of a validation image of ImageNet."""
    return f"ILSVRC2012_val_{number:08d}{extension}"


def train_files(*classes: str) -> Dict[str, bytes]:
    """Return {path: content} of two training images for each class."""
    return {
        f"train/{name}/{name}_{number}.JPEG": jpeg(f"{name} {number}".encode())
        for name in classes
        for number in range(2)
    }


def flat_val_files(count: int) -> Dict[str, bytes]:
    """Return {path: content} of validation images that are not in class folders."""
    return {f"val/{official_name(n)}": jpeg(f"{n}".encode()) for n in range(1, count + 1)}


def class_val_files(labels: List[str]) -> Dict[str, bytes]:
    """Return {path: content} of validation images in the folders of their classes."""
    return {
        f"val/{label}/{official_name(number)}": jpeg(f"{number}".encode())
        for number, label in enumerate(labels, 1)
    }


def list_rows(path: object) -> Dict[str, float]:
    """Return {path of the image: label} of a .lst file."""
    with open(str(path)) as stream:
        rows: List[Tuple[str, ...]] = [tuple(line.rstrip("\n").split("\t")) for line in stream]
    return {path: float(label) for _, label, path in rows}
