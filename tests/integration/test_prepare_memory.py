# SPDX-License-Identifier: Apache-2.0
"""A conversion needs little memory whatever the images are, and ends when there is none left."""

import os

import pytest
from support import image_fixtures as images

MAGIC_WORDS = 5 << 20
PEAK = """
import re, sys
from prepare import imagenet
status = imagenet.main(sys.argv[1:])
# Not ru_maxrss, which includes the process that started this one.
print("peak MiB:", int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) >> 10)
sys.exit(status)
"""
LIMIT_MIB = 256  # the documented limit is 512 + 16 a worker


def peak_mib(source, folder, *options):
    result = images.run_program(PEAK, source, folder, *options)
    assert result.returncode == 0, result.stderr
    return int(result.stdout.rsplit("peak MiB:", 1)[1])


def write_source(folder, *contents):
    files = {f"train/n0/{number}.jpg": content for number, content in enumerate(contents)}
    images.write_files(folder, {**files, "val/n0/0.jpg": images.jpeg()})


def verify(folder, *options):
    result = images.run_prepare(folder, *options, module="prepare.verify")
    assert result.returncode == 0, result.stderr


def read_with_mxnet(path):
    mx = pytest.importorskip("mxnet")
    reader = mx.recordio.MXRecordIO(str(path), "r")
    while (record := reader.read()) is not None:
        header, image = mx.recordio.unpack(record)
        yield header.id, image
    reader.close()


def test_large_images(tmp_path):
    """More than the limit together; several blocks each, with magic words at their edges."""
    block = 4 << 18
    content = bytearray(50 << 20)
    for at in (0, block - 42, block - 46, 2 * block - 42, 7 * block, 7 * block + 4):
        content[at + 2 : at + 6] = images.MAGIC
    contents = [images.jpeg(bytes(content))] * 6
    contents += [images.jpeg(b"xx" + images.MAGIC * 9), images.jpeg(b"small")]
    write_source(tmp_path / "in", *contents)
    assert peak_mib(tmp_path / "in", tmp_path / "out", "--workers=8") < LIMIT_MIB
    for key, image in read_with_mxnet(tmp_path / "out" / "train.rec"):
        assert image == contents[key]
    verify(tmp_path / "out", "--against", tmp_path / "in")


@pytest.mark.parametrize("magic_words", [MAGIC_WORDS, MAGIC_WORDS // 2])
def test_an_image_of_magic_words(tmp_path, magic_words):
    """Each of them is a part of its own: one record that is read twice, and one that is not."""
    image = images.jpeg(b"pp" + images.MAGIC * magic_words)
    write_source(tmp_path / "in", image)
    assert peak_mib(tmp_path / "in", tmp_path / "out") < LIMIT_MIB
    assert list(read_with_mxnet(tmp_path / "out" / "train.rec")) == [(0, image)]
    verify(tmp_path / "out")


def test_a_large_image_that_changes_or_is_bad(tmp_path):
    large = images.jpeg(bytes(20 << 20))
    write_source(tmp_path / "in", large, large[:-3], b"x" * (20 << 20), images.jpeg())
    result = images.run_prepare(tmp_path / "in", tmp_path / "out")
    assert result.returncode == 1
    assert "1.jpg: truncated: a JPEG" in result.stderr
    assert "2.jpg: neither a JPEG nor a PNG" in result.stderr
    program = """
import sys
from prepare import imagenet, large_images
examine = large_images.LargeRecord.examine
def examine_and_change(self, check):
    found = examine(self, check)
    open(self._reader.path(self._record), "ab").write(b"more")
    return found
large_images.LargeRecord.examine = examine_and_change
sys.exit(imagenet.main(sys.argv[1:]))
"""
    changed = images.run_program(program, tmp_path / "in", tmp_path / "x", "--on-error=skip")
    assert changed.returncode == 4 and "has changed since it was listed" in changed.stderr


def test_resumed_with_large_images(tmp_path):
    write_source(tmp_path / "in", *[images.jpeg(bytes(20 << 20))] * 3, b"<html>")
    assert images.run_prepare(tmp_path / "in", tmp_path / "out").returncode == 1
    assert peak_mib(tmp_path / "in", tmp_path / "out", "--on-error=skip") < LIMIT_MIB
    verify(tmp_path / "out", "--against", tmp_path / "in")


@pytest.mark.parametrize("workers", ["0", "70000", "513", "1e3", ""])
def test_number_of_workers_is_limited(tmp_path, workers):
    for module in ("prepare.imagenet", "prepare.verify"):
        arguments = [tmp_path, tmp_path / "out"][: 2 if module == "prepare.imagenet" else 1]
        result = images.run_prepare(*arguments, f"--workers={workers}", module=module)
        assert result.returncode == 2
        assert "must be a whole number from 1 to 512" in result.stderr


@pytest.mark.parametrize("error", ["MemoryError()", 'RuntimeError("can\'t start new thread")'])
def test_no_memory_left_in_a_thread(tmp_path, error):
    images.write_files(tmp_path / "in", images.small_dataset())
    program = f"""
import sys
from prepare import imagenet, pieces
def fail(*arguments):
    raise {error}
pieces.recordio.word_sums = fail
sys.exit(imagenet.main(sys.argv[1:]))
"""
    result = images.run_program(program, tmp_path / "in", tmp_path / "out")
    assert result.returncode == 4 and len(result.stderr.splitlines()) == 1
    assert "not enough memory" in result.stderr and "--workers" in result.stderr
    assert images.run_prepare(tmp_path / "in", tmp_path / "out").returncode == 0
    assert not os.path.exists(tmp_path / "out" / "train.part")
