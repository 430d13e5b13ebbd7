# SPDX-License-Identifier: Apache-2.0
"""Test conversions that are interrupted, run twice at once, fill the disk or meet another error."""

import os
import signal
import subprocess
import sys
import time

import pytest
from support.image_fixtures import (
    REPOSITORY,
    program_stopping_in,
    read_files,
    run_prepare,
    run_program,
    small_dataset,
    write_files,
)

from prepare import imagenet


def test_interrupted(tmp_path):
    write_files(tmp_path / "in", small_dataset(train=3000, val=3))
    arguments = [str(tmp_path / "in"), str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-m", "prepare.imagenet", *arguments],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "out" / "train.part").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "run the same command again" in errors and "Traceback" not in errors
    assert run_prepare(*arguments).returncode == 0


def test_two_at_once(tmp_path):
    write_files(tmp_path / "in", small_dataset())
    arguments = [str(tmp_path / "in"), str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", program_stopping_in("convert", "copy_pieces"), *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
    )
    for _ in ("val", "train"):
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        other = run_prepare(*arguments)
        process.send_signal(signal.SIGCONT)
        assert other.returncode == 3 and "another conversion is writing here" in other.stderr
    assert process.wait() == 0
    assert run_prepare(tmp_path / "out", module="prepare.verify").returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(tmp_path / "disk")],
        stderr=subprocess.PIPE,
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_full_disk(tmp_path, small_disk):
    write_files(tmp_path / "in", small_dataset(train=200, val=3))
    assert run_prepare(tmp_path / "in", tmp_path / "whole").returncode == 0
    size = os.path.getsize(tmp_path / "whole" / "train.rec")
    assert 1000000 < size < 2500000
    (small_disk / "ballast").write_bytes(bytes(3145728 - size // 2))
    result = run_prepare(tmp_path / "in", small_disk / "out")
    assert result.returncode == 4 and "Traceback" not in result.stderr, result.stderr
    lines = result.stderr.splitlines()
    assert all(line.startswith("prepare.imagenet: ") for line in lines)
    assert "needs" in lines[0] and "are free" in lines[0]
    assert not (small_disk / "out").exists()
    # The disk may also become full after the check.
    program = """
import sys
from prepare import imagenet
imagenet.check_space = lambda *_: None
sys.exit(imagenet.main(sys.argv[1:]))
"""
    result = run_program(program, tmp_path / "in", small_disk / "out")
    assert result.returncode == 4
    assert "No space left" in result.stderr and "Traceback" not in result.stderr
    (small_disk / "ballast").unlink()
    again = run_prepare(tmp_path / "in", small_disk / "out")
    assert again.returncode == 0, again.stderr
    assert read_files(small_disk / "out") == read_files(tmp_path / "whole")


def test_an_unexpected_error_has_an_exit_status_of_its_own(tmp_path, monkeypatch, capsys):
    """Python would exit with 1, which means bad archives to the data pod."""

    def raise_unexpected_error(arguments):
        raise RuntimeError("no more")

    monkeypatch.setattr(imagenet, "run", raise_unexpected_error)
    assert imagenet.main([str(tmp_path), str(tmp_path / "out")]) == 70
    assert "RuntimeError: no more" in capsys.readouterr().err
