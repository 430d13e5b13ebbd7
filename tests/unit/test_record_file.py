# SPDX-License-Identifier: Apache-2.0
"""Damaged indices, headers and labels of record files, which both backends would read as they are.

Without the checks, most of these cases end the process with SIGSEGV or train on wrong data.
"""

import struct

import numpy as np
import pytest
from support.records import (
    labels_of,
    open_loaders,
    pack_images,
    random_images,
    write_record_file,
)

from mxresnet.data.record_file import find_wrong_label
from mxresnet.errors import UserError
from mxresnet.parallel.world import World

IMAGES = random_images(24)
BACKENDS = pytest.mark.parametrize("use_dali", [True, False])


def write(folder, val_labels=range(24)):
    """Write 24 training images, and validation images with these labels."""
    write_record_file(folder, "train", pack_images(IMAGES, range(24)))
    write_record_file(folder, "val", pack_images(IMAGES, val_labels))
    return folder


def refused(folder, match, **settings):
    with pytest.raises(UserError, match=match) as caught:
        _, val = open_loaders(folder, 24, 24, **settings)
        labels_of(val.batches())
    assert "\n" not in str(caught.value)


@BACKENDS
@pytest.mark.parametrize(
    "wrong", [7.5, -1, 1000, np.nan, np.inf, -np.inf, 1e30, np.float32(1e-40), [1000], [-2.0]]
)
def test_a_wrong_label_is_refused_with_the_number_of_its_record(tmp_path, use_dali, wrong):
    labels = [0] * 24
    labels[17] = wrong
    refused(write(tmp_path, labels), "val.rec: record 17 has the label", use_dali=use_dali)


@BACKENDS
@pytest.mark.parametrize("labels", [[[1, 2]] * 24, [0] * 23 + [[1, 2]], [[1] * 7] * 24])
def test_several_labels_are_refused(tmp_path, use_dali, labels):
    refused(write(tmp_path, labels), r"labels? ", use_dali=use_dali)


@BACKENDS
def test_a_wrong_label_of_a_training_record_is_found_in_the_first_epoch(tmp_path, use_dali):
    write(tmp_path)
    labels = [0] * 23 + [-1]
    write_record_file(tmp_path, "train", pack_images(IMAGES, labels))
    train, _ = open_loaders(tmp_path, 24, 24, use_dali=use_dali)
    with pytest.raises(UserError, match="training records .*record 23 has the label -1"):
        list(train.batches(3))


@BACKENDS
def test_labels_of_every_rank_are_checked(tmp_path, use_dali):
    write(tmp_path, [0] * 23 + [3000])
    found = []
    for rank in range(3):
        _, val = open_loaders(tmp_path, 24, 24, World(rank, 3), use_dali=use_dali)
        try:
            list(val.batches())
        except UserError as error:
            found.append(str(error))
    assert len(found) == 1 and "record 23 has the label 3000" in found[0]


def test_the_position_of_a_wrong_label():
    assert find_wrong_label(np.array([0, 1, 2], np.float32), 3) is None
    assert find_wrong_label(np.array([0, 3, np.nan], np.float32), 3) == 1


def index_lines(text):
    """Return a function that replaces the lines of an index, from the last on."""
    new = text.splitlines(keepends=True)
    return lambda lines: lines[: len(lines) - len(new)] + new


@BACKENDS
@pytest.mark.parametrize(
    "change, words",
    [
        (index_lines("23\t-5\n"), "record 23 at byte -5"),
        (index_lines("23\t-8\n"), "record 23 at byte -8"),
        (index_lines("23\t99999996\n"), "record 23 at byte 99999996"),
        (index_lines("23\t99999999999999999999\n"), "record 23 at byte 9223372036854775807"),
        (index_lines("23\t12\n"), "at byte 0 and the next record.* at byte 12"),
        (index_lines("23\t0\n"), "record 0 at byte 0"),
        (index_lines("23\t6\n"), "byte 6"),
        (index_lines("23\n"), "not a list"),
        (index_lines("23\tnan\n"), "not a list"),
        (index_lines("23\t1e3\n"), "not a list"),
        (index_lines("<html></html>\n"), "not a list"),
        (lambda lines: [" \n"], "not a list"),
        (lambda lines: ["\0" * 40], "not a list"),
        (lambda lines: lines[1:], "not 24 and 24"),
        (lambda lines: [line.replace("\t", "\t4") for line in lines], "byte 4"),
    ],
)
def test_a_damaged_index_is_refused(tmp_path, use_dali, change, words):
    write(tmp_path)
    path = tmp_path / "val.idx"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    refused(tmp_path, words, use_dali=use_dali)


@BACKENDS
@pytest.mark.parametrize("record", [0, 11, 23])
@pytest.mark.parametrize(
    "position, word, words",
    [
        (0, 0, "does not start at byte"),
        (4, 0x1FFFFFFF, "length of 536870911 bytes"),
        (4, 100_000, "length of 100000 bytes"),
        (4, 0xFFFFFFFF, "does not start at byte"),
        (4, 2 << 29 | 64, "does not start at byte"),
        (4, 0, "0 labels in 0 bytes"),
        (4, 20, "0 labels in 20 bytes"),
        (8, 0x7FFFFFFF, "2147483647 labels"),
    ],
)
def test_a_damaged_header_is_refused(tmp_path, use_dali, record, position, word, words):
    write(tmp_path)
    offset = int((tmp_path / "val.idx").read_text().splitlines()[record].split("\t")[1])
    with open(tmp_path / "val.rec", "r+b") as file:
        file.seek(offset + position)
        file.write(struct.pack("<I", word))
    refused(tmp_path, f"record {record} .*{words}", use_dali=use_dali)


@BACKENDS
@pytest.mark.parametrize("missing", [1, 5, 1000, 3000])
def test_a_truncated_record_file_is_refused(tmp_path, use_dali, missing):
    write(tmp_path)
    with open(tmp_path / "val.rec", "r+b") as file:
        file.truncate(file.seek(0, 2) - missing)
    refused(tmp_path, "val.rec: ", use_dali=use_dali)


def test_ranks_check_the_headers_together(tmp_path):
    write(tmp_path)
    for line in (tmp_path / "val.idx").read_text().splitlines():
        with open(tmp_path / "val.rec", "r+b") as file:
            file.seek(int(line.split("\t")[1]))
            file.write(b"bad!")
    for rank in range(3):
        with pytest.raises(UserError, match=f"record {rank} does not start"):
            open_loaders(tmp_path, 24, 24, World(rank, 3))


@BACKENDS
def test_an_index_in_another_order_or_of_some_records_is_accepted(tmp_path, use_dali):
    write(tmp_path)
    path = tmp_path / "val.idx"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:4:-2], *lines[6::2]]))
    _, val = open_loaders(tmp_path, 24, 19, use_dali=use_dali)
    assert len(labels_of(val.batches())) == 19


@BACKENDS
def test_a_record_in_several_parts_is_accepted(tmp_path, use_dali):
    """RecordIO divides a record where its data contains the constant that starts a record."""
    write(tmp_path)
    magic = struct.pack("<I", 0xCED7230A)
    comment = b"\xff\xfe\x00\x0c.." + magic * 2
    packed = pack_images(IMAGES, range(24))
    packed[5] = packed[5][:26] + comment + packed[5][26:]
    write_record_file(tmp_path, "val", packed)
    assert (tmp_path / "val.rec").read_bytes().count(magic) == 24 + 2
    _, val = open_loaders(tmp_path, 24, 24, use_dali=use_dali)
    assert sorted(labels_of(val.batches())) == list(range(24))
