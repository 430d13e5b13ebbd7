# SPDX-License-Identifier: Apache-2.0
"""Images with unusual ends are kept if training can decode them; other problems are collected."""

import json
import os

import pytest
from support import image_fixtures as images

from prepare.decode_process import DECODED, FAILED, NOT_TRIED
from prepare.decoder import Decoder

cv2 = pytest.importorskip("cv2")
np = pytest.importorskip("numpy")
CLASSES = ("n01", "n02")
COUNT_READS = """
import sys
from prepare import image_reader, imagenet, pieces, plan
plan.PIECE_BYTES = 20000
reads, read = [], image_reader.ImageReader.read
def count_and_read(self, record, *arguments):
    reads.append(self._plan.paths[record])
    return read(self, record, *arguments)
image_reader.ImageReader.read = count_and_read
status = imagenet.main(sys.argv[1:])
print("reads:", len(reads))
sys.exit(status)
"""


def picture(seed, extension=".jpg", *options):
    pixels = np.random.RandomState(seed).randint(0, 256, (60, 80, 3)).astype(np.uint8)
    encoded, data = cv2.imencode(extension, cv2.GaussianBlur(pixels, (9, 9), 3), options)
    assert encoded
    return data.tobytes()


JPEG, PNG = picture(0), picture(0, ".png")
PROGRESSIVE = picture(0, ".jpg", cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
RESTARTS = picture(0, ".jpg", cv2.IMWRITE_JPEG_RST_INTERVAL, 2)
TABLE = JPEG.index(b"\xff\xdb")
ORDINARY = {
    "fill_bytes": JPEG[:TABLE] + b"\xff" * 5 + JPEG[TABLE:],
    "junk_before_end": JPEG[:-2] + b"junk" + JPEG[-2:],
    "progressive": PROGRESSIVE,
    "png": PNG,
}
UNUSUAL = {
    "no_end": (JPEG[:-2], "a JPEG without its end marker; DALI decodes it"),
    "half_an_end": (JPEG[:-1], "a JPEG without its end marker; DALI decodes it"),
    "restarts_no_end": (RESTARTS[:-2], "a JPEG without its end marker; DALI decodes it"),
    "junk_after": (JPEG + b"junk", "a JPEG with 4 bytes after its end marker; DALI decodes it"),
    "png_junk": (PNG + b"\0" * 9, "a PNG with 9 bytes after its end; DALI decodes it"),
    "webp": (picture(0, ".webp"), "begins with 52 49 46 46"),
    "bmp": (picture(0, ".bmp"), "begins with 42 4d"),
}
BAD = {
    "half": (JPEG[: len(JPEG) // 2], "truncated: a JPEG without its end marker; its last pixels"),
    "3_bytes_less": (JPEG[:-3], "its last pixels are missing"),
    "zeros_at_end": (JPEG[:-300] + bytes(300), "its last pixels are missing"),
    "half_and_zeros": (JPEG[: len(JPEG) // 2] + bytes(8192), "truncated: a JPEG without its end"),
    "progressive_no_end": (PROGRESSIVE[:-2], "DALI cannot decode it"),
    "progressive_half": (PROGRESSIVE[: len(PROGRESSIVE) // 2], "DALI cannot decode it"),
    "headers": (JPEG[: TABLE + 30], "truncated: a JPEG"),
    "png_half": (PNG[: len(PNG) // 2], "truncated: a PNG"),
    "gif": (b"GIF89a" + bytes(50), "DALI cannot decode it: GIF"),
    "zeros": (bytes(5000), "neither a JPEG nor a PNG"),
    "junk_before": (b"xx" + JPEG, "neither a JPEG nor a PNG"),
}


@pytest.fixture
def source(tmp_path):
    files = {}
    for name in CLASSES:
        files.update({f"train/{name}/{n}.JPEG": picture(n) for n in range(12)})
        files.update({f"val/{name}/{n}.JPEG": picture(n) for n in range(3)})
    images.write_files(tmp_path / "in", files)
    return tmp_path / "in"


def add(source, split, contents):
    files = {f"{split}/n01/{name}.JPEG": content for name, content in contents.items()}
    images.write_files(source, files)


def run_and_count_reads(*arguments):
    result = images.run_program(COUNT_READS, *arguments, "--workers=2")
    return result, int(result.stdout.rsplit("reads:", 1)[1])


def same_as_a_new_conversion(tmp_path, source):
    assert images.run_prepare(source, tmp_path / "new").returncode == 0
    return images.read_files(tmp_path / "new") == images.read_files(tmp_path / "out")


def test_what_dali_decodes_is_kept_counted_and_named(tmp_path, source):
    pytest.importorskip("nvidia.dali")
    pytest.importorskip("mxnet")
    add(source, "train", {**ORDINARY, **{name: image for name, (image, _) in UNUSUAL.items()}})
    result = images.run_prepare(source, tmp_path / "out")
    assert result.returncode == 0 and not result.stderr
    assert f", 0 left out, {len(UNUSUAL)} unusual but kept\n" in result.stdout
    assert "train: kept: 3 of them without an end marker: on a CPU, --dali-roi" in result.stdout
    manifest = json.loads((tmp_path / "out" / "train.json").read_text())
    named = {entry["path"]: entry["description"] for entry in manifest["unusual"]}
    assert sorted(named) == sorted(f"n01/{name}.JPEG" for name in UNUSUAL)
    for name, (_, reason) in UNUSUAL.items():
        assert reason in named[f"n01/{name}.JPEG"]
        assert f"train: kept: n01/{name}.JPEG: " in result.stdout
    images.run_im2rec(source, tmp_path / "reference")
    assert images.read_files(tmp_path / "reference") == images.read_files(tmp_path / "out")
    verified = images.run_prepare(tmp_path / "out", "--against", source, module="prepare.verify")
    assert verified.returncode == 0, verified.stderr


def test_all_that_cannot_be_decoded_is_named_in_both_splits(tmp_path, source):
    pytest.importorskip("nvidia.dali")
    add(source, "train", {name: image for name, (image, _) in BAD.items()})
    add(source, "val", {"half": BAD["half"][0]})
    result = images.run_prepare(source, tmp_path / "out")
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and len(lines) == len(BAD) + 2, lines
    for name, (_, reason) in [*BAD.items()]:
        assert any(f"train/n01/{name}.JPEG: " in line and reason in line for line in lines), name
    assert any("val/n01/half.JPEG: " in line for line in lines)


def test_what_was_copied_is_used_after_a_fix(tmp_path, source):
    bad = {"a": b"<html>", "z": JPEG[:-9]}
    add(source, "train", bad)
    first, all_reads = run_and_count_reads(source, tmp_path / "out")
    assert first.returncode == 1 and len(first.stderr.splitlines()) == 3
    # Nothing has changed: only the bad images are read.
    again, reads = run_and_count_reads(source, tmp_path / "out")
    assert again.returncode == 1 and reads == len(bad)
    assert again.stderr.splitlines()[:2] == first.stderr.splitlines()[:2]
    add(source, "train", {"a": picture(7)})
    partly, _ = run_and_count_reads(source, tmp_path / "out")
    assert partly.returncode == 1 and "n01/z.JPEG" in partly.stderr
    assert "n01/a.JPEG" not in partly.stderr
    add(source, "train", {"z": picture(8)})
    fixed, reads = run_and_count_reads(source, tmp_path / "out")
    assert fixed.returncode == 0 and reads < all_reads, fixed.stderr
    assert same_as_a_new_conversion(tmp_path, source)


def test_nothing_is_read_again_to_skip_bad_images(tmp_path, source):
    add(source, "train", {"a": b"<html>"})
    assert images.run_prepare(source, tmp_path / "out").returncode == 1
    assert sorted(os.listdir(tmp_path / "out"))[0] == "train.part"
    program = COUNT_READS.replace("plan.PIECE_BYTES = 20000", "")
    skipping = images.run_program(program, source, tmp_path / "out", "--on-error=skip")
    assert skipping.returncode == 0 and "reads: 0\n" in skipping.stdout
    assert not (tmp_path / "out" / "train.part").exists()
    (source / "train" / "n01" / "a.JPEG").unlink()
    # The keys of the others differ, because im2rec numbers all images; their order does, too.
    assert images.run_prepare(source, tmp_path / "new").returncode == 0
    manifest = json.loads((tmp_path / "out" / "train.json").read_text())
    assert [entry["path"] for entry in manifest["skipped"]] == ["n01/a.JPEG"]


def test_a_bad_image_may_also_be_removed(tmp_path, source):
    add(source, "train", {"a": b"<html>"})
    assert images.run_prepare(source, tmp_path / "out").returncode == 1
    (source / "train" / "n01" / "a.JPEG").unlink()
    removed = images.run_prepare(source, tmp_path / "out")
    assert removed.returncode == 0, removed.stderr
    assert same_as_a_new_conversion(tmp_path, source)


def block_packages(folder, *names):
    """Return an environment in which these packages cannot be imported."""
    for name in names:
        images.write_files(folder, {f"{name}/__init__.py": b"raise ModuleNotFoundError"})
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_without_dali_opencv_decodes(tmp_path, source):
    """OpenCV decodes for MXNet's ImageRecordIter, which training uses without DALI."""
    add(source, "val", {"no_end": JPEG[:-2]})
    add(source, "train", {"half": JPEG[: len(JPEG) // 2], "zeros": bytes(99)})
    environment = block_packages(tmp_path / "packages", "nvidia")
    result = images.run_prepare(source, tmp_path / "out", env=environment)
    assert result.returncode == 1
    assert "val: kept: n01/no_end.JPEG: a JPEG without its end marker; OpenCV" in result.stdout
    assert "half.JPEG: truncated: a JPEG without its end marker; its last pix" in result.stderr
    assert "zeros.JPEG: neither a JPEG nor a PNG" in result.stderr


def test_without_a_decoder_whole_headers_suffice(tmp_path, source):
    add(source, "val", {"no_end": JPEG[:-2], "junk": PNG + b"junk"})
    add(source, "train", {"png": PNG[:-4], "zeros": bytes(99), "headers": JPEG[: TABLE + 30]})
    environment = block_packages(tmp_path / "packages", "nvidia", "cv2")
    result = images.run_prepare(source, tmp_path / "out", env=environment)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 4
    assert ", 2 unusual but kept" in result.stdout
    assert result.stdout.count("not decoded, because neither DALI nor OpenCV is installed") == 2
    with_decode = images.run_prepare(source, tmp_path / "x", "--check=decode", env=environment)
    assert with_decode.returncode == 2 and "needs NVIDIA DALI" in with_decode.stderr


def test_an_image_that_ends_the_decoder(tmp_path, monkeypatch):
    """A library may crash on damaged data; the other images are decoded nevertheless."""
    fake = b"IMREAD_COLOR, error = 1, ValueError\ndef imdecode(image, flags):\n"
    fake += b"    import os, signal\n    if image[0] == 75: os.kill(os.getpid(), signal.SIGSEGV)\n"
    fake += b"    return None if image[0] == 78 else image\n"
    images.write_files(
        tmp_path, {"cv2.py": fake, "nvidia/__init__.py": b"raise ModuleNotFoundError"}
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    decoder = Decoder()
    contents = [b"good", b"KILL", b"NO", b"good"]
    verdicts = decoder.check([memoryview(content) for content in contents], [False] * 4)
    decoder.close()
    assert [result for result, _ in verdicts] == [DECODED, FAILED, FAILED, DECODED]
    assert "signal 11" in verdicts[1][1] and NOT_TRIED not in dict(verdicts)
