# SPDX-License-Identifier: Apache-2.0
"""Files that unpack to far more than they contain, or are far too large, are not read whole."""

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
from support.image_fixtures import CLASSES, write_devkit

from mxresnet.data.dataset import _read_manifest
from mxresnet.errors import UserError
from mxresnet.results.submission import read_run
from prepare import val_labels
from prepare.journal import Journal
from prepare.listing import SourceError
from prepare.manifest import DestinationError, load_manifest
from prepare.matlab_file import check_matlab_file

MIB = 1 << 20
UNPACKED_BYTES = 320 * MIB
MAX_MEMORY_BYTES = 200 * MIB
COMPRESS = {"gz": lambda data: gzip.compress(data, 1), "bz2": bz2.compress, "xz": lzma.compress}


def compress_zeros(compression, size):
    """Return a compressed stream of zeros; each of the formats permits to concatenate streams."""
    return COMPRESS[compression](bytes(16 * MIB)) * (size // (16 * MIB))


def header(name, size, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def write_bomb(path, compression, kind):
    """Write an archive of at most 3 MB with UNPACKED_BYTES of zeros in it."""
    start = COMPRESS[compression](
        {
            "member": header("devkit/data/meta.mat", UNPACKED_BYTES),
            "pax header": header("x", UNPACKED_BYTES, tarfile.XHDTYPE),
            "long name": header("././@LongLink", UNPACKED_BYTES, tarfile.GNUTYPE_LONGNAME),
            "other member": header("devkit/data/video", UNPACKED_BYTES),
            "end": header("devkit/readme.txt", 0),
        }[kind]
    )
    path.write_bytes(start + compress_zeros(compression, UNPACKED_BYTES))
    assert path.stat().st_size < 3 * MIB


def refusal_within_bounds(read):
    """Check that `read` raises SourceError and needs little memory; return the message."""
    tracemalloc.start()
    try:
        with pytest.raises(SourceError) as refused:
            read()
        assert tracemalloc.get_traced_memory()[1] < MAX_MEMORY_BYTES
    finally:
        tracemalloc.stop()
    return str(refused.value)


@pytest.mark.parametrize(
    "compression, kind",
    [
        *[("gz", kind) for kind in ("member", "pax header", "other member", "end")],
        *[("bz2", "member"), ("xz", "long name")],
    ],
)
def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path, compression, kind):
    bomb = tmp_path / "devkit.tar"
    write_bomb(bomb, compression, kind)
    message = refusal_within_bounds(lambda: val_labels.read_label_file(str(bomb)))
    assert str(bomb) in message and "MiB" in message


def compressed_variable(size):
    """Return a MATLAB file with one compressed variable that unpacks to `size` zeros."""
    packer = zlib.compressobj(1)
    data = b"".join(packer.compress(bytes(16 * MIB)) for _ in range(size // (16 * MIB)))
    data += packer.flush()
    text = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    return text + (15).to_bytes(4, "little") + len(data).to_bytes(4, "little") + data


def test_a_meta_file_that_unpacks_to_far_more_is_refused(tmp_path):
    pytest.importorskip("scipy")
    write_devkit(str(tmp_path / "whole.tar.gz"), CLASSES, CLASSES)
    with tarfile.open(tmp_path / "whole.tar.gz") as tar:
        tar.extractall(tmp_path)
    folder = tmp_path / "ILSVRC2012_devkit_t12"
    (folder / "data" / "meta.mat").write_bytes(compressed_variable(UNPACKED_BYTES))
    message = refusal_within_bounds(lambda: val_labels.read_label_file(str(folder)))
    assert "meta.mat unpacks to too many bytes" in message


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("part", ["variable", "field"])
@pytest.mark.parametrize("dimensions", [(1 << 14, 1 << 14), (1 << 12, 1 << 10), (1 << 20, 1 << 12)])
def test_a_meta_file_with_larger_dimensions_than_values_is_refused(
    tmp_path, compressed, part, dimensions
):
    pytest.importorskip("scipy")
    write_devkit(str(tmp_path / "whole.tar.gz"), CLASSES, CLASSES)
    with tarfile.open(tmp_path / "whole.tar.gz") as tar:
        tar.extractall(tmp_path)
    folder = tmp_path / "ILSVRC2012_devkit_t12"
    content = bytearray((folder / "data" / "meta.mat").read_bytes())
    tag = struct.pack("<II", 5, 8)  # two dimensions
    at = content.index(tag, 128)
    if part == "field":
        at = content.index(tag, at + 1)
    struct.pack_into("<ii", content, at + 8, *dimensions)
    if compressed:
        variable = zlib.compress(content[128:])
        content[128:] = struct.pack("<II", 15, len(variable)) + variable
    (folder / "data" / "meta.mat").write_bytes(content)
    message = refusal_within_bounds(lambda: val_labels.read_label_file(str(folder)))
    assert "meta.mat has larger dimensions than values" in message


@pytest.mark.parametrize("compressed", [False, True])
def test_matlab_files_of_all_kinds_of_values_are_accepted(compressed):
    scipy_io = pytest.importorskip("scipy.io")
    row = {"a": np.arange(300.0), "b": "text", "c": [], "d": np.zeros((0, 3)), "e": {"f": 1}}
    cells = np.array([1, "x", np.ones((2, 2, 2), np.uint8), None], dtype=object)
    cells[3] = np.array(["long", "words"], dtype=object)
    file = io.BytesIO()
    variables = {"one": row, "two": cells, "three": np.array([row, row]), "four": 1 + 2j}
    scipy_io.savemat(file, variables, do_compression=compressed)
    content = file.getvalue()
    check_matlab_file(content, "meta.mat", MIB)
    assert set(variables) < set(scipy_io.loadmat(io.BytesIO(content)))


@pytest.mark.parametrize("name", ["meta.mat", "ILSVRC2012_validation_ground_truth.txt"])
def test_a_file_of_an_unpacked_devkit_that_is_far_too_large_is_refused(tmp_path, name):
    pytest.importorskip("scipy")
    write_devkit(str(tmp_path / "whole.tar.gz"), CLASSES, CLASSES)
    with tarfile.open(tmp_path / "whole.tar.gz") as tar:
        tar.extractall(tmp_path)
    folder = tmp_path / "ILSVRC2012_devkit_t12"
    os.truncate(folder / "data" / name, UNPACKED_BYTES)
    message = refusal_within_bounds(lambda: val_labels.read_label_file(str(folder)))
    assert name in message and "MiB" in message


def test_a_devkit_with_other_files_is_read(tmp_path):
    """The official archive has about 100 other members."""
    pytest.importorskip("scipy")
    write_devkit(str(tmp_path / "whole.tar.gz"), CLASSES, CLASSES)
    with tarfile.open(tmp_path / "whole.tar.gz") as tar:
        tar.extractall(tmp_path)
    with tarfile.open(tmp_path / "more.tar.gz", "w:gz", compresslevel=1) as tar:
        info = tarfile.TarInfo("ILSVRC2012_devkit_t12/evaluation/eval.m")
        info.size = 20 * MIB
        tar.addfile(info, io.BytesIO(bytes(info.size)))
        tar.add(tmp_path / "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12")
    labels = val_labels.read_label_file(str(tmp_path / "more.tar.gz"))
    assert labels.classes() == set(CLASSES)


def test_a_manifest_index_or_log_that_is_far_too_large_is_refused(tmp_path):
    path = tmp_path / "train.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    with pytest.raises(DestinationError, match="train.json has more than 512 MiB"):
        load_manifest(str(tmp_path), "train")
    with pytest.raises(UserError, match="train.json cannot be read .*more than 512 MiB"):
        _read_manifest(str(path), "train")
    with pytest.raises(UserError, match="train.json cannot be read: it has more than 256 MiB"):
        read_run(str(path))
    assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    tracemalloc.stop()


@pytest.mark.parametrize("content", ["huge", b"[" * 100_000 + b"\n"])
def test_a_file_that_is_no_journal_is_refused(tmp_path, content):
    path = tmp_path / "journal"
    if content == "huge":
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    else:
        path.write_bytes(content)
    size = path.stat().st_size
    with pytest.raises(DestinationError, match="journal: .*move it away"):
        Journal(str(tmp_path), {})
    assert path.stat().st_size == size
