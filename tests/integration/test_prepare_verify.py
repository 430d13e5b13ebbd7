# SPDX-License-Identifier: Apache-2.0
"""prepare.verify accepts an undamaged data set and names what is damaged in another one."""

import json
import os
import shutil

import pytest
from support import image_fixtures as images
from support.conversions import convert, verify_records
from support.image_fixtures import MAGIC, jpeg
from support.manifests import change_manifest, make_version_1, write_manifest

from prepare import manifest

DAMAGED_RECORD = 16  # not a record that is split at magic words: --fast checks less of those


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory):
    """A folder with a source in in/ and its records in out/."""
    folder = tmp_path_factory.mktemp("undamaged")
    files = images.small_dataset(train=30)
    files["train/n01440764/split.JPEG"] = jpeg(b"pp" + MAGIC * 3 + b"xyz" + MAGIC)
    files["train/n01440764/split at the end.JPEG"] = jpeg(b"pp" + b"ab" + MAGIC)
    images.write_files(folder / "in", files)
    result = images.run_prepare(folder / "in", folder / "out")
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def records(undamaged, tmp_path):
    """A copy of the records, to damage."""
    shutil.copytree(str(undamaged / "out"), str(tmp_path / "out"))
    return tmp_path / "out"


def verify(folder, *options, status=0):
    """Run prepare.verify, which must end with this status; return its standard error."""
    result = verify_records(folder, *options)
    assert result.status == status and "Traceback" not in result.stderr, result.stderr
    return result.stderr


def read_tables(folder):
    """Return (key, path, offset) of each training record."""
    rows = [line.split("\t") for line in (folder / "train.lst").read_text().splitlines()]
    lines = (folder / "train.idx").read_text().splitlines()
    offsets = [int(line.split("\t")[1]) for line in lines]
    return [(int(key), path, offset) for (key, _, path), offset in zip(rows, offsets)]


