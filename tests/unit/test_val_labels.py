# SPDX-License-Identifier: Apache-2.0
"""Labels of the validation images: what disagrees, is not there or is damaged is named in one line."""

import os
import random
import shutil
import tarfile
import warnings

import pytest
from support import image_trees as trees

from prepare import val_labels
from prepare.listing import SourceError

CLASSES = ["n01440764", "n01443537", "n02085620"]
TRUTH = [CLASSES[number * 7 % 5 % 3] for number in range(1, 13)]
LISTED = "imagenet_2012_validation_synset_labels.txt"


def val_name(number, extension=".JPEG"):
    return "ILSVRC2012_val_%08d%s" % (number, extension)


@pytest.fixture
def source(tmp_path):
    """Training images in class folders; the validation images stand in one folder."""
    files = {
        path: content
        for path, content in trees.small(classes=CLASSES).items()
        if path.startswith("train")
    }
    files.update(
        {"val/" + val_name(number + 1): trees.jpeg(b"%d" % number) for number in range(len(TRUTH))}
    )
    trees.write(tmp_path / "in", files)
    return tmp_path / "in"


def one_line(source, *options):
    result = trees.prepare(source, source.parent / "out", *options)
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize("extra", [0, 2])  # the class whose folder is walked first or last
def test_a_name_that_stands_in_two_classes(source, extra):
    trees.write(source, {LISTED: "".join(name + "\n" for name in TRUTH).encode()})
    for number, name in enumerate(TRUTH):
        trees.write(source, {"val/%s/%s" % (name, val_name(number + 1)): trees.jpeg(b"x")})
        (source / "val" / val_name(number + 1)).unlink()
    assert trees.prepare(source, source.parent / "good").returncode == 0
    number = next(number for number, name in enumerate(TRUTH) if name == CLASSES[1])
    trees.write(source, {"val/%s/%s" % (CLASSES[extra], val_name(number + 1)): trees.jpeg(b"x")})
    assert "%s: is in %s, but its class is " % (val_name(number + 1), CLASSES[extra]) in one_line(source)


@pytest.mark.parametrize("extension", [".jpg", ".png", ".jpeg"])
@pytest.mark.parametrize("kind", ["list", "devkit"])
def test_labels_by_number_whatever_the_extension(source, extension, kind):
    if kind == "list":
        trees.write(source, {LISTED: "".join(name + "\n" for name in TRUTH).encode()})
    else:
        trees.devkit(str(source / "ILSVRC2012_devkit_t12.tar.gz"), CLASSES, TRUTH)
    for number in range(1, len(TRUTH) + 1):
        os.rename(
            str(source / "val" / val_name(number)),
            str(source / "val" / val_name(number, extension)),
        )
    result = trees.prepare(source, source.parent / "out")
    assert result.returncode == 0, result.stderr
    rows = [
        line.split("\t") for line in (source.parent / "out" / "val.lst").read_text().splitlines()
    ]
    assert {path: float(label) for _, label, path in rows} == {
        "%s/%s" % (name, val_name(at + 1, extension)): float(CLASSES.index(name))
        for at, name in enumerate(TRUTH)
    }
    shutil.rmtree(str(source.parent / "out"))
    (source / "val" / val_name(3, extension)).unlink()
    result = trees.prepare(source, source.parent / "out")
    assert (
        result.returncode == 1
        and result.stderr.count("does not exist") == 1
        and val_name(3) in result.stderr
    )


def damage(content, seed):
    """A few bytes changed, or the end cut off."""
    chance, content = random.Random(seed), bytearray(content)
    if seed % 4 == 0:
        return bytes(content[: chance.randrange(len(content))])
    for _ in range(chance.choice([1, 3, 20])):
        content[chance.randrange(len(content))] = chance.randrange(256)
    return bytes(content)


def look(path):
    """Reads labels that may be damaged; whether that was noticed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # numpy's and scipy's, about odd numbers in a damaged table
            val_labels.read_label_file(str(path))
            val_labels.train_counts([str(path)])
        return False
    except SourceError as error:
        assert "\n" not in str(error)
        return True


@pytest.mark.parametrize("form", ["gz", "xz", "bz2"])
def test_damaged_devkit(tmp_path, form):
    """Damage is noticed, or it is in a place that says nothing of the labels."""
    pytest.importorskip("scipy")
    truth = random.Random(7).choices(CLASSES, k=30000)
    trees.devkit(str(tmp_path / "whole.tar.gz"), CLASSES, truth)
    with tarfile.open(str(tmp_path / "whole.tar.gz")) as tar:
        tar.extractall(str(tmp_path))
    with tarfile.open(str(tmp_path / "packed"), "w:" + form) as tar:
        tar.add(str(tmp_path / "ILSVRC2012_devkit_t12"), "ILSVRC2012_devkit_t12")
    content = (tmp_path / "packed").read_bytes()
    names = ["ILSVRC2012_val_%08d.JPEG" % (at + 1) for at in range(len(truth))]
    for seed in range(60):
        (tmp_path / "damaged").write_bytes(damage(content, seed))
        if not look(tmp_path / "damaged"):
            assert (
                list(val_labels.read_label_file(str(tmp_path / "damaged")).classes_of(names).values()) == truth
            )


@pytest.mark.parametrize("place", [0, 100, 126, 128, 132, 136, 137, 160, "half", "end"])
@pytest.mark.parametrize("way", ["cut", "overwritten"])
def test_damaged_meta(tmp_path, place, way):
    """Places that scipy notices by itself: on others of an uncompressed file it may crash."""
    pytest.importorskip("scipy")
    from scipy.io import loadmat, savemat

    trees.devkit(str(tmp_path / "whole.tar.gz"), CLASSES, TRUTH)
    with tarfile.open(str(tmp_path / "whole.tar.gz")) as tar:
        tar.extractall(str(tmp_path))
    meta = tmp_path / "ILSVRC2012_devkit_t12" / "data" / "meta.mat"
    savemat(
        str(meta), {"synsets": loadmat(str(meta))["synsets"]}, do_compression=True
    )  # as the real one is
    assert not look(meta.parent.parent)
    content = meta.read_bytes()
    at = {"half": len(content) // 2, "end": len(content) - 20}.get(place, place)
    meta.write_bytes(content[:at] + (b"" if way == "cut" else b"\xff" * 12 + content[at + 12 :]))
    assert look(meta.parent.parent) or (
        way == "overwritten" and place in (0, 100)
    )  # only text stands there


def test_a_damaged_devkit_is_one_line(source):
    path = source / "ILSVRC2012_devkit_t12.tar.gz"
    trees.devkit(str(path), CLASSES, random.Random(7).choices(CLASSES, k=30000))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 60] = bytes(60)
    path.write_bytes(bytes(content))
    assert "prepare.imagenet: %s: " % path in one_line(source)
