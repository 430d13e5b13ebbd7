# SPDX-License-Identifier: Apache-2.0
"""The description of a data set from its files and manifests."""

import copy
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.manifests import change_manifest, make_version_1, write_manifest

from mxresnet import cli
from mxresnet.config import Config
from mxresnet.data.dataset import DataSet, describe
from mxresnet.errors import UserError


def test_counts_come_from_the_manifests(digits):
    assert describe(Config(data_root=str(digits))) == DataSet(1442, 355, 10, True)


def test_an_epoch_may_be_shortened(digits):
    assert describe(Config(data_root=str(digits), num_examples=100)).train_examples == 100


def test_without_manifests_the_counts_are_those_of_the_settings_or_imagenet(copied):
    for split in ("train", "val"):
        (copied / f"{split}.json").unlink()
    config = Config(data_root=str(copied), num_examples=1442, num_val_examples=355, num_classes=10)
    assert describe(config) == DataSet(1442, 355, 10, False)
    with pytest.raises(UserError, match="train.idx has .* too few for an index of 1281167 records"):
        describe(Config(data_root=str(copied)))
    for split in ("train", "val"):
        (copied / f"{split}.idx").write_bytes(b" " * 10**7)
    assert describe(Config(data_root=str(copied))) == DataSet(1281167, 50000, 1000, False)


@pytest.mark.parametrize("missing, found", [("train", "val"), ("val", "train")])
def test_one_manifest_without_the_other_is_refused(copied, missing, found):
    (copied / f"{missing}.json").unlink()
    with pytest.raises(UserError, match=f"{missing}.json does not exist, but .*{found}.json does"):
        describe(Config(data_root=str(copied)))


@pytest.mark.parametrize("name", ["train.rec", "train.idx", "val.rec", "val.idx"])
def test_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(UserError, match=f"{copied}/{name}.*prepare.imagenet"):
        describe(Config(data_root=str(copied)))


def test_an_empty_file_is_named(copied):
    (copied / "val.idx").write_bytes(b"")
    with pytest.raises(UserError, match=f"{copied}/val.idx is empty.*prepare.imagenet"):
        describe(Config(data_root=str(copied)))


def test_a_file_of_another_size_than_in_its_manifest_is_named(copied):
    with open(copied / "val.rec", "ab") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match=f"{copied}/val.rec has 1000 bytes"):
        describe(Config(data_root=str(copied)))


def test_files_that_training_does_not_read_may_be_missing(copied):
    for name in ("train.lst", "val.lst", "train.sums", "val.sums"):
        (copied / name).unlink()
    assert describe(Config(data_root=str(copied))).train_examples == 1442


@pytest.mark.parametrize(
    "old, new, words",
    [
        ('"complete": true', '"complete": false', "incomplete"),
        ('"version": 2', '"version": 9', "version 2"),
        ('"format"', "nonsense", "cannot be read"),
        (None, "[]", "not of format"),
        (None, "[" * 100000, "cannot be read"),
        ('"files"', '"file"', "no list of files"),
        ('"examples": 1442', '"examples": "many"', "no positive number of images"),
        ('"classes"', '"class"', "no list of named classes"),
        ('"image_bytes": 1', '"image_bytes": 2', "its content differs from its sum"),
    ],
)
def test_a_manifest_that_is_not_valid_is_refused(copied, old, new, words):
    text = (copied / "train.json").read_text()
    assert old is None or old in text
    (copied / "train.json").write_text(new if old is None else text.replace(old, new, 1))
    with pytest.raises(UserError, match=words) as caught:
        describe(Config(data_root=str(copied)))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("manifests", [True, False])
@pytest.mark.parametrize("split, other", [("val", "train"), ("train", "val")])
def test_the_records_of_the_other_split_are_refused(copied, manifests, split, other):
    """An accuracy on training images is no result, and is mostly a better one."""
    settings = {
        f"data_{split}": str(copied / f"{other}.rec"),
        f"data_{split}_idx": str(copied / f"{other}.idx"),
    }
    if not manifests:
        for name in ("train", "val"):
            (copied / f"{name}.json").unlink()
        settings.update(num_examples=300, num_val_examples=300, num_classes=10)
    words = (
        f"{other}.json describes records of the split '{other}', and --data-{split} names them"
        if manifests
        else "the validation records .* are the file of the training records"
    )
    with pytest.raises(UserError, match=words):
        describe(Config(data_root=str(copied), **settings))


def test_a_manifest_of_another_split_is_refused(copied):
    """As for a copy of the training records with the name of the validation records."""
    change_manifest(copied / "val.json", lambda fields: fields.update(prefix="train"))
    with pytest.raises(UserError, match="val.json describes records of the split 'train'"):
        describe(Config(data_root=str(copied)))


def set_in(*keys, value):
    """Return a function that sets a value in a manifest."""

    def change(fields):
        for key in keys[:-1]:
            fields = fields[key]
        fields[keys[-1]] = value

    return change