def flip_bit(path, offset):
    with open(str(path), "r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 0x10]))


@pytest.mark.parametrize("options", [[], ["--fast"], ["--against", None], ["--workers=1"]])
def test_undamaged(undamaged, options):
    options = [undamaged / "in" if option is None else option for option in options]
    assert verify(undamaged / "out", *options) == ""


@pytest.mark.parametrize("offset_in_record", [0, 4, 8, 12, 16, 24, 32, 33, 36, -4])
def test_flipped_bit_is_attributed_to_its_record(undamaged, records, offset_in_record):
    """In the frame, in the image header and in the image; -4 is in the record's last word."""
    tables = read_tables(records)
    key, path, start = tables[DAMAGED_RECORD]
    end = tables[DAMAGED_RECORD + 1][2]
    flip_bit(records / "train.rec", (start if offset_in_record >= 0 else end) + offset_in_record)
    result = verify_records(records)
    errors = result.stderr
    assert result.status == 1 and len(errors.splitlines()) == 1
    assert "train: 92 records in 3 classes, 1 error\n" in result.stdout
    assert f"record {DAMAGED_RECORD} (key {key}, {path}, at byte {start})" in errors
    name = f"record {DAMAGED_RECORD} ("
    assert name in verify(records, "--against", undamaged / "in", status=1)
    in_header = 0 <= offset_in_record < 32
    assert (name in verify(records, "--fast", status=1 if in_header else 0)) == in_header


def test_damaged_split_record(records):
    tables = read_tables(records)
    record = next(
        number for number, (_, path, _) in enumerate(tables) if path.endswith("/split.JPEG")
    )
    content = bytearray((records / "train.rec").read_bytes())
    second_part = content.index(MAGIC, tables[record][2] + 4)
    content[second_part + 7] ^= 0x20  # the kind of the part: middle becomes last
    (records / "train.rec").write_bytes(bytes(content))
    assert f"record {record} (" in verify(records, status=1)


def test_missing_end_file_and_manifest(records):
    size = os.path.getsize(str(records / "train.rec"))
    os.truncate(str(records / "train.rec"), size - 10)
    errors = verify(records, status=1)
    assert f"has {size - 10} bytes, expected {size}" in errors and "record 91 (" in errors
    (records / "train.idx").unlink()
    assert "train.idx: is missing" in verify(records, status=1)
    (records / "train.json").unlink()
    assert "not finished" in verify(records, status=3)
    assert "nowhere" in verify(records / "nowhere", status=2)


@pytest.mark.parametrize("change", ["swap lines", "another label", "a letter"])
def test_list_that_contradicts_the_index(records, change):
    lines = (records / "val.lst").read_text().splitlines()
    if change == "swap lines":
        lines[0], lines[1] = lines[1], lines[0]
    elif change == "another label":
        key, label, path = lines[0].split("\t")
        lines[0] = f"{key}\t{float(label) + 1:f}\t{path}"
    else:
        lines[0] = "x" + lines[0]
    (records / "val.lst").write_text("\n".join(lines) + "\n")
    assert "val." in verify(records, status=1)


def test_another_source(records, tmp_path):
    files = images.small_dataset(train=30)
    for path, content in files.items():
        if "n01440764_3" in path:
            files[path] = content[:-4] + b"??\xff\xd9"
    images.write_files(tmp_path / "in", files)
    errors = verify(records, "--against", tmp_path / "in", status=1)
    assert (
        "split.JPEG is in only one of them" in errors
        or "split at the end.JPEG is in only one" in errors
    )


@pytest.mark.parametrize("old_manifest", [False, True])
@pytest.mark.parametrize("archive", [False, True])
def test_renamed_source(tmp_path, old_manifest, archive):
    """The skipped images are recognized; earlier versions wrote their paths with the source."""
    files = images.small_dataset()
    files["train/n01443537/n01443537_3.JPEG"] = b"no image"
    files["val/n01443537/n01443537_1.JPEG"] = b"no image"
    images.write_files(tmp_path / "in", files)
    if archive:
        os.rename(str(tmp_path / "in"), str(tmp_path / "folders"))
        images.write_official_archives(tmp_path / "folders", tmp_path / "in")
    environment = dict(os.environ, PYTHONPATH=images.REPOSITORY)
    result = images.run_prepare("in", "out", "--on-error=skip", cwd=str(tmp_path), env=environment)
    assert result.returncode == 0 and result.stdout.count("1 left out") == 2, result.stderr
    os.rename(str(tmp_path / "in"), str(tmp_path / "moved"))
    for split, number in (("train", 3), ("val", 1)):
        path = tmp_path / "out" / f"{split}.json"
        fields = json.loads(path.read_text())
        skipped = fields["skipped"][0]
        assert skipped["path"] == f"n01443537/n01443537_{number}.JPEG"
        if old_manifest:
            skipped["path"] = f"in/{split}/{skipped['path']}"
            write_manifest(path, fields)
            make_version_1(path)
    assert verify(tmp_path / "out", "--against", tmp_path / "moved") == ""
    if not archive:
        images.write_files(tmp_path / "moved", {"train/n01443537/new.JPEG": jpeg(b"extra")})
        errors = verify(tmp_path / "out", "--against", tmp_path / "moved", status=1)
        assert "new.JPEG is in only one of them (1 such)" in errors


@pytest.mark.parametrize("size_change", [-1, -3, -4, -8, None, 1, 4])
@pytest.mark.parametrize("options", [[], ["--fast"]])
def test_sums_of_a_wrong_size(records, size_change, options):
    """The errors found before the sums are read are reported too; None: an empty file."""
    path = str(records / "train.sums")
    size = 0 if size_change is None else os.path.getsize(path) + size_change
    os.truncate(path, size)
    os.truncate(str(records / "train.rec"), 1000)
    errors = verify(records, *options, status=1)
    assert f"train.sums: has {size} bytes for 92 records, expected 4 for each" in errors
    assert "train.rec: has 1000 bytes" in errors


@pytest.mark.parametrize(
    "offset", ["4000000000", "9000000000000000000", "99999999999999999999999", "-4", "1", "x"]
)
def test_invalid_offset_in_the_index(undamaged, records, offset):
    path = records / "train.idx"
    *lines, last = path.read_text().splitlines()
    key = last.split("\t")[0]
    path.write_text("\n".join([*lines, f"{key}\t{offset}"]) + "\n")
    for options in ([], ["--fast"], ["--against", undamaged / "in"]):
        errors = verify(records, *options, status=1).splitlines()
        assert len(errors) == 2 and all("train.idx: " in line for line in errors), errors


def test_huge_size_in_the_manifest(undamaged, records):
    change_manifest(
        records / "train.json", lambda fields: fields["files"]["train.rec"].update(bytes=1 << 50)
    )
    for options in ([], ["--fast"], ["--against", undamaged / "in"]):
        assert f"expected {1 << 50}" in verify(records, *options, status=1)


DAMAGED_MANIFESTS = {  # description -> (name of the field, change)
    "no files": ("files", lambda fields: fields.pop("files")),
    "missing file": ("files", lambda fields: fields["files"].pop("train.rec")),
    "missing sum": ("files", lambda fields: fields["files"]["train.rec"].pop("sha256")),
    "text as size": ("files", lambda fields: fields["files"]["train.rec"].update(bytes="12")),
    "negative size": ("files", lambda fields: fields["files"]["train.rec"].update(bytes=-1)),
    "list as files": ("files", lambda fields: fields.update(files=["train.rec"])),
    "incomplete": ("complete", lambda fields: fields.update(complete=False)),
    "no examples": ("examples", lambda fields: fields.pop("examples")),
    "numbers as classes": ("classes", lambda fields: fields.update(classes=[1, 2, 3])),
    "no options": ("options", lambda fields: fields.pop("options")),
    "no source": ("source", lambda fields: fields.pop("source")),
    "skipped without path": ("skipped", lambda fields: fields.update(skipped=[{"reason": ""}])),
}


@pytest.mark.parametrize("name", DAMAGED_MANIFESTS)
def test_damaged_manifest(undamaged, records, name):
    field, change = DAMAGED_MANIFESTS[name]
    change_manifest(records / "train.json", change)
    text = f'train.json: is damaged: its field "{field}" is missing or invalid'
    errors = verify(records, status=3)
    assert text in errors and len(errors.splitlines()) == 1
    again = convert(undamaged / "in", records)
    assert again.status == 3 and text in again.stderr and len(again.stderr.splitlines()) == 1


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
def test_manifest_with_other_classes(records, change):
    change_manifest(records / "train.json", lambda fields: change(fields["classes"]))
    for options in ([], ["--fast"]):
        assert "train.json: gives class " in verify(records, *options, status=1)


def test_a_flipped_bit_at_any_place_of_a_manifest_is_found(undamaged, records):
    path = records / "train.json"
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= (0x01, 0x02, 0x20, 0x80)[position % 4]
        path.write_bytes(bytes(damaged))
        with pytest.raises(manifest.DestinationError, match="train.json: is "):
            manifest.load_manifest(str(records), "train")
    path.write_bytes(content.replace(b"n01440764", b"n01440765"))
    text = "train.json: is damaged: its content differs from its sum"
    assert text in verify(records, status=3)
    again = convert(undamaged / "in", records)
    assert again.status == 3 and text in again.stderr


def test_a_manifest_of_an_earlier_version_is_read_and_has_no_sum(undamaged, records):
    make_version_1(records / "val.json")
    result = verify_records(records)
    assert result.status == 0 and "val: its manifest is of version 1" in result.stdout
    assert "train: its manifest" not in result.stdout
    again = convert(undamaged / "in", records)
    assert again.status == 0 and "already complete" in again.stdout
