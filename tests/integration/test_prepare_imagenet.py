# SPDX-License-Identifier: Apache-2.0
"""The files that prepare.imagenet writes are identical to im2rec's, from folders and archives."""

import hashlib
import json
import os

import pytest
from support import image_fixtures as images
from support.image_fixtures import MAGIC, jpeg

pytest.importorskip("mxnet")


def check_same_as_im2rec(tmp_path, source, *options):
    result = images.run_prepare(source, tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    images.run_im2rec(source, tmp_path / "reference")
    assert images.read_files(tmp_path / "out") == images.read_files(tmp_path / "reference")


def unusual_files():
    """Return nested folders, unusual names and sizes, other files, magic words at any offset."""
    files = {}
    for split in ("train", "val"):
        files[f"{split}/b/zz/inner.JPEG"] = jpeg(b"nested")
        files[f"{split}/b/zz.png"] = b"\x89PNG\r\n\x1a\n....IEND\xaeB`\x82"
        files[f"{split}/b/really a png.JPEG"] = b"\x89PNG\r\n\x1a\n123IEND\xaeB`\x82"
        files[f"{split}/b-/1.jpg"] = jpeg(b"sorts before b/ as text, after it in a walk")
        files[f"{split}/B/x.JpEg"] = jpeg()
        files[f"{split}/\u00fcml\u00e4ut \U0001f600/caf\u00e9 \u4e2d.jpg"] = jpeg(b"unicode")
        files[f"{split}/with space/a  b .jpg"] = jpeg(b"blanks")
        files[f"{split}/with space/notes.txt"] = b"not an image"
        files[f"{split}/with space/.jpg"] = b"a hidden file without an extension"
        files[f"{split}/{'long' * 60}/{'name' * 60}.jpeg"] = jpeg(b"x")
        for offset in range(9):
            content = jpeg(b"p" * offset + MAGIC + b"q" * (offset // 2))
            files[f"{split}/magic/{offset}.jpg"] = content
        files[f"{split}/magic/many.jpg"] = jpeg(b"pp" + MAGIC * 3 + b"AAAA" + MAGIC)
        files[f"{split}/magic/end.jpg"] = jpeg(b"pp" + MAGIC * 2 + b"qqqq" + b"rr")
    return files


def test_unusual_files(tmp_path):
    images.write_files(tmp_path / "in", unusual_files())
    for split in ("train", "val"):
        outside, inside = tmp_path / "outside", tmp_path / "in" / split
        images.write_files(
            outside,
            {
                f"{split}/1.jpg": jpeg(b"linked folder"),
                f"{split}file.jpg": jpeg(b"linked file"),
            },
        )
        os.symlink(str(outside / split), str(inside / "linked"))
        os.symlink(str(outside / f"{split}file.jpg"), str(inside / "b" / "link.jpg"))
    check_same_as_im2rec(tmp_path, tmp_path / "in")


def test_any_bytes_without_a_check(tmp_path):
    contents = [
        b"",
        b"a",
        MAGIC,
        MAGIC * 2,
        b"A" + MAGIC + b"B",
        b"AAAA" + MAGIC + b"BBBBB",
        MAGIC + b"AAAA" + MAGIC * 2 + b"BB",
    ]
    files = {}
    for split in ("train", "val"):
        for number, content in enumerate(contents):
            files[f"{split}/c{number % 2}/{number}.jpg"] = content
        files[f"{split}/at the top.png"] = b"gets label 0"
    images.write_files(tmp_path / "in", files)
    check_same_as_im2rec(tmp_path, tmp_path / "in", "--check=none")


def test_many_pieces_any_workers(tmp_path):
    images.write_files(tmp_path / "in", images.small_dataset(train=400, val=3))
    check_same_as_im2rec(tmp_path, tmp_path / "in", "--workers=1")
    result = images.run_prepare(tmp_path / "in", tmp_path / "other", "--workers=7")
    assert result.returncode == 0, result.stderr
    assert images.read_files(tmp_path / "other") == images.read_files(tmp_path / "out")


@pytest.mark.parametrize("program", ["gnutar", "bsdtar", "python"])
@pytest.mark.parametrize("tar_format", ["ustar", "gnu", "pax"])
def test_archives_give_the_same_records_as_folders(tmp_path, program, tar_format):
    if program not in images.tar_programs():
        pytest.skip(f"{program} is not installed")
    files = images.small_dataset()
    files["train/n01440764/n01440764_99.JPEG"] = jpeg(b"pp" + MAGIC * 3)
    if tar_format != "ustar":
        files[f"train/n01440764/{'long' * 40}.JPEG"] = jpeg(b"a long name")
        files["train/n01440764/\u00fc\u4e2d.JPEG"] = jpeg(b"unicode")
    images.write_files(tmp_path / "folders", files)
    images.write_official_archives(tmp_path / "folders", tmp_path / "archives", program, tar_format)
    for source in ("folders", "archives"):
        result = images.run_prepare(tmp_path / source, tmp_path / f"from {source}")
        assert result.returncode == 0, result.stderr
    from_archives = images.read_files(tmp_path / "from archives")
    assert from_archives == images.read_files(tmp_path / "from folders")


def test_manifest(tmp_path):
    images.write_files(tmp_path / "in", images.small_dataset())
    assert images.run_prepare(tmp_path / "in", tmp_path / "out").returncode == 0
    manifest = json.loads((tmp_path / "out" / "train.json").read_text())
    assert manifest["format"] == "mxresnet-recordio"
    assert manifest["version"] == 2
    assert manifest["complete"] is True
    assert manifest["examples"] == 21
    assert manifest["classes"][1] == {"name": "n01443537", "label": 1, "examples": 7}
    for name, facts in manifest["files"].items():
        content = (tmp_path / "out" / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest["skipped"] == []
    assert sorted(os.listdir(str(tmp_path / "out"))) == sorted(
        split + suffix
        for split in ("train", "val")
        for suffix in (".rec", ".idx", ".lst", ".sums", ".json")
    )


@pytest.mark.parametrize("module", ["prepare.imagenet", "prepare.verify"])
def test_help_lists_the_exit_statuses(module):
    result = images.run_prepare("--help", module=module)
    assert result.returncode == 0
    lines = result.stdout.split("exit status:\n")[1].splitlines()
    statuses = [line.split()[0] for line in lines]
    expected = ["0", "1", "2", "3", "4", "70", "130"]
    assert statuses == expected
