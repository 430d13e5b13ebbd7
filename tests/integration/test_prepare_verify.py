# SPDX-License-Identifier: Apache-2.0
"""Other people's readers read what was written; prepare.verify names what is damaged."""

import json
import os
import struct

import numpy as np
import pytest
from support import image_trees as trees
from support.image_trees import MAGIC, jpeg


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    files = trees.small(train=30)
    files["train/n01440764/cut.JPEG"] = jpeg(b"pp" + MAGIC * 3 + b"xyz" + MAGIC)
    files["train/n01440764/cut at the end.JPEG"] = jpeg(b"pp" + b"ab" + MAGIC)
    trees.write(folder / "in", files)
    result = trees.prepare(folder / "in", folder / "out")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def damaged(whole, tmp_path):
    """A copy of the output, to damage."""
    import shutil

    shutil.copytree(str(whole / "out"), str(tmp_path / "out"))
    return tmp_path / "out"


def verify(folder, *options, status=0):
    result = trees.prepare(folder, *options, module="prepare.verify")
    assert result.returncode == status and "Traceback" not in result.stderr, result.stderr
    return result.stderr


def listed(folder, half="train"):
    rows = [line.split("\t") for line in (folder / (half + ".lst")).read_text().splitlines()]
    offsets = [
        int(line.split("\t")[1]) for line in (folder / (half + ".idx")).read_text().splitlines()
    ]
    return [
        (int(key), float(label), path, offset) for (key, label, path), offset in zip(rows, offsets)
    ]


@pytest.mark.parametrize("options", [[], ["--fast"], ["--against", None], ["--workers=1"]])
def test_whole(whole, options):
    options = [whole / "in" if option is None else option for option in options]
    assert verify(whole / "out", *options) == ""


