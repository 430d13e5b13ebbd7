# SPDX-License-Identifier: Apache-2.0
"""Files of other programs that appear beside an unfinished conversion are never changed."""

import os
import shutil

import pytest
from support.conversions import convert
from support.image_fixtures import jpeg, read_files, small_dataset, write_files

from prepare import convert as convert_module
from prepare import destination

BAD = "train/n01440764/n01440764_0.JPEG"
FOREIGN = {f"train{suffix}": b"mine" for suffix in (".rec", ".idx", ".lst", ".sums")}


@pytest.fixture
def source(tmp_path):
    write_files(tmp_path / "in", small_dataset(train=6, val=3))
    return tmp_path / "in"


def all_files(folder):
    """Return {path: (content, time of the last change)} of all files."""
    return {
        path: (path.read_bytes(), path.stat().st_ctime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("names", [sorted(FOREIGN), ["train.rec"], ["train.lst"]])
def test_files_beside_a_conversion_with_bad_images(tmp_path, source, names):
    good, out = (source / BAD).read_bytes(), tmp_path / "out"
    write_files(source, {BAD: b"bad"})
    assert convert(source, out).status == 1
    write_files(out, {name: FOREIGN[name] for name in names})
    before = all_files(out)
    for content in (b"bad", good):
        write_files(source, {BAD: content})
        result = convert(source, out)
        assert result.status == 3 and len(result.lines) == 1, result
        assert f"{out}/{sorted(names, key=list(FOREIGN).index)[0]}: exists" in result.stderr
        assert all_files(out) == before
    for name in names:
        (out / name).unlink()
    assert convert(source, out).status == 0


class KilledError(BaseException):
    """Stands for a kill."""


def stop_publishing_after(monkeypatch, count):
    """Let a conversion of the training split end after it has renamed `count` files."""
    replace, calls = os.replace, []

    def replace_or_stop(old, new):
        if os.path.basename(new).startswith("train"):
            calls.append(new)
            if len(calls) > count:
                raise KilledError
        replace(old, new)

    monkeypatch.setattr(os, "replace", replace_or_stop)


@pytest.mark.parametrize("foreign", [None, "content", "size", "link", "other"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_files_beside_a_split_that_was_being_published(
    tmp_path, source, monkeypatch, count, foreign
):
    assert convert(source, tmp_path / "whole").status == 0
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KilledError):
        stop_publishing_after(patch, count)
        convert(source, out)
    renamed = [f"train{suffix}" for suffix in (".rec", ".idx", ".lst", ".sums")][:count]
    found = [path.name for path in out.glob("train.*") if path.suffix != ".part"]
    assert sorted(found) == sorted(renamed)
    if foreign is not None:
        path = out / ("train.sums" if foreign == "other" else renamed[-1])
        content = path.read_bytes() if path.exists() else b"x"
        path.unlink(missing_ok=True)
        if foreign == "link":
            (tmp_path / "elsewhere").write_bytes(content)
            path.symlink_to(tmp_path / "elsewhere")
        else:
            path.write_bytes(content[:-1] + b"?" * (2 if foreign == "size" else 1))
        before = all_files(out)
        result = convert(source, out)
        assert result.status == 3 and str(path) in result.stderr, result
        assert all_files(out) == before
        path.unlink()
        if path.name == "train.rec":
            return
    assert convert(source, out).status == 0
    assert read_files(out) == read_files(tmp_path / "whole")
    assert not (out / "train.part").exists()


@pytest.mark.parametrize("name", ["val.rec", "val.sums", "val.json"])
def test_a_file_that_appears_during_the_run(tmp_path, source, monkeypatch, name):
    out = tmp_path / "out"
    write_tables = convert_module._write_tables

    def write_tables_and_file(*arguments):
        write_files(out, {name: b"mine"})
        return write_tables(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "_write_tables", write_tables_and_file)
        result = convert(source, out)
    assert result.status == 3 and f"{out}/{name}: has appeared" in result.stderr, result
    assert (out / name).read_bytes() == b"mine"
    (out / name).unlink()
    assert (out / "val.part" / "val.rec").exists()
    assert convert(source, out).status == 0


@pytest.mark.parametrize("name", ["train.rec", "train.idx", "train.json", "journal"])
def test_links_in_the_part_folder_are_not_written_through(tmp_path, source, name):
    out, part = tmp_path / "out", tmp_path / "out" / "train.part"
    write_files(source, {BAD: b"bad"})
    assert convert(source, out).status == 1
    path, elsewhere = part / name, tmp_path / "elsewhere"
    elsewhere.write_bytes(path.read_bytes() if path.exists() else b"mine")
    path.unlink(missing_ok=True)
    path.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    write_files(source, {BAD: jpeg()})
    result = convert(source, out)
    assert result.status == 3 and f"{path}: would be replaced" in result.stderr, result
    assert elsewhere.read_bytes() == before


JOURNALS = [b"my travels\n", b'{"mine": 1}\n', b"{mine", b"\0mine"]


@pytest.mark.parametrize("journal", JOURNALS)
def test_a_journal_of_another_program(tmp_path, source, journal):
    out = tmp_path / "out"
    write_files(out, {"val.part/journal": journal, "val.part/val.rec": b"mine"})
    before = all_files(out)
    result = convert(source, out)
    assert result.status == 3 and len(result.lines) == 1, result
    assert all_files(out) == before


@pytest.mark.parametrize("journal", JOURNALS)
def test_a_folder_beside_a_finished_split_is_not_emptied(tmp_path, source, journal):
    out = tmp_path / "out"
    assert convert(source, out).status == 0
    mine = {"train.part/journal": journal, "train.part/train.rec": b"mine"}
    write_files(out, mine)
    assert convert(source, out).status == 0
    assert {path: (out / path).read_bytes() for path in mine} == mine
    destination.remove_part_folder(str(out), "train")
    assert (out / "train.part" / "train.rec").exists()


@pytest.mark.parametrize("removed", [["journal"], ["journal", "train.rec"], None])
@pytest.mark.parametrize("function", ["_write_records", "_write_tables"])
def test_a_part_folder_that_is_removed_meanwhile(tmp_path, source, monkeypatch, function, removed):
    """The command `rm -r` may remove only a part of it, because there are new files in it."""
    part, original = tmp_path / "out" / "train.part", getattr(convert_module, function)

    def remove_and_write(plan, *arguments):
        if plan.prefix == "train" and part.exists():
            if removed is None:
                shutil.rmtree(part)
            for name in removed or []:
                (part / name).unlink(missing_ok=True)
        return original(plan, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, function, remove_and_write)
        result = convert(source, tmp_path / "out")
    assert result.status == 4 and "train.part: was removed while it was being" in result.stderr
    assert not part.exists()
    assert convert(source, tmp_path / "out").status == 0
    assert convert(source, tmp_path / "new").status == 0
    assert read_files(tmp_path / "out") == read_files(tmp_path / "new")
