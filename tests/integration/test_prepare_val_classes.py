# SPDX-License-Identifier: Apache-2.0
"""Test that images which contradict the label files, and missing ones, are named."""

import json

import pytest
from support.conversions import (
    class_val_files,
    convert,
    flat_val_files,
    list_rows,
    official_name,
    train_files,
    verify_records,
)
from support.image_fixtures import jpeg, read_files, run_im2rec, write_files

LABELS = ["ca", "ca", "cb", "cc", "cc"]
TRAIN = train_files("ca", "cb", "cc")
LIST = {"val_labels.txt": "\n".join(LABELS).encode()}


def script(labels):
    lines = (f"mv {official_name(number)} {label}/\n" for number, label in enumerate(labels, 1))
    return {"valprep.sh": "".join(lines).encode()}


def write_source(tmp_path, *files):
    for some in files:
        write_files(tmp_path / "in", some)
    return tmp_path / "in"


def refused(tmp_path, *files, status=1, options=()):
    """Return the lines on standard error of a conversion that must fail and write nothing."""
    source = write_source(tmp_path, TRAIN, *files)
    result = convert(source, tmp_path / "out", *options)
    assert result.status == status, result
    assert not (tmp_path / "out" / "val.rec").exists()
    return [line.replace(f"prepare.imagenet: {source}/", "") for line in result.lines]


def test_images_both_in_class_folders_and_outside_are_refused(tmp_path):
    """The file in the class folder and one outside have one name and size, and other contents."""
    inside = {"val/x.jpg": jpeg(b"1"), "val/y.jpg": jpeg(b"2"), "val/cc/x.jpg": jpeg(b"3")}
    (line,) = refused(tmp_path, inside, {"val_labels.txt": b"ca\ncb"})
    assert "val: x.jpg (one of 2) is directly in it, cc/x.jpg is in a folder: move" in line


def test_a_bad_image_outside_class_folders_is_named_where_it_is(tmp_path):
    flat = {f"val/{name}.jpg": jpeg(name.encode()) for name in "wxyz"}
    labels = {"val_labels.txt": b"ca\nca\ncb\ncc"}
    source = write_source(tmp_path, TRAIN, flat, labels, {"val/w.jpg": b"no image"})
    result = convert(source, tmp_path / "out")
    assert result.status == 1 and f"{source}/val/w.jpg: neither a JPEG" in result.lines[0]
    result = convert(source, tmp_path / "out", "--on-error=skip")
    assert result.status == 0, result
    (skipped,) = json.loads((tmp_path / "out" / "val.json").read_text())["skipped"]
    assert skipped["path"] == "ca/w.jpg"
    assert list_rows(tmp_path / "out" / "val.lst") == {"ca/x.jpg": 0, "cb/y.jpg": 1, "cc/z.jpg": 2}
    assert verify_records(tmp_path / "out", "--against", source).status == 0


def test_the_output_is_that_of_class_folders_and_of_im2rec(tmp_path):
    pytest.importorskip("mxnet")
    flat = write_source(tmp_path / "flat", TRAIN, flat_val_files(5), LIST, script(LABELS))
    folders = write_source(tmp_path / "folders", TRAIN, class_val_files(LABELS), LIST)
    for source in (flat, folders):
        assert convert(source, source.parent / "out").status == 0
        assert verify_records(source.parent / "out", "--against", source).status == 0
    run_im2rec(folders, tmp_path / "im2rec")
    for source in (flat, folders):
        assert read_files(source.parent / "out") == read_files(tmp_path / "im2rec")


