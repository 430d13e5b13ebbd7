# SPDX-License-Identifier: Apache-2.0
"""Archives of every make, cut and damaged everywhere: either the right images or a named problem, never fewer images."""

import io
import os
import subprocess
import tarfile

import pytest
from support import image_trees as trees
from support.image_trees import jpeg

from prepare import tar_index
from prepare.listing import SourceError
from prepare.plan import make_plan
from prepare.image_reader import ImageReader


def read_all(path):
    """{path: bytes} of an archive by our reader, and the problems."""
    listing = tar_index.list_archive(str(path), 2)
    if not any(folder.names for folder in listing.folders):
        return {}, listing.problems
    plan = make_plan("train", listing, allow_empty=True)
    found = {}
    with ImageReader(plan) as reader:
        for record, name in enumerate(plan.paths):
            found[name] = bytearray(int(plan.sizes[record]))
            reader.read(record, memoryview(found[name]))
    return {name: bytes(content) for name, content in found.items()}, plan.problems


def read_outside(path):
    """The same with Python's tarfile."""
    found = {}
    with tarfile.open(str(path)) as tar:
        for member in tar:
            if member.isfile() or member.islnk():
                found[os.path.normpath(member.name)] = tar.extractfile(member).read()
    return found


ODD_NAMES = {
    "plain.jpg": 3,
    "d/" + "n" * 90 + ".jpg": 600,
    "d" * 90 + "/" + "e" * 40 + "/" + "n" * 80 + ".jpg": 512,  # fits ustar's prefix and name
    "d/" + "long" * 50 + ".jpg": 511,  # does not
    "d/\u00fc\u4e2d\U0001f600.jpg": 513,
    "d/with blank and 'quote'.jpg": 0,
    "empty size/x.jpg": 1,
}


@pytest.mark.parametrize("program", ["gnutar", "bsdtar", "python"])
@pytest.mark.parametrize("form", ["v7", "ustar", "gnu", "pax"])
def test_formats_and_names(tmp_path, program, form):
    if program not in trees.programs() or (form == "v7" and program != "gnutar"):
        pytest.skip("%s cannot write %s here" % (program, form))
    files = {name: jpeg(seed=name, size=size) for name, size in ODD_NAMES.items()}
    if form in ("v7", "ustar"):
        files = {
            name: content
            for name, content in files.items()
            if "long" not in name and (form == "ustar" or len(name) < 99)
        }
    if program == "bsdtar" and form == "ustar":
        files = {name: content for name, content in files.items() if name.isascii()}
    trees.write(tmp_path / "in", files)
    os.link(str(tmp_path / "in" / "plain.jpg"), str(tmp_path / "in" / "zz hard.jpg"))
    os.symlink("../plain.jpg", str(tmp_path / "in" / "d" / "zz soft.jpg"))
    files.update({"zz hard.jpg": files["plain.jpg"], "d/zz soft.jpg": files["plain.jpg"]})
    trees.pack(program, form, tmp_path / "a.tar", tmp_path / "in", ["."])
    found, problems = read_all(tmp_path / "a.tar")
    assert problems == []
    assert found == files


def test_reads_what_tarfile_reads_whatever_the_padding(tmp_path):
    for blocking in (1, 20, 4096):
        trees.write(tmp_path / "in", trees.small())
        subprocess.run(
            [
                "tar",
                "-b",
                str(blocking),
                "-cf",
                str(tmp_path / "a.tar"),
                "-C",
                str(tmp_path / "in"),
                "train",
                "val",
            ],
            check=True,
        )
        assert read_all(tmp_path / "a.tar") == (read_outside(tmp_path / "a.tar"), [])


def sparse_archive(program, form, folder):
    trees.write(folder, {"in/first.jpg": jpeg(b"a"), "in/zz last.jpg": jpeg(b"b")})
    for number, holes in enumerate((2, 40)):
        with open(str(folder / "in" / ("sparse%d.jpg" % number)), "wb") as stream:
            for hole in range(holes):
                stream.seek(hole * 1048576)
                stream.write(b"x" * 4096)
            stream.truncate(holes * 1048576 + 500000)
    names = sorted(os.listdir(str(folder / "in")))
    if program == "gnutar":
        command = ["tar", "--sparse", "--format=" + form, "-cf"]
    else:
        command = ["bsdtar", "--read-sparse", "--format=pax", "-cf"]
    subprocess.run([*command, str(folder / "a.tar"), "-C", str(folder / "in"), *names], check=True)


