# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by test files: data sets that the project's own commands have prepared."""

import pathlib
import shutil
import signal

import pytest
from support.commands import python
from support.cudnn_bn import install_cuda_wheels


def run_prepare(*arguments):
    done = python("-m", *arguments)
    assert done.returncode == 0, done.stderr


# Programs that the tests start inherit ignored signals, and the tests send these signals to them. A
# shell ignores SIGINT for its background commands, nohup ignores SIGHUP.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The folder of the digits data set as RecordIO files; its images are in ../images."""
    folder = tmp_path_factory.mktemp("digits")
    run_prepare("prepare.digits", folder / "images")
    run_prepare("prepare.imagenet", folder / "images", folder / "records")
    return folder / "records"


@pytest.fixture(scope="session")
def few(digits, tmp_path_factory):
    """A subset of the digits: 100 training images, and 47 (a prime number) for validation."""
    folder = tmp_path_factory.mktemp("few")
    for part, count in (("train", 10), ("val", 5)):
        for label in sorted((digits.parent / "images" / part).iterdir()):
            target = folder / "images" / part / label.name
            target.mkdir(parents=True)
            selected = 2 if (part, label.name) == ("val", "digit_9") else count
            for image in sorted(label.iterdir())[:selected]:
                shutil.copy(image, target)
    run_prepare("prepare.imagenet", folder / "images", folder / "records")
    return folder / "records"


@pytest.fixture
def copied(digits, tmp_path):
    """A copy of the digits data set that a test may change."""
    return pathlib.Path(shutil.copytree(digits, tmp_path / "records"))


@pytest.fixture(scope="session")
def cuda_wheels():
    """A folder with the headers and libraries of cuDNN 8 and CUDA 11."""
    return install_cuda_wheels()
