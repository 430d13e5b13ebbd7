# SPDX-License-Identifier: Apache-2.0
"""Files of named arrays: MXNet's format (.params) and NumPy's (.npz), read without MXNet.

MXNet must not be called from the thread that writes checkpoints: with MXNET_ENGINE_TYPE=NaiveEngine
its calls are not safe in two threads.

Source of the format: MXNet 1.9.1, src/ndarray/ndarray.cc, NDArray::Save. All numbers are
little-endian.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from typing import Any, BinaryIO, Dict, Mapping

import numpy as np

from mxresnet.checkpoint.manifest import DamagedError

_LIST_MAGIC = 0x112
_ARRAY_MAGIC = 0xF993FAC9  # version 2
_DENSE = 0
_CPU = 1
_TYPES: Dict[int, np.dtype[Any]] = {
    0: np.dtype("<f4"),
    1: np.dtype("<f8"),
    2: np.dtype("<f2"),
    3: np.dtype("u1"),
    4: np.dtype("<i4"),
    5: np.dtype("i1"),
    6: np.dtype("<i8"),
}
_NUMBERS = {dtype: number for number, dtype in _TYPES.items()}
_MAX_AXES = 8


def write_params(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays, which may not be scalars; the file is on the disk when this returns.

    Args:
        path: of the file.
        arrays: by name: "arg:NAME" for a weight, "aux:NAME" for a running statistic.

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, "wb") as file:
        file.write(struct.pack("<QQQ", _LIST_MAGIC, 0, len(arrays)))
        for array in arrays.values():
            type_number = _NUMBERS[array.dtype.newbyteorder("<")]
            file.write(struct.pack("<Iii", _ARRAY_MAGIC, _DENSE, array.ndim))
            file.write(struct.pack(f"<{array.ndim}q", *array.shape))
            file.write(struct.pack("<iii", _CPU, 0, type_number))
            file.write(np.ascontiguousarray(array, dtype=_TYPES[type_number]).data)
        file.write(struct.pack("<Q", len(arrays)))
        for name in arrays:
            file.write(struct.pack("<Q", len(name.encode())) + name.encode())
        file.flush()
        os.fsync(file.fileno())


def read_params(path: str) -> Dict[str, np.ndarray]:
    """Return the named arrays of a file.

    Raises:
        DamagedError: it cannot be read, or is not in MXNet's format with dense arrays and names.
    """
    name = os.path.basename(path)
    try:
        with open(path, "rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise DamagedError(f"{name} cannot be read ({error.strerror})") from None
    except (ValueError, struct.error, KeyError, OverflowError):
        raise DamagedError(f"{name} is not a file of MXNet's arrays with names") from None


def write_npz(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Write named arrays in NumPy's format; the file is on the disk when this returns.

    Raises:
        OSError: the file cannot be written.
    """
    with open(path, "wb") as file:
        np.savez(file, **arrays)
        file.flush()
        os.fsync(file.fileno())


def read_npz(path: str) -> Dict[str, np.ndarray]:
    """Return the named arrays of a file; pickled objects are refused.

    Raises:
        DamagedError: it cannot be read, or is not a file of plain arrays.
    """
    name = os.path.basename(path)
    try:
        with np.load(path, allow_pickle=False) as content:
            return {key: content[key] for key in content.files}
    except OSError as error:
        raise DamagedError(f"{name} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error):
        raise DamagedError(f"{name} is not a file of NumPy's arrays") from None


def _read(file: BinaryIO, size: int) -> Dict[str, np.ndarray]:
    def unpack(form: str) -> Any:
        return struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))

    magic, _, count = unpack("QQQ")
    if magic != _LIST_MAGIC or count > size:
        raise ValueError(magic)
    arrays = []
    for _ in range(count):
        array_magic, storage, axes = unpack("Iii")
        if array_magic != _ARRAY_MAGIC or storage != _DENSE or not 0 < axes <= _MAX_AXES:
            raise ValueError(array_magic)
        shape = unpack(f"{axes}q")
        _, _, type_number = unpack("iii")
        dtype = _TYPES[type_number]
        length = math.prod(shape) * dtype.itemsize
        if min(shape) < 0 or length > size:
            raise ValueError(shape)
        arrays.append(np.frombuffer(file.read(length), dtype).reshape(shape))
    names = []
    if unpack("Q") != (count,):
        raise ValueError(count)
    for _ in range(count):
        (length,) = unpack("Q")
        if length > size:
            raise ValueError(length)
        names.append(file.read(length).decode())
    return dict(zip(names, arrays))