@pytest.mark.parametrize("program,form", [("gnutar", "gnu"), ("gnutar", "pax"), ("bsdtar", "pax")])
def test_sparse_members_are_refused_and_stepped_over(tmp_path, program, form):
    if program not in trees.programs():
        pytest.skip("%s is not installed" % program)
    sparse_archive(program, form, tmp_path)
    found, problems = read_all(tmp_path / "a.tar")
    assert sorted(found) == ["first.jpg", "zz last.jpg"]
    if not problems and program == "bsdtar":
        pytest.skip("this file system or bsdtar does not see the holes")
    assert [
        ("sparse%d.jpg" % number) in str(problem) and "--sparse" in str(problem)
        for number, problem in enumerate(problems)
    ] == [True] * 2


def member(name, content=b"", kind=tarfile.REGTYPE, **fields):
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def write_members(path, members, form=tarfile.USTAR_FORMAT):
    with tarfile.open(str(path), "w", format=form) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize(
    "odd,reason",
    [
        (member("c/pipe.jpg", kind=tarfile.FIFOTYPE), "not a regular file"),
        (member("c/device.jpg", kind=tarfile.CHRTYPE), "not a regular file"),
        (member("c/odd.jpg", b"abc", kind=b"Z"), "not a regular file"),
        (member("c/continued.jpg", b"abc", kind=b"M"), "not a regular file"),
        (
            member("c/link.jpg", kind=tarfile.SYMTYPE, linkname="nowhere.jpg"),
            "no image in this archive",
        ),
        (
            member("c/hard.jpg", kind=tarfile.LNKTYPE, linkname="c/nowhere.jpg"),
            "no image in this archive",
        ),
        (member("c2", kind=tarfile.SYMTYPE, linkname="c"), "no image in this archive"),
        (member("c/a/../../../up.jpg", b"abc"), ".. in it"),
        (member("c/tab\there.jpg", b"abc"), "tab or a line break"),
        (member("n01.tar.gz", b"abc"), "packed archive"),
        (member("empty/", kind=tarfile.DIRTYPE), "0 images"),
        (member("c/1.jpg", b"again"), "more than one image has this name"),
    ],
)
def test_odd_members_are_named(tmp_path, odd, reason):
    write_members(
        tmp_path / "a.tar", [member("c/1.jpg", jpeg(b"1")), odd, member("c/2.jpg", jpeg(b"2"))]
    )
    found, problems = read_all(tmp_path / "a.tar")
    assert len(problems) == 1 and reason in str(problems[0])
    assert found["c/2.jpg"] == jpeg(b"2")


def test_volume_labels_global_headers_and_other_files_do_no_harm(tmp_path):
    odd = [
        member("label", kind=b"V"),
        member("c/notes.txt", b"hello"),
        member("c", kind=tarfile.DIRTYPE),
    ]
    write_members(tmp_path / "a.tar", odd + [member("./c/1.jpg", jpeg(b"1"))])
    with tarfile.open(
        str(tmp_path / "b.tar"), "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 2000}
    ) as tar:
        info, content = member(
            "c/1.jpg", jpeg(b"1"), pax_headers={"SCHILY.xattr.user.a": "b", "mtime": "1.5"}
        )
        tar.addfile(info, io.BytesIO(content))
    assert (
        read_all(tmp_path / "a.tar")
        == read_all(tmp_path / "b.tar")
        == ({"c/1.jpg": jpeg(b"1")}, [])
    )


def nested(tmp_path):
    trees.write(tmp_path / "in", trees.small(train=3))
    trees.official(tmp_path / "in", tmp_path / "archives")
    return tmp_path / "archives" / "ILSVRC2012_img_train.tar"