def rename(*keys, new):
    """Return a function that gives a key of a manifest another name."""

    def change(fields):
        for key in keys[:-1]:
            fields = fields[key]
        fields[new] = fields.pop(keys[-1])

    return change


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    "change, words",
    [
        (set_in("classes", 3, "name", value="a\nb\0"), r"different classes.*'a\\nb\\x00'"),
        (set_in("classes", 3, "name", value="digit_4"), "a class name twice"),
        (set_in("classes", 3, "name", value=3), "no list of named classes"),
        (rename("classes", 9, "name", new="title"), "no list of named classes"),
        (set_in("classes", 3, "label", value=4), "in the order of their labels"),
        (set_in("classes", 3, "label", value=3.0), "in the order of their labels"),
        (set_in("complete", value="no"), "incomplete"),
        (set_in("version", value=True), "version 2"),
        (set_in("version", value=2.0), "version 2"),
        (set_in("files", value={}), "no list of files"),
        (set_in("examples", value=10**400), "too few for an index of 10000"),
        (set_in("examples", value=1442.0), "no positive number of images"),
        (set_in("examples", value=True), "no positive number of images"),
    ],
)
def test_a_manifest_with_other_types_or_names_is_refused(copied, split, change, words):
    change_manifest(copied / f"{split}.json", change)
    with pytest.raises(UserError, match=words) as caught:
        describe(Config(data_root=str(copied)))
    assert str(caught.value).isprintable()


def test_splits_with_different_classes_are_refused(copied):
    change_manifest(copied / "train.json", lambda fields: fields["classes"][3].update(name="trois"))
    with pytest.raises(UserError, match="different classes.*trois"):
        describe(Config(data_root=str(copied)))


def test_flipped_bits_of_a_manifest_are_found(copied):
    path = copied / "val.json"
    content = path.read_bytes()
    for position in [*range(0, len(content), 5), *range(len(content) - 90, len(content))]:
        damaged = bytearray(content)
        damaged[position] ^= (0x01, 0x02, 0x20, 0x80)[position % 4]
        path.write_bytes(bytes(damaged))
        with pytest.raises(UserError, match=f"manifest {path}|{copied}/val.rec"):
            describe(Config(data_root=str(copied)))


def test_a_manifest_of_version_1_is_read_and_noted(copied):
    assert cli.data_notes(Config(), describe(Config(data_root=str(copied))), "dali") == []
    make_version_1(copied / "train.json")
    data = describe(Config(data_root=str(copied)))
    assert data == DataSet(1442, 355, 10, True, has_sums=False)
    (note,) = cli.data_notes(Config(), data, "dali")
    assert "is of version 1, which has no sum" in note


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"num_classes": 1000}, "--num-classes 1000.*10"),
        ({"num_val_examples": 50000}, "--num-val-examples 50000.*355"),
        ({"num_examples": 5000}, "--num-examples 5000.*1442"),
    ],
)
def test_settings_that_contradict_the_manifest_are_refused(digits, settings, words):
    with pytest.raises(UserError, match=words):
        describe(Config(data_root=str(digits), **settings))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=5,
)
FILE_NAMES = st.sampled_from(["train.rec", "../train.rec", "\0.rec", "\ud800.idx", ".", "/.rec"])


@st.composite
def changes(draw):
    """Return a function that changes one value, somewhere in a manifest."""
    steps = draw(st.lists(st.integers(0, 99), min_size=1, max_size=4))
    action = draw(st.sampled_from(["replace", "delete", "add"]))
    value, name = draw(JSON_VALUES), draw(FILE_NAMES)

    def change(manifest):
        holder, key = {"root": manifest}, "root"
        for step in steps:
            inner = holder[key]
            if not isinstance(inner, (dict, list)) or not inner:
                break
            holder = inner
            key = (
                sorted(holder)[step % len(holder)]
                if isinstance(holder, dict)
                else step % len(holder)
            )
        if action == "add" and isinstance(holder, dict):
            holder[name] = value
        elif action == "delete":
            del holder[key]
        else:
            holder[key] = value

    return change


@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    mutations=st.lists(changes(), min_size=1, max_size=3), prefix=st.sampled_from(["train", "val"])
)
def test_a_changed_manifest_is_accepted_or_refused_without_another_error(copied, mutations, prefix):
    path = copied / f"{prefix}.json"
    original = path.read_text()
    manifest = copy.deepcopy(json.loads(original))
    for mutate in mutations:
        mutate(manifest)
    write_manifest(path, manifest)
    try:
        assert isinstance(describe(Config(data_root=str(copied))), DataSet)
    except UserError as error:
        assert str(error)
    finally:
        path.write_text(original)


@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.binary(max_size=60), position=st.integers(0, 2000))
def test_damaged_bytes_in_a_manifest_cause_no_other_error(copied, data, position):
    path = copied / "train.json"
    original = path.read_bytes()
    path.write_bytes(original[:position] + data + original[position + len(data) :])
    try:
        assert isinstance(describe(Config(data_root=str(copied))), DataSet)
    except UserError as error:
        assert str(error)
    finally:
        path.write_bytes(original)
