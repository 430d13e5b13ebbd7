# SPDX-License-Identifier: Apache-2.0
"""Fixtures for several test files: data sets made by the project's own commands."""

import pathlib
import shutil

import pytest
from support.commands import python


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The built-in data set as records, made by the project's own commands."""
    folder = tmp_path_factory.mktemp("digits")
    for arguments in (
        ["prepare.digits", folder / "images"],
        ["prepare.imagenet", folder / "images", folder / "records"],
    ):
        done = python("-m", *arguments)
        assert done.returncode == 0, done.stderr
    return folder / "records"


@pytest.fixture(scope="session")
def few(digits, tmp_path_factory):
    """100 training and 47 validation images of the built-in data set: quick, and nothing divides 47."""
    folder = tmp_path_factory.mktemp("few")
    for part, count in (("train", 10), ("val", 5)):
        for label in sorted((digits.parent / "images" / part).iterdir()):
            target = folder / "images" / part / label.name
            target.mkdir(parents=True)
            images = sorted(label.iterdir())[
                : 2 if (part, label.name) == ("val", "digit_9") else count
            ]
            for image in images:
                shutil.copy(image, target)
    done = python("-m", "prepare.imagenet", folder / "images", folder / "records")
    assert done.returncode == 0, done.stderr
    return folder / "records"


@pytest.fixture
def copied(digits, tmp_path):
    """A copy of the data set to damage."""
    return pathlib.Path(shutil.copytree(digits, tmp_path / "records"))