def test_cut_short_anywhere(tmp_path):
    """Whatever is missing at the end is noticed, unless it is only padding after the mark of the end."""
    path = nested(tmp_path)
    content = path.read_bytes()
    whole, problems = read_all(path)
    assert len(whole) == 9 and problems == []
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512
    cut = tmp_path / "cut.tar"
    places = (
        {0, 1, 511, 512, 513, 1024, end - 1, end}
        | set(range(512, len(content), 1536))
        | set(range(100, len(content), 3000))
    )
    for size in sorted(places):
        cut.write_bytes(content[:size])
        found, problems = read_all(cut)
        assert found == whole or problems, "cut to %d of %d bytes" % (size, len(content))
        assert all(whole[name] == found[name] for name in found)
        if size < end:
            assert "cut short" in str(problems[-1]) or "empty" in str(problems[-1]), size


def test_damaged_anywhere(tmp_path):
    """A header that is overwritten, by zeros or anything else, is noticed."""
    path = nested(tmp_path)
    content = path.read_bytes()
    whole, _ = read_all(path)
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    assert len(headers) == 12
    damaged = tmp_path / "damaged.tar"
    for at in headers:
        for filling in (
            bytes(512),
            b"\xff" * 512,
            content[at : at + 124] + b"7" + content[at + 125 : at + 512],
        ):
            damaged.write_bytes(content[:at] + filling + content[at + 512 :])
            _, problems = read_all(damaged)
            assert problems, at


@pytest.mark.parametrize(
    "kind", ["train.tar of train/", "class archives of class folders", "train.tar of class folders"]
)
def test_archives_with_a_folder_around_everything(tmp_path, kind):
    trees.write(tmp_path / "in", trees.small())
    assert trees.prepare(tmp_path / "in", tmp_path / "from folders").returncode == 0
    for half in ("train", "val"):
        place = tmp_path / "packed" / half
        place.mkdir(parents=True)
        classes = sorted(os.listdir(str(tmp_path / "in" / half)))
        if kind == "train.tar of train/":
            trees.pack("gnutar", "gnu", "%s.tar" % place, tmp_path / "in", [half])
        elif kind == "train.tar of class folders":
            trees.pack("gnutar", "gnu", "%s.tar" % place, tmp_path / "in" / half, ["."])
        else:
            for name in classes:
                trees.pack("gnutar", "gnu", place / (name + ".tar"), tmp_path / "in" / half, [name])
    result = trees.prepare(tmp_path / "packed", tmp_path / "from archives")
    assert result.returncode == 0, result.stderr
    assert trees.contents(tmp_path / "from archives") == trees.contents(tmp_path / "from folders")


def test_two_archives_in_one_file(tmp_path):
    path = nested(tmp_path)
    path.write_bytes(path.read_bytes() * 2)
    assert "after its end mark" in str(read_all(path)[1][-1])


@pytest.mark.parametrize("option", ["--gzip", "--bzip2", "--xz"])
def test_compressed(tmp_path, option):
    trees.write(tmp_path / "in", trees.small())
    made = subprocess.run(
        ["tar", option, "-cf", str(tmp_path / "a.tar"), "-C", str(tmp_path / "in"), "train"],
        stderr=subprocess.PIPE,
    )
    if made.returncode:
        pytest.skip("tar cannot compress with %s here" % option)
    with pytest.raises(SourceError, match="compressed"):
        tar_index.list_archive(str(tmp_path / "a.tar"), 1)


def test_large_sizes_without_the_data(tmp_path):
    """Sizes from 8 GiB on are written in binary; a sparse file stands in for the data."""
    for form, name in ((tarfile.GNU_FORMAT, "gnu.tar"), (tarfile.PAX_FORMAT, "pax.tar")):
        info, _ = member("c/large.jpg")
        info.size = 9 << 30
        header = info.tobuf(form)
        small, content = member("c/small.jpg", jpeg(b"x"))
        with open(str(tmp_path / name), "wb") as stream:
            stream.write(header)
            stream.seek(info.size, os.SEEK_CUR)
            stream.write(small.tobuf(form) + content.ljust(512, b"\0") + bytes(1024))
        listing = tar_index.list_archive(str(tmp_path / name), 1)
        folder = next(folder for folder in listing.folders if folder.path == "c")
        assert listing.problems == [] and folder.names == ["large.jpg", "small.jpg"]
        assert list(folder.sizes) == [9 << 30, len(content)]
        assert "512 MiB" in str(make_plan("train", listing).problems[0])


