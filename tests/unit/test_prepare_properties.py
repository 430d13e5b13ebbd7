# SPDX-License-Identifier: Apache-2.0
"""Properties of the file format and of the manifest, checked with random input."""

import copy
import json
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import image_fixtures as images
from support.manifests import write_manifest

from prepare import destination, image_check, imagenet, manifest, pieces, recordio, verify
from prepare.plan import Plan
from prepare.record_set import RecordSet

MAGIC = recordio.MAGIC.to_bytes(4, "little")
FEW = settings(max_examples=60, deadline=None, derandomize=True)
FEW_WITH_FIXTURE = settings(FEW, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Image contents in which the magic word, or a part of it, is at any offset.
fragments = st.one_of(st.binary(max_size=9), st.just(MAGIC), st.just(MAGIC[:3]), st.just(MAGIC[1:]))
contents = st.lists(fragments, max_size=8).map(b"".join)


class FakeReader:
    """A fake ImageReader that reads the images from memory."""

    def __init__(self, image_list):
        self._images = image_list

    def read(self, record, view, begin=0):
        view[:] = self._images[record]


def make_plan(image_list):
    count = len(image_list)
    zeros = np.zeros(count, np.int64)
    return Plan(
        prefix="train",
        top="top",
        paths=[f"{number}.jpg" for number in range(count)],
        keys=(1 << 33) + np.arange(count),
        labels=np.arange(count),
        sizes=np.array([len(content) for content in image_list], np.int64),
        offsets=zeros,
        archive_indices=zeros - 1,
        mtimes_ns=zeros,
        archives=[],
        archive_states=[],
        classes=["."],
        image_folders=None,
        problems=[],
        ignored={},
        notes=[],
        left_out=0,
        digest="",
    )


def frame(image_list):
    """Return the piece of all the images."""
    plan, count = make_plan(image_list), len(image_list)
    buffer = np.full(recordio.record_bytes(plan.sizes).sum() // 4, 0xFFFFFFFF, recordio.WORD)
    reader = FakeReader(image_list)
    return pieces.build_piece(plan, 0, count, buffer, reader, image_check.ImageCheck("none"))


@FEW
@given(st.lists(contents, min_size=1, max_size=5))
def test_framed_records_can_be_joined(image_list):
    piece = frame(image_list)
    data = b"".join(piece.blocks)
    assert piece.lengths.sum() == len(data)
    assert recordio.record_sums(data, piece.lengths).tolist() == piece.sums.tolist()
    end = 0
    for number, (image, length) in enumerate(zip(image_list, piece.lengths.tolist())):
        content = recordio.join_record(data[end : end + length])
        assert content[recordio.IMAGE_HEADER_BYTES :] == image
        assert content[4:8] == np.float32(number).tobytes()
        assert int.from_bytes(content[8:16], "little") == (1 << 33) + number
        end += length


@FEW
@given(st.lists(contents, min_size=1, max_size=5))
def test_mxnet_reads_framed_records(image_list):
    mx = pytest.importorskip("mxnet")
    with tempfile.NamedTemporaryFile(suffix=".rec") as stream:
        stream.write(b"".join(frame(image_list).blocks))
        stream.flush()
        reader = mx.recordio.MXRecordIO(stream.name, "r")
        for number, image in enumerate(image_list):
            header, content = mx.recordio.unpack(reader.read())
            assert (header.flag, header.label, header.id) == (0, number, (1 << 33) + number)
            assert content == image
        assert reader.read() is None
        reader.close()


@FEW
@given(contents.map(lambda content: recordio.FRAME_BYTES * b"\0" + content))
def test_join_record_rejects_any_bytes_with_its_own_error(data):
    for candidate in (data, MAGIC + data):
        try:
            recordio.join_record(candidate)
        except ValueError as error:
            assert str(error).startswith("it")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """A converted data set of 21 small training records, some of them split at magic words."""
    folder = tmp_path_factory.mktemp("dataset")
    files = images.small_dataset(train=6)
    for number in range(3):
        files[f"train/n01440764/split{number}.JPEG"] = images.jpeg(b"p" * number + MAGIC * 4)
    images.write_files(folder / "in", files)
    assert imagenet.main([str(folder / "in"), str(folder / "out")]) == 0
    return folder / "out"


@contextmanager
def copy_of(folder):
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(shutil.copytree(str(folder), f"{scratch}/out"))


def find_errors(folder):
    records = RecordSet(str(folder), "train")
    verify.check_split(records, None, fast=False, workers=1)
    return records, records.errors


@FEW_WITH_FIXTURE
@given(st.data())
def test_any_changed_byte_is_attributed_to_its_record(dataset, data):
    with copy_of(dataset) as folder:
        path = folder / "train.rec"
        content = bytearray(path.read_bytes())
        offset = data.draw(st.integers(0, len(content) - 1), label="offset")
        content[offset] ^= data.draw(st.integers(1, 255), label="changed bits")
        path.write_bytes(bytes(content))
        records, errors = find_errors(folder)
        record = int(np.searchsorted(records.offsets, offset, side="right")) - 1
        assert len(errors) == 1 and f": record {record} (" in errors[0]


@FEW_WITH_FIXTURE
@given(st.data())
def test_any_truncation_is_attributed_to_the_missing_records(dataset, data):
    with copy_of(dataset) as folder:
        path = folder / "train.rec"
        size = data.draw(st.integers(0, path.stat().st_size - 1), label="size")
        path.write_bytes(path.read_bytes()[:size])
        records, errors = find_errors(folder)
        assert f"has {size} bytes" in errors[0]
        missing = np.flatnonzero(records.ends > size).tolist()
        assert len(errors) == 1 + len(missing)
        assert all(f": record {record} (" in error for record, error in zip(missing, errors[1:]))


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([10**400, -(10**400), 2**63, 1e308]),
        st.floats(),
        st.text(max_size=5),
    ),
    lambda children: st.one_of(
        st.lists(children, max_size=3), st.dictionaries(st.text(max_size=5), children, max_size=3)
    ),
    max_leaves=6,
)


