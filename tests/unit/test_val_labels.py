# SPDX-License-Identifier: Apache-2.0
"""Test reading label files of all kinds, malformed and damaged ones too."""

import gzip
import os
import random
import tarfile
import warnings

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.image_fixtures import CLASSES, write_devkit

from prepare import val_labels
from prepare.listing import SourceError

GROUND_TRUTH = [CLASSES[number * 7 % 5 % 3] for number in range(1, 13)]


@pytest.mark.parametrize(
    "content,reason",
    [
        (b"", "it is empty"),
        (b"n01440764\nn01 443537\n", "one synset a line"),
        (b"\xff\xfe\x00", "neither"),
        (gzip.compress(b"no archive", mtime=0), "neither"),
        (b"mv a.JPEG\n", "not a line `mv IMAGE CLASS/`"),
        (b"mv a.JPEG great shark/\n", "not a line `mv IMAGE CLASS/`: mv a.JPEG great shark/"),
        (b"mv a.JPEG ' '/\n", "not a line `mv IMAGE CLASS/`"),
        (b"mv a.JPEG n1/\nmv a.JPEG n2/\n", "to n1 and to n2"),
        (b"mv a.JPEG n1/\nmv it's n02/\n", "not a line `mv IMAGE CLASS/`: mv it's n02/"),
    ],
)
def test_bad_label_files(tmp_path, content, reason):
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(SourceError, match=reason):
        val_labels.read_label_file(str(tmp_path / "labels"))


def test_a_quoted_class_may_contain_spaces(tmp_path):
    script = tmp_path / "valprep.sh"
    script.write_text("mv 'a b.JPEG' 'great shark'/\nmv c.JPEG white\\ shark/\n")
    labels = val_labels.read_label_file(str(script)).classes_of(["a b.JPEG", "c.JPEG"])
    assert labels == {"a b.JPEG": "great shark", "c.JPEG": "white shark"}