@pytest.mark.parametrize("at", [0, 4, 8, 12, 16, 24, 32, 33, 36, -1])
def test_the_damaged_record_is_named(whole, damaged, at):
    """Any flipped bit, in the frame, the header or the image, is pinned to its record."""
    rows = listed(damaged)
    record = 17
    end = rows[record + 1][3]
    place = rows[record][3] + at if at >= 0 else end - 4
    with open(str(damaged / "train.rec"), "r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 0x10]))
    errors = verify(damaged, status=1)
    assert len(errors.splitlines()) == 1
    assert (
        "record %d (key %d, %s, at byte %d)"
        % (record, rows[record][0], rows[record][2], rows[record][3])
        in errors
    )
    assert "record %d (" % record in verify(damaged, "--against", whole / "in", status=1)
    assert (
        "record %d (" % record in verify(damaged, "--fast", status=1 if 0 <= at < 32 else 0)
    ) == (0 <= at < 32)


def test_cut_record_that_is_damaged(damaged):
    record = next(
        number for number, row in enumerate(listed(damaged)) if row[2].endswith("/cut.JPEG")
    )
    offset = listed(damaged)[record][3]
    content = bytearray((damaged / "train.rec").read_bytes())
    second = content.index(struct.pack("<I", 0xCED7230A), offset + 4)
    content[second + 7] ^= 0x20  # its kind: middle becomes last
    (damaged / "train.rec").write_bytes(bytes(content))
    assert "record %d (" % record in verify(damaged, status=1)


def test_missing_end_file_and_manifest(damaged):
    size = os.path.getsize(str(damaged / "train.rec"))
    os.truncate(str(damaged / "train.rec"), size - 10)
    errors = verify(damaged, status=1)
    assert "has %d bytes, not %d" % (size - 10, size) in errors and "record 91 (" in errors
    (damaged / "train.idx").unlink()
    assert "train.idx: is missing" in verify(damaged, status=1)
    (damaged / "train.json").unlink()
    assert "not finished" in verify(damaged, status=3)
    assert "nowhere" in verify(damaged / "nowhere", status=2)


@pytest.mark.parametrize("change", ["swap lines", "another label", "a letter"])
def test_list_and_index_that_disagree(damaged, change):
    lines = (damaged / "val.lst").read_text().splitlines()
    if change == "swap lines":
        lines[0], lines[1] = lines[1], lines[0]
    elif change == "another label":
        key, label, path = lines[0].split("\t")
        lines[0] = "\t".join([key, "%f" % (float(label) + 1), path])
    else:
        lines[0] = "x" + lines[0]
    (damaged / "val.lst").write_text("\n".join(lines) + "\n")
    assert "val." in verify(damaged, status=1)


def test_against_another_source(whole, damaged, tmp_path):
    trees.write(
        tmp_path / "in",
        {
            path: (content if "n01440764_3" not in path else content[:-4] + b"??\xff\xd9")
            for path, content in trees.small(train=30).items()
        },
    )
    errors = verify(damaged, "--against", tmp_path / "in", status=1)
    assert (
        "cut.JPEG is in only one of them" in errors
        or "cut at the end.JPEG is in only one" in errors
    )


def test_mxnet_reads_every_record(whole):
    mx = pytest.importorskip("mxnet")
    for half in ("train", "val"):
        base = str(whole / "out" / half)
        reader = mx.recordio.MXIndexedRecordIO(base + ".idx", base + ".rec", "r")
        for key, label, path, _ in listed(whole / "out", half):
            header, image = mx.recordio.unpack(reader.read_idx(key))
            assert (header.label, header.id) == (label, key)
            assert image == (whole / "in" / half / path).read_bytes()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Real images of one colour each, so that what was decoded says which one it was."""
    cv2 = pytest.importorskip("cv2")
    folder = tmp_path_factory.mktemp("pictures")
    files = {}
    for half in ("train", "val"):
        for number in range(12):
            image = np.full((40, 40, 3), 20 * number, np.uint8)
            files["%s/c%d/%d.jpg" % (half, number % 3, number)] = cv2.imencode(".jpg", image)[
                1
            ].tobytes()
    trees.write(folder / "in", files)
    assert trees.prepare(folder / "in", folder / "out").returncode == 0
    return folder


def expected(folder):
    return [
        (label, 20 * int(os.path.basename(path)[:-4]))
        for _, label, path, _ in listed(folder / "out")
    ]


def test_image_record_iter_reads_it(pictures):
    mx = pytest.importorskip("mxnet")
    base = str(pictures / "out" / "train")
    found = []
    for batch in mx.io.ImageRecordIter(
        path_imgrec=base + ".rec",
        path_imgidx=base + ".idx",
        data_shape=(3, 40, 40),
        batch_size=4,
        preprocess_threads=1,
    ):
        found += zip(
            batch.label[0].asnumpy().tolist(), batch.data[0].asnumpy().mean(axis=(1, 2, 3)).tolist()
        )
    assert sorted((label, round(grey)) for label, grey in found) == sorted(expected(pictures))


def test_dali_reads_it(pictures):
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def

    @pipeline_def(batch_size=4, num_threads=1, device_id=None)
    def read(base):
        jpegs, labels = fn.readers.mxnet(path=[base + ".rec"], index_path=[base + ".idx"])
        return fn.decoders.image(jpegs, device="cpu"), labels

    pipeline = read(str(pictures / "out" / "train"))
    pipeline.build()
    found = []
    for _ in range(3):
        images, labels = pipeline.run()
        found += [(float(labels.at(at)[0]), round(float(images.at(at).mean()))) for at in range(4)]
    assert found == expected(pictures)


def test_decode_check_finds_what_the_ends_do_not_tell(pictures, tmp_path):
    pytest.importorskip("nvidia.dali")
    import shutil

    shutil.copytree(str(pictures / "in"), str(tmp_path / "in"))
    trees.write(tmp_path / "in", {"train/c1/scrambled.jpg": jpeg(b"no image at all" * 50)})
    assert trees.prepare(tmp_path / "in", tmp_path / "quick").returncode == 0
    result = trees.prepare(tmp_path / "in", tmp_path / "out", "--check=decode")
    assert result.returncode == 1, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("prepare.imagenet")]
    assert len(lines) == 2 and "train/c1/scrambled.jpg: cannot be decoded: " in lines[0]
    assert (
        trees.prepare(
            tmp_path / "in", tmp_path / "out", "--check=decode", "--on-error=skip"
        ).returncode
        == 0
    )
    assert json.loads((tmp_path / "out" / "train.json").read_text())["examples"] == 12


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("archive", [False, True])
def test_against_a_source_that_is_named_another_way(tmp_path, old, archive):
    files = trees.small()
    files["train/n01443537/n01443537_3.JPEG"] = files["val/n01443537/n01443537_1.JPEG"] = (
        b"no image"
    )
    trees.write(tmp_path / "in", files)
    if archive:
        os.rename(str(tmp_path / "in"), str(tmp_path / "folders"))
        trees.official(tmp_path / "folders", tmp_path / "in")
    environment = dict(os.environ, PYTHONPATH=trees.REPOSITORY)
    result = trees.prepare("in", "out", "--on-error=skip", cwd=str(tmp_path), env=environment)
    assert result.returncode == 0 and result.stdout.count("1 left out") == 2, result.stderr
    os.rename(str(tmp_path / "in"), str(tmp_path / "moved"))
    for half in ("train", "val"):
        manifest = json.loads((tmp_path / "out" / (half + ".json")).read_text())
        skipped = manifest["skipped"][0]
        assert skipped["path"] == "n01443537/n01443537_%d.JPEG" % (3 if half == "train" else 1)
        if old:
            skipped["path"] = "in/%s/%s" % (half, skipped["path"])
            (tmp_path / "out" / (half + ".json")).write_text(json.dumps(manifest))
    assert verify(tmp_path / "out", "--against", tmp_path / "moved") == ""
    extra = jpeg(b"extra")
    if not archive:
        trees.write(tmp_path / "moved", {"train/n01443537/new.JPEG": extra})
        assert "new.JPEG is in only one of them (1 such)" in verify(
            tmp_path / "out", "--against", tmp_path / "moved", status=1
        )


@pytest.mark.parametrize("size", [-1, -3, -4, -8, 0, 1, 4])
@pytest.mark.parametrize("option", [None, "--fast"])
def test_damaged_sums(damaged, size, option):
    """Of another length; what was found before is named too."""
    path = str(damaged / "train.sums")
    os.truncate(path, os.path.getsize(path) + size if size else 0)
    os.truncate(str(damaged / "train.rec"), 1000)
    errors = verify(damaged, *([option] if option else []), status=1).splitlines()
    assert any(
        "train.sums: has %d bytes for 92 records, not 4 for each" % os.path.getsize(path) in line
        for line in errors
    )
    assert any("train.rec: has 1000 bytes" in line for line in errors)


@pytest.mark.parametrize(
    "offset", ["4000000000", "9000000000000000000", "99999999999999999999999", "-4", "1", "x"]
)
def test_an_index_that_leads_beyond_the_file(whole, damaged, offset):
    path = damaged / "train.idx"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1] + [lines[-1].split("\t")[0] + "\t" + offset]) + "\n")
    for options in ([], ["--fast"], ["--against", whole / "in"]):
        errors = verify(damaged, *options, status=1).splitlines()
        assert len(errors) == 2 and all("train.idx: " in line for line in errors), errors


def test_a_manifest_that_gives_a_huge_size(whole, damaged):
    rewrite(damaged, lambda manifest: manifest["files"]["train.rec"].update(bytes=1 << 50))
    for options in ([], ["--fast"], ["--against", whole / "in"]):
        assert "not %d" % (1 << 50) in verify(damaged, *options, status=1)


def rewrite(folder, change):
    manifest = json.loads((folder / "train.json").read_text())
    change(manifest)
    (folder / "train.json").write_text(json.dumps(manifest))


DAMAGED_MANIFESTS = {
    "no files": ("files", lambda manifest: manifest.pop("files")),
    "a file less": ("files", lambda manifest: manifest["files"].pop("train.rec")),
    "a sum less": ("files", lambda manifest: manifest["files"]["train.rec"].pop("sha256")),
    "odd size": ("files", lambda manifest: manifest["files"]["train.rec"].update(bytes="12")),
    "negative size": ("files", lambda manifest: manifest["files"]["train.rec"].update(bytes=-1)),
    "no list": ("files", lambda manifest: manifest.update(files=["train.rec"])),
    "incomplete": ("complete", lambda manifest: manifest.update(complete=False)),
    "no examples": ("examples", lambda manifest: manifest.pop("examples")),
    "odd classes": ("classes", lambda manifest: manifest.update(classes=[1, 2, 3])),
    "no options": ("options", lambda manifest: manifest.pop("options")),
    "no source": ("source", lambda manifest: manifest.pop("source")),
    "odd skipped": ("skipped", lambda manifest: manifest.update(skipped=[{"reason": ""}])),
}


@pytest.mark.parametrize("name", DAMAGED_MANIFESTS)
def test_damaged_manifest(whole, damaged, name):
    field, change = DAMAGED_MANIFESTS[name]
    rewrite(damaged, change)
    text = 'train.json: is damaged: its "%s" is not what a manifest has' % field
    errors = verify(damaged, status=3)
    assert text in errors and len(errors.splitlines()) == 1
    again = trees.prepare(whole / "in", damaged)
    assert again.returncode == 3 and text in again.stderr and len(again.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda classes: classes[1].update(name="n99999999"),
        lambda classes: classes[1].update(label=7),
        lambda classes: classes[1].update(examples=29),
        lambda classes: classes.pop(),
        lambda classes: classes.append({"name": "n99999999", "label": 3, "examples": 5}),
        lambda classes: (classes[0].update(label=1), classes[1].update(label=0)),
    ],
)
def test_a_manifest_with_other_classes(damaged, change):
    rewrite(damaged, lambda manifest: change(manifest["classes"]))
    for options in ([], ["--fast"]):
        assert "train.json: gives class " in verify(damaged, *options, status=1)
