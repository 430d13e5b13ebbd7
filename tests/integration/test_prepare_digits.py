# SPDX-License-Identifier: Apache-2.0
"""The built-in data set: complete, stratified, repeatable, never half there."""

import os
import subprocess
import sys

import pytest
from support import image_trees as trees

pytest.importorskip("sklearn")
pytest.importorskip("cv2")


def test_digits(tmp_path):
    result = trees.prepare(tmp_path / "digits", module="prepare.digits")
    assert result.returncode == 0, result.stderr
    counts = {
        half: {
            name: len(os.listdir(str(tmp_path / "digits" / half / name)))
            for name in os.listdir(str(tmp_path / "digits" / half))
        }
        for half in ("train", "val")
    }
    assert sum(counts["train"].values()) + sum(counts["val"].values()) == 1797
    assert (
        sorted(counts["train"])
        == sorted(counts["val"])
        == ["digit_%d" % digit for digit in range(10)]
    )
    for name, count in counts["val"].items():
        assert count == (count + counts["train"][name]) // 5
    import cv2

    image = cv2.imread(str(tmp_path / "digits" / "train" / "digit_0" / "0000.jpg"))
    assert image.shape == (32, 32, 3)
    assert "already there" in trees.prepare(tmp_path / "digits", module="prepare.digits").stdout
    (tmp_path / "digits" / "train" / "digit_0" / "0000.jpg").write_bytes(b"another")
    result = trees.prepare(tmp_path / "digits", module="prepare.digits")
    assert result.returncode == 2 and "is not the digits data set" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_nothing_is_left_of_a_failure(tmp_path):
    program = """
import sys
from prepare import digits
digits.os.rename = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
sys.exit(digits.main(sys.argv[1:]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "digits")],
        cwd=trees.REPOSITORY,
        stderr=subprocess.PIPE,
    )
    assert result.returncode == 2 and os.listdir(str(tmp_path)) == []


def test_any_folder_can_be_printed(tmp_path):
    from support import image_trees as trees

    odd = os.fsdecode(os.fsencode(str(tmp_path)) + b"/digits\xe9")
    result = trees.prepare(
        odd, module="prepare.digits", env=dict(os.environ, PYTHONIOENCODING="utf-8:strict")
    )
    assert result.returncode == 0 and "digits\\udce9: 10 classes" in result.stdout, result.stderr