def read_or_refuse(path):
    """Read a label file as a conversion does; return the SourceError or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPy's and SciPy's, about a damaged table
            val_labels.read_label_file(str(path))
            val_labels.train_counts([str(path)])
    except SourceError as error:
        assert "\n" not in str(error)
        return error
    return None


line_strategy = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["n01440764", "#!/bin/sh", "mkdir -p n01440764", "mv it's n1/", "mv"]),
    st.builds("mv {} {}/".format, st.text(max_size=20), st.text(max_size=12)),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(line_strategy, max_size=8), separator=st.sampled_from(["\n", "\r\n", "\r"]))
def test_any_text_is_read_or_refused(tmp_path, lines, separator):
    path = tmp_path / "labels"
    path.write_bytes(separator.join(lines).encode("utf-8", "surrogatepass"))
    read_or_refuse(path)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=2000))
@example(content=bytes(1024))  # an empty archive
@example(content=gzip.compress(bytes(1024)))
def test_any_bytes_are_read_or_refused(tmp_path, content):
    (tmp_path / "labels").write_bytes(content)
    read_or_refuse(tmp_path / "labels")


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(classes=st.lists(st.sampled_from(CLASSES), min_size=1, max_size=30), data=st.data())
def test_all_kinds_of_label_files_give_the_same_classes(tmp_path, classes, data):
    names = [f"ILSVRC2012_val_{number + 1:08d}.JPEG" for number in range(len(classes))]
    moves = [f"mv {name} {label}/" for name, label in zip(names, classes)]
    (tmp_path / "list").write_text("\n".join(classes))
    (tmp_path / "moves").write_text("\n".join(data.draw(st.permutations(moves))))
    for path in (tmp_path / "list", tmp_path / "moves"):
        label_file = val_labels.read_label_file(str(path))
        assert label_file.classes_of(names) == dict(zip(names, classes))
        assert label_file.missing_images(names[1:]) == {names[0]: classes[0]}


def damage(content, seed):
    """Return content with a few random bytes changed or, for every fourth seed, its end cut off."""
    source, damaged = random.Random(seed), bytearray(content)
    if seed % 4 == 0:
        return bytes(damaged[: source.randrange(len(damaged))])
    for _ in range(source.choice([1, 3, 20])):
        damaged[source.randrange(len(damaged))] = source.randrange(256)
    return bytes(damaged)


@pytest.mark.parametrize("compression", ["gz", "xz", "bz2"])
def test_a_damaged_devkit_is_refused_or_gives_the_right_labels(tmp_path, compression):
    pytest.importorskip("scipy")
    ground_truth = random.Random(7).choices(CLASSES, k=30000)
    write_devkit(str(tmp_path / "whole.tar.gz"), CLASSES, ground_truth)
    with tarfile.open(tmp_path / "whole.tar.gz") as tar:
        tar.extractall(tmp_path)
    with tarfile.open(tmp_path / "packed", f"w:{compression}") as tar:
        tar.add(tmp_path / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
    content = (tmp_path / "packed").read_bytes()
    names = [f"ILSVRC2012_val_{number + 1:08d}.JPEG" for number in range(len(ground_truth))]
    damaged = tmp_path / "damaged"
    for seed in range(60):
        damaged.write_bytes(damage(content, seed))
        if read_or_refuse(damaged) is None:
            classes = val_labels.read_label_file(str(damaged)).classes_of(names)
            assert list(classes.values()) == ground_truth


@pytest.mark.parametrize("position", [0, 100, 126, 128, 132, 136, 137, 160, "half", "end"])
@pytest.mark.parametrize("fault", ["cut", "overwritten"])
def test_a_damaged_meta_file_is_refused(tmp_path, position, fault):
    """Test positions where SciPy detects damage; at others it may crash on an uncompressed file."""
    pytest.importorskip("scipy")
    from scipy.io import loadmat, savemat

    write_devkit(str(tmp_path / "whole.tar.gz"), CLASSES, GROUND_TRUTH)
    with tarfile.open(tmp_path / "whole.tar.gz") as tar:
        tar.extractall(tmp_path)
    folder = tmp_path / "ILSVRC2012_devkit_t12"
    meta = folder / "data" / "meta.mat"
    # The real file is compressed, too.
    savemat(str(meta), {"synsets": loadmat(str(meta))["synsets"]}, do_compression=True)
    assert read_or_refuse(folder) is None
    content = meta.read_bytes()
    at = {"half": len(content) // 2, "end": len(content) - 20}.get(position, position)
    rest = b"" if fault == "cut" else b"\xff" * 12 + content[at + 12 :]
    meta.write_bytes(content[:at] + rest)
    only_text_is_damaged = fault == "overwritten" and position in (0, 100)
    assert read_or_refuse(folder) is not None or only_text_is_damaged


def test_training_counts_come_from_the_devkit(tmp_path):
    pytest.importorskip("scipy")
    script, devkit = tmp_path / "valprep.sh", tmp_path / "devkit.tar.gz"
    script.write_text("mv a.JPEG n01440764/\n")
    write_devkit(str(devkit), CLASSES, GROUND_TRUTH)
    assert val_labels.train_counts([str(script)]) == {}
    counts = val_labels.train_counts([os.fspath(script), os.fspath(devkit)])
    assert counts == dict.fromkeys(CLASSES, 7)


@pytest.mark.parametrize(
    "encoding,line_end", [("utf-8-sig", "\r\n"), ("utf-16", "\r\n"), ("utf-8", "\r")]
)
def test_texts_of_other_systems(tmp_path, encoding, line_end):
    """Windows' programs write byte order marks; each of two joined files may begin with one."""
    names = {f"{number}.jpg": synset for number, synset in enumerate(["n01", "n02", "n\u00fc"])}
    for moves in (False, True):
        lines = [f"mv {name} {synset}/" if moves else synset for name, synset in names.items()]
        text = "".join(line + line_end for line in lines)
        if encoding == "utf-8-sig":
            text = text.replace(lines[1], "\ufeff" + lines[1])
        (tmp_path / "labels").write_bytes(text.encode(encoding))
        label_file = val_labels.read_label_file(str(tmp_path / "labels"))
        assert label_file.classes_of(sorted(names)) == names


@pytest.mark.parametrize(
    "content", ["n01\nn02\n".encode("utf-16-le"), "n01\n".encode("utf-32"), b"n\xfc\n", b"n\x001\n"]
)
def test_texts_of_unknown_encodings_are_refused(tmp_path, content):
    (tmp_path / "labels").write_bytes(content)
    with pytest.raises(SourceError, match="labels: n"):
        val_labels.read_label_file(str(tmp_path / "labels"))
