# SPDX-License-Identifier: Apache-2.0
"""Test storage that fails during a conversion: status 4, no image is blamed, resuming works."""

import os
import shutil

import pytest
from support.image_fixtures import (
    read_files,
    run_prepare,
    run_program,
    small_dataset,
    write_class_archives,
    write_files,
)

# prepare.imagenet with small pieces that runs the statements FAULT when CONDITION becomes true.
PROGRAM = """
import errno, os, sys
from prepare import convert, image_reader, imagenet, plan, record_writer
plan.PIECE_BYTES, record_writer.STAGE_BYTES = 20000, 65536
image_reader.ImageReader.MAX_OPEN_ARCHIVES = MAX_OPEN
build_piece, pieces = convert.build_piece, []
def inject_fault(plan, *arguments):
    pieces.append(plan.prefix)
    if CONDITION:
        FAULT
    return build_piece(plan, *arguments)
convert.build_piece = inject_fault
sys.exit(imagenet.main(sys.argv[1:]))
"""
THIRD_TRAINING_PIECE = 'pieces.count("train") == 3'
FIRST_PIECE = 'pieces == ["val"]'


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the output of a conversion without faults."""
    folder = tmp_path_factory.mktemp("whole")
    write_files(folder / "in", small_dataset(train=20, val=3))
    assert run_prepare(folder / "in", folder / "out").returncode == 0
    return read_files(folder / "out")


@pytest.fixture
def source(tmp_path):
    write_files(tmp_path / "in", small_dataset(train=20, val=3))
    return tmp_path / "in"


def run_with_fault(fault, *arguments, condition=THIRD_TRAINING_PIECE, max_open=64):
    """Run a conversion that executes the statements `fault` before it reads a certain piece."""
    program = PROGRAM.replace("CONDITION", condition).replace("MAX_OPEN", str(max_open), 2)
    program = program.replace("FAULT", "\n        ".join(fault.splitlines()) or "pass")
    return run_program(program, *arguments, "--workers=1")