def places_in(value):
    """Return the (container, key) of each value inside a JSON value."""
    items = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    found = [(value, key) for key, _ in items]
    for _, child in items:
        found += places_in(child)
    return found


def check_manifest_content(dataset, content):
    """Check that each reader of a manifest accepts it or raises its own error."""
    options = {"check": "ends", "on_error": "fail"}
    source = {"path": "in", "kind": "archive", "identity": "identity"}
    with copy_of(dataset) as folder:
        (folder / "train.json").write_bytes(content)
        for read in (
            lambda: manifest.load_manifest(str(folder), "train"),
            lambda: destination.is_finished(str(folder), "train", source, None, options),
            lambda: find_errors(folder),
        ):
            try:
                read()
            except manifest.DestinationError as error:
                assert "train." in str(error)


@FEW_WITH_FIXTURE
@given(st.one_of(st.binary(max_size=50), json_values.map(lambda value: json.dumps(value).encode())))
def test_any_content_of_a_manifest_gives_its_own_error(dataset, content):
    check_manifest_content(dataset, content)


def test_deeply_nested_manifest(dataset):
    check_manifest_content(dataset, b"[" * 100000)


@FEW_WITH_FIXTURE
@given(st.data())
def test_any_change_of_a_manifest_gives_its_own_error(dataset, data):
    changed = copy.deepcopy(json.loads((dataset / "train.json").read_text()))
    container, key = data.draw(st.sampled_from(places_in(changed)), label="place")
    if data.draw(st.booleans(), label="delete"):
        del container[key]
    else:
        container[key] = data.draw(json_values, label="new value")
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder, "changed.json"), changed)
        content = Path(folder, "changed.json").read_bytes()
    check_manifest_content(dataset, content)


@pytest.mark.parametrize("label", ["nan", "inf", "1e300"])
def test_label_that_is_not_a_finite_number(dataset, label):
    with copy_of(dataset) as folder:
        key, _, rest = (folder / "train.lst").read_text().split("\t", 2)
        (folder / "train.lst").write_text(f"{key}\t{label}\t{rest}")
        _, errors = find_errors(folder)
        assert any("is not a finite number" in error for error in errors), errors
