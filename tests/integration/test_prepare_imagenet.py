# SPDX-License-Identifier: Apache-2.0
"""The files that prepare.imagenet writes are im2rec's, whichever way the images are kept."""

import json
import os

import pytest
from support import image_trees as trees
from support.image_trees import MAGIC, jpeg

pytest.importorskip("mxnet")


def same_as_im2rec(tmp_path, source, *options):
    result = trees.prepare(source, tmp_path / "out", *options)
    assert result.returncode == 0, result.stderr
    trees.im2rec(source, tmp_path / "reference")
    assert trees.contents(tmp_path / "out") == trees.contents(tmp_path / "reference")


def odd_tree():
    """Nested folders, odd names, odd sizes, magic numbers at all alignments, other files beside the images."""
    files = {}
    for half in ("train", "val"):
        files[half + "/b/zz/inner.JPEG"] = jpeg(b"nested")
        files[half + "/b/zz.png"] = b"\x89PNG\r\n\x1a\n....IEND\xaeB`\x82"
        files[half + "/b/really a png.JPEG"] = b"\x89PNG\r\n\x1a\n123IEND\xaeB`\x82"
        files[half + "/b-/1.jpg"] = jpeg(b"sorts before b/ as text, after it in a walk")
        files[half + "/B/x.JpEg"] = jpeg()
        files[half + "/\u00fcml\u00e4ut \U0001f600/caf\u00e9 \u4e2d.jpg"] = jpeg(b"unicode")
        files[half + "/with space/a  b .jpg"] = jpeg(b"blanks")
        files[half + "/with space/notes.txt"] = b"not an image"
        files[half + "/with space/.jpg"] = b"a hidden file without an extension"
        files[half + "/" + "long" * 60 + "/" + "name" * 60 + ".jpeg"] = jpeg(b"x")
        for at in range(9):
            files[half + "/magic/%d.jpg" % at] = jpeg(b"p" * at + MAGIC + b"q" * (at // 2))
        files[half + "/magic/many.jpg"] = jpeg(b"pp" + MAGIC * 3 + b"AAAA" + MAGIC)
        files[half + "/magic/end.jpg"] = jpeg(b"pp" + MAGIC * 2 + b"qqqq" + b"rr")
    return files


def test_odd_tree(tmp_path):
    trees.write(tmp_path / "in", odd_tree())
    for half in ("train", "val"):
        outside = tmp_path / "outside"
        trees.write(
            outside,
            {half + "/1.jpg": jpeg(b"linked folder"), half + "file.jpg": jpeg(b"linked file")},
        )
        os.symlink(str(outside / half), str(tmp_path / "in" / half / "linked"))
        os.symlink(
            str(outside / (half + "file.jpg")), str(tmp_path / "in" / half / "b" / "link.jpg")
        )
    same_as_im2rec(tmp_path, tmp_path / "in")


def test_any_bytes_without_a_check(tmp_path):
    files = {}
    for half in ("train", "val"):
        for number, payload in enumerate(
            [
                b"",
                b"a",
                MAGIC,
                MAGIC * 2,
                b"A" + MAGIC + b"B",
                b"AAAA" + MAGIC + b"BBBBB",
                MAGIC + b"AAAA" + MAGIC * 2 + b"BB",
            ]
        ):
            files["%s/c%d/%d.jpg" % (half, number % 2, number)] = payload
        files[half + "/at the top.png"] = b"gets label 0"
    trees.write(tmp_path / "in", files)
    same_as_im2rec(tmp_path, tmp_path / "in", "--check=none")


def test_many_pieces_any_workers(tmp_path):
    trees.write(tmp_path / "in", trees.small(train=400, val=3))
    same_as_im2rec(tmp_path, tmp_path / "in", "--workers=1")
    result = trees.prepare(tmp_path / "in", tmp_path / "other", "--workers=7")
    assert result.returncode == 0, result.stderr
    assert trees.contents(tmp_path / "other") == trees.contents(tmp_path / "out")


@pytest.mark.parametrize("program", ["gnutar", "bsdtar", "python"])
@pytest.mark.parametrize("form", ["ustar", "gnu", "pax"])
def test_archives_give_what_folders_give(tmp_path, program, form):
    if program not in trees.programs():
        pytest.skip("%s is not installed" % program)
    files = trees.small()
    files["train/n01440764/n01440764_99.JPEG"] = jpeg(b"pp" + MAGIC * 3)
    if form != "ustar":
        files["train/n01440764/" + "long" * 40 + ".JPEG"] = jpeg(b"a long name")
        files["train/n01440764/\u00fc\u4e2d.JPEG"] = jpeg(b"unicode")
    trees.write(tmp_path / "in", files)
    trees.official(tmp_path / "in", tmp_path / "archives", program, form)
    for source, target in (("in", "from folders"), ("archives", "from archives")):
        result = trees.prepare(tmp_path / source, tmp_path / target)
        assert result.returncode == 0, result.stderr
    assert trees.contents(tmp_path / "from archives") == trees.contents(tmp_path / "from folders")


def test_manifest(tmp_path):
    trees.write(tmp_path / "in", trees.small())
    assert trees.prepare(tmp_path / "in", tmp_path / "out").returncode == 0
    with open(str(tmp_path / "out" / "train.json")) as stream:
        manifest = json.load(stream)
    assert (manifest["format"], manifest["version"], manifest["complete"]) == (
        "mxresnet-recordio",
        1,
        True,
    )
    assert manifest["examples"] == 21
    assert manifest["classes"][1] == {"name": "n01443537", "label": 1, "examples": 7}
    for name, facts in manifest["files"].items():
        import hashlib

        content = (tmp_path / "out" / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert manifest["skipped"] == []
    assert sorted(os.listdir(str(tmp_path / "out"))) == sorted(
        half + suffix
        for half in ("train", "val")
        for suffix in (".rec", ".idx", ".lst", ".sums", ".json")
    )