LAYOUTS = {"flat": flat_val_files(5), "folders": class_val_files(LABELS)}
MORE = {  # label files that know one image more than there is -> the file that knows it
    "list": ({"val_labels.txt": LIST["val_labels.txt"] + b"\ncc"}, "val_labels.txt"),
    "script": (script([*LABELS, "cc"]), "valprep.sh"),
    "second": ({**LIST, **script([*LABELS, "cc"])}, "valprep.sh"),
    "first": (
        {**script(LABELS), "val_labels.txt": LIST["val_labels.txt"] + b"\ncc"},
        "val_labels.txt",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("files", MORE)
def test_an_image_that_only_a_label_file_knows_is_named(tmp_path, layout, files):
    label_files, name = MORE[files]
    lines = refused(tmp_path, LAYOUTS[layout], label_files)
    reason = f"does not exist, but {tmp_path}/in/{name} has a label for it"
    assert lines[0] == f"val/{official_name(6)}: {reason}" and len(lines) == 2
    assert convert(tmp_path / "in", tmp_path / "out", "--on-error=skip").status == 0
    (skipped,) = json.loads((tmp_path / "out" / "val.json").read_text())["skipped"]
    assert skipped == {"path": official_name(6), "reason": reason}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("option", ["--on-error=fail", "--on-error=skip"])
def test_a_class_that_only_a_label_file_knows_is_refused(tmp_path, layout, option):
    """Without it, the labels of all later classes would be others."""
    labels = {"val_labels.txt": LIST["val_labels.txt"] + b"\nbb"}
    (line,) = refused(tmp_path, LAYOUTS[layout], labels, options=[option])
    assert line.startswith("val/bb: no image of this class exists, but ")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_number_with_two_extensions_is_named(tmp_path, layout):
    folder = "val" if layout == "flat" else "val/ca"
    twice = {f"{folder}/{official_name(1, '.jpg')}": jpeg(b"other")}
    lines = refused(tmp_path, LAYOUTS[layout], LIST, twice)
    for extension in (".JPEG", ".jpg"):
        path = f"{folder}/{official_name(1, extension)}"
        assert f"{path}: more than one image has the number 1: keep only one of them" in lines
    assert len(lines) == 3


def test_a_missing_official_name_does_not_shift_labels_when_another_name_is_there(tmp_path):
    files = {**flat_val_files(5), "val/zz.JPEG": jpeg(b"surplus")}
    del files[f"val/{official_name(2)}"]
    lines = refused(tmp_path, files, LIST)
    assert f"val/zz.JPEG: {tmp_path}/in/val_labels.txt has no label for it: " in lines[0]
    assert lines[1].startswith(f"val/{official_name(2)}: does not exist")
    assert lines == [*lines[:2], "prepare.imagenet: " + lines[2].split(": ", 1)[1]]


def test_a_script_is_compared_with_class_folders_by_any_name(tmp_path):
    folders = {f"val/{label}/{label}1.jpg": jpeg(label.encode()) for label in ("ca", "cb", "cc")}
    moves = {"valprep.sh": b"mv ca1.jpg ca/\nmv cb1.jpg cc/\nmv cc2.jpg cc/\n"}
    lines = refused(tmp_path, folders, moves)
    assert lines[0].startswith("val/cb/cb1.jpg: is in cb, but its class is cc in ")
    assert lines[1].startswith("val/cc2.jpg: does not exist")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_contradictions_are_named_up_to_a_limit(tmp_path, layout):
    labels = ["ca", "cb", "cc"] * 40
    files = flat_val_files(120) if layout == "flat" else class_val_files(labels)
    wrong = {"val_labels_2.txt": "\n".join(labels[1:] + labels[:1]).encode()}
    lines = refused(tmp_path, files, {"val_labels.txt": "\n".join(labels).encode()}, wrong)
    assert len(lines) == 52
    assert lines[50] == "val_labels_2.txt: is wrong for 70 more images in the same way"


@pytest.mark.parametrize("content", [b"\xff\xfe junk", b"ca\ncb\ncc", b"mv x.jpg ca/\n"])
@pytest.mark.parametrize("given", [False, True])
def test_a_label_file_that_is_not_used_is_mentioned(tmp_path, content, given):
    folders = {f"val/{label}/1.jpg": jpeg(label.encode()) for label in ("ca", "cb", "cc")}
    name = "junk" if given else "val_labels.txt"
    source = write_source(tmp_path, TRAIN, folders, {name: content})
    options = ["--val-labels", source / name] if given else []
    result = convert(source, tmp_path / "out", *options)
    assert result.status == 0 and result.stderr == ""
    assert (
        f"val: labels not used: {source / name}: the images are in class folders" in result.stdout
    )
    against = verify_records(tmp_path / "out", "--against", source, *options)
    assert against.status == 0 and f"labels not used: {source / name}" in against.stdout


@pytest.mark.parametrize(
    "names", [["9.jpg", "10.jpg", "11.jpg"], ["a.jpg", "B.jpg", "c.jpg"], ["x1-2.jpg", "x1-10.jpg"]]
)
def test_names_in_an_order_that_is_not_clear_need_a_script(tmp_path, names):
    """Programs list these names in different orders, so a list of labels would be ambiguous."""
    labels = ["ca", "cb", "cc"][: len(names)]
    files = {f"val/{name}": jpeg(name.encode()) for name in names}
    source = write_source(tmp_path, train_files(*labels), files)
    write_files(source, {"val_labels.txt": "\n".join(labels).encode()})
    result = convert(source, tmp_path / "out")
    assert result.status == 1 and len(result.lines) == 1 and "order of the images" in result.stderr
    (source / "val_labels.txt").unlink()
    moves = "".join(f"mv {name} {label}/\n" for name, label in zip(names, labels))
    write_files(source, {"valprep.sh": moves.encode()})
    assert convert(source, tmp_path / "out").status == 0
    expected = {f"{label}/{name}": labels.index(label) for name, label in zip(names, labels)}
    assert list_rows(tmp_path / "out" / "val.lst") == expected
