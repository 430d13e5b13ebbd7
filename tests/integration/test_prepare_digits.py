# SPDX-License-Identifier: Apache-2.0
"""Test that the digits data set is complete, stratified, reproducible and written as a whole."""

import os

import pytest
from support.image_fixtures import run_prepare, run_program

pytest.importorskip("sklearn")
cv2 = pytest.importorskip("cv2")


def test_digits(tmp_path):
    folder = tmp_path / "digits"
    result = run_prepare(folder, module="prepare.digits")
    assert result.returncode == 0, result.stderr
    counts = {
        split: {name: len(os.listdir(folder / split / name)) for name in os.listdir(folder / split)}
        for split in ("train", "val")
    }
    assert sum(counts["train"].values()) + sum(counts["val"].values()) == 1797
    assert sorted(counts["train"]) == sorted(counts["val"]) == [f"digit_{n}" for n in range(10)]
    for name, count in counts["val"].items():
        assert count == (count + counts["train"][name]) // 5
    first_image = folder / "train" / "digit_0" / "0000.jpg"
    assert cv2.imread(str(first_image)).shape == (32, 32, 3)

    assert "already there" in run_prepare(folder, module="prepare.digits").stdout
    first_image.write_bytes(b"another")
    result = run_prepare(folder, module="prepare.digits")
    assert result.returncode == 2 and "is not the digits data set" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_nothing_is_left_after_a_failure(tmp_path):
    program = """
import sys
from prepare import digits
def fail(*_):
    raise OSError(28, "No space left on device")
digits.os.rename = fail
sys.exit(digits.main(sys.argv[1:]))
"""
    result = run_program(program, tmp_path / "digits")
    assert result.returncode == 2 and "No space left" in result.stderr
    assert os.listdir(tmp_path) == []


def test_any_folder_can_be_printed(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/digits\xe9")
    environment = dict(os.environ, PYTHONIOENCODING="utf-8:strict")
    result = run_prepare(folder, module="prepare.digits", env=environment)
    assert result.returncode == 0 and "digits\\udce9: 10 classes" in result.stdout, result.stderr


def test_another_process_is_faster(tmp_path):
    program = """
import sys
from prepare import digits
folder, make = sys.argv[1], digits.tempfile.mkdtemp
def make_both(**options):
    digits.tempfile.mkdtemp = make
    assert digits.write_dataset(folder)
    return make(**options)
digits.tempfile.mkdtemp = make_both
sys.exit(digits.main([folder]))
"""
    result = run_program(program, tmp_path / "digits")
    assert (result.returncode, result.stderr) == (0, "") and "already there" in result.stdout
    assert os.listdir(tmp_path) == ["digits"]