def class_archives(tmp_path, name=None):
    """A source with an archive for each class; `name` (bytes) is that of one class, in both halves."""
    trees.write(tmp_path / "in", trees.small())
    for half in ("train", "val"):
        place = tmp_path / "packed" / half
        place.mkdir(parents=True)
        for label in sorted(os.listdir(str(tmp_path / "in" / half))):
            folder = tmp_path / "in" / half / label
            trees.pack(
                "python", "gnu", place / (label + ".tar"), folder, sorted(os.listdir(str(folder)))
            )
        if name is not None:
            os.rename(
                os.fsencode(str(place / "n01443537.tar")),
                os.fsencode(str(place)) + b"/" + name + b".tar",
            )
    return tmp_path / "packed"


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", [b"a\tb", b"a\nb", b"a\rb", b"latin1\xe9"])
def test_a_class_archive_with_a_name_that_a_list_cannot_hold(tmp_path, name, nested):
    source = class_archives(tmp_path, name)
    if nested:
        for half in ("train", "val"):
            names = [
                os.fsdecode(path) for path in sorted(os.listdir(os.fsencode(str(source / half))))
            ]
            trees.pack("python", "gnu", tmp_path / (half + ".tar"), source / half, names)
        for half in ("train", "val"):
            subprocess.run(["rm", "-r", str(source / half)], check=True)
            os.rename(str(tmp_path / (half + ".tar")), str(source / (half + ".tar")))
    result = trees.prepare(source, tmp_path / "out")
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    reason = "not UTF-8" if b"\xe9" in name else "tab or a line break"
    assert result.stderr.count(reason) == 7 + 2
    assert not (tmp_path / "out").exists()


def test_a_link_in_a_class_archive_with_such_a_name(tmp_path):
    source = class_archives(tmp_path)
    write_members(
        source / "train" / "a\tb.tar",
        [member("1.jpg", kind=tarfile.SYMTYPE, linkname="2.jpg"), member("2.jpg", jpeg(b"2"))],
    )
    listing = tar_index.list_class_archives(str(source / "train"), ["a\tb.tar"], 1)
    assert not any(folder.names for folder in listing.folders) and len(listing.problems) == 2


@pytest.mark.parametrize("official", [False, True])
def test_images_beside_archives_are_named(tmp_path, official):
    source = class_archives(tmp_path)
    if official:
        subprocess.run(["rm", "-r", str(source)], check=True)
        trees.official(tmp_path / "in", source)
        for half in ("train", "val"):
            (source / half).mkdir()
            name = "ILSVRC2012_img_%s.tar" % half
            os.rename(str(source / name), str(source / half / name))
    assert trees.prepare(source, tmp_path / "whole").returncode == 0
    trees.write(
        source,
        {
            "train/loose.jpg": jpeg(),
            "val/loose.png": jpeg(),
            "train/notes.txt": b"",
            "train/.hidden": b"",
        },
    )
    os.symlink("nowhere", str(source / "train" / "dangling.JPEG"))
    result = trees.prepare(source, tmp_path / "out")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 4, result.stderr
    for path, reason in (
        ("train/loose.jpg", "in no class"),
        ("val/loose.png", "in no class"),
        ("train/dangling.JPEG", "symbolic link"),
    ):
        assert any(
            str(source / path) + ": " in line and reason in line
            for line in result.stderr.splitlines()
        )
    assert "train: other files, left alone: 1 .hidden, 1 .txt" in result.stdout
    result = trees.prepare(source, tmp_path / "out", "--on-error=skip")
    assert result.returncode == 0 and "2 left out" in result.stdout
    assert trees.contents(tmp_path / "out") == trees.contents(tmp_path / "whole")
