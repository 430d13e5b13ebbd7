# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by test files: data sets that the project's own commands have prepared."""

import pathlib
import shutil
import signal

import pytest
from support.build_once import build_once
from support.commands import python
from support.cudnn_bn import build_cpu_library, install_cuda_wheels, load_cpu_library


def run_prepare(*arguments):
    done = python("-m", *arguments)
    assert done.returncode == 0, done.stderr


# Programs that the tests start inherit ignored signals, and the tests send these signals to them. A
# shell ignores SIGINT and SIGQUIT for its background commands, nohup ignores SIGHUP.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The folder of the digits data set as RecordIO files; its images are in ../images."""

    def build(folder):
        run_prepare("prepare.digits", folder / "images")
        run_prepare("prepare.imagenet", folder / "images", folder / "records")

    return build_once(tmp_path_factory, "digits", build) / "records"


@pytest.fixture(scope="session")
def few(digits, tmp_path_factory):
    """A subset of the digits: 100 training images, and 47 (a prime number) for validation."""

    def build(folder):
        for part, count in (("train", 10), ("val", 5)):
            for label in sorted((digits.parent / "images" / part).iterdir()):
                target = folder / "images" / part / label.name
                target.mkdir(parents=True)
                selected = 2 if (part, label.name) == ("val", "digit_9") else count
                for image in sorted(label.iterdir())[:selected]:
                    shutil.copy(image, target)
        run_prepare("prepare.imagenet", folder / "images", folder / "records")

    return build_once(tmp_path_factory, "few", build) / "records"


@pytest.fixture
def copied(digits, tmp_path):
    """A copy of the digits data set that a test may change."""
    return pathlib.Path(shutil.copytree(digits, tmp_path / "records"))


@pytest.fixture(scope="session")
def cpu_library(tmp_path_factory):
    """The CPU library of cudnn_bn, built with its command and loaded into this process."""
    build_once(tmp_path_factory, "cpu_library", lambda folder: build_cpu_library())
    load_cpu_library()


@pytest.fixture(scope="session")
def cuda_wheels():
    """A folder with the headers and libraries of cuDNN 8 and CUDA 11."""
    return install_cuda_wheels()
