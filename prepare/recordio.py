# SPDX-License-Identifier: Apache-2.0
"""The wire format: MXNet RecordIO with image headers, its index and its list. Knows nothing of where images come from.

A record is one or more parts: magic, then a word holding the kind of part (top 3 bits: 0 whole, 1 first, 2 middle,
3 last) and its length (29 bits), the bytes, and zeros up to a multiple of 4. Its content is a 24-byte image header
(flag 0, label as float32, key, 0) and the image file's bytes. Where the magic number itself stands in the content at a
multiple of 4 the record is cut in two parts there and the four bytes are left out; a reader puts them back.
All numbers are little-endian. All sizes and offsets here are in bytes.
"""

import struct

import numpy as np

MAGIC = 0xCED7230A
WORD = np.dtype("<u4")
FRAME_BYTES = 8  # magic, kind and length
IMAGE_HEADER_BYTES = 24  # flag u32, label f32, key u64, 0 u64
PREFIX_WORDS = (FRAME_BYTES + IMAGE_HEADER_BYTES) // 4
LENGTH_MASK = (1 << 29) - 1
MAX_IMAGE_BYTES = LENGTH_MASK - IMAGE_HEADER_BYTES
SPLIT_GROWTH = 4  # a cut drops the 4 bytes of the magic number and adds a frame of 8
WHOLE, FIRST, MIDDLE, LAST = 0, 1, 2, 3


def record_bytes(image_bytes):
    """The size of the record of an image of this many bytes (a number or an array) when it is not cut."""
    return FRAME_BYTES + ((IMAGE_HEADER_BYTES + image_bytes + 3) & ~3)


def write_prefixes(words, starts, image_bytes, labels, keys):
    """Writes the first 32 bytes of each record, and the zeros that pad its end, into `words` (uint32).

    `starts` are the records' offsets in bytes, multiples of 4; the image bytes go 32 bytes after each.
    """
    at = starts // 4
    # The padding first: an image without bytes has none, and its last word is the header's.
    words[(starts + record_bytes(image_bytes)) // 4 - 1] = 0
    words[at] = MAGIC
    words[at + 1] = image_bytes + IMAGE_HEADER_BYTES
    words[at + 2] = 0
    words[at + 3] = labels.astype("<f4").view(WORD)
    words[at + 4] = keys & 0xFFFFFFFF
    words[at + 5] = keys >> 32
    words[at + 6] = 0
    words[at + 7] = 0


def find_cuts(words, starts):
    """Returns {record number: [offsets in words from the record's start]} of the magic numbers inside records.

    `words` holds whole uncut records that begin at `starts` (bytes).
    """
    hits = words == MAGIC
    if np.count_nonzero(hits) == len(starts):
        return {}
    cuts = {}
    at = starts // 4
    for word in np.flatnonzero(hits):
        record = int(np.searchsorted(at, word, side="right")) - 1
        if word != at[record]:
            cuts.setdefault(record, []).append(int(word - at[record]))
    return cuts


def cut_record(record, cuts):
    """Returns the bytes of the record `record` (whole, with frame) cut at the word offsets `cuts`."""
    length = struct.unpack_from("<I", record, 4)[0] & LENGTH_MASK
    content = bytes(record[FRAME_BYTES : FRAME_BYTES + length])
    edges = [word * 4 - FRAME_BYTES for word in cuts]
    begins = [0] + [edge + 4 for edge in edges]
    ends = edges + [length]
    parts = []
    for number, (begin, end) in enumerate(zip(begins, ends)):
        kind = FIRST if number == 0 else LAST if number == len(edges) else MIDDLE
        parts.append(struct.pack("<II", MAGIC, kind << 29 | (end - begin)) + content[begin:end])
    parts[-1] += b"\0" * (-length % 4)
    return b"".join(parts)


def join_record(record):
    """The inverse of framing: the content (image header and image) of one record's bytes.

    Raises ValueError saying what is wrong with the frame.
    """
    pieces, at = [], 0
    while True:
        if at + FRAME_BYTES > len(record):
            raise ValueError("ends inside a frame at byte %d" % at)
        magic, word = struct.unpack_from("<II", record, at)
        kind, length = word >> 29, word & LENGTH_MASK
        if magic != MAGIC:
            raise ValueError("has no magic number at byte %d" % at)
        if kind not in ((MIDDLE, LAST) if pieces else (WHOLE, FIRST)):
            raise ValueError("has a part of kind %d out of place at byte %d" % (kind, at))
        begin, at = at + FRAME_BYTES, at + FRAME_BYTES + ((length + 3) & ~3)
        if at > len(record):
            raise ValueError("says it is longer than the space to the next record")
        pieces.append(bytes(record[begin : begin + length]))
        if kind in (WHOLE, LAST):
            break
    if at != len(record):
        raise ValueError("says it is shorter than the space to the next record")
    return struct.pack("<I", MAGIC).join(pieces)


def word_sums(words, starts):
    """One 32-bit sum of its words per record: says which record of a damaged file is damaged, cheaply."""
    return np.add.reduceat(words, starts // 4, dtype=WORD) if len(starts) else np.zeros(0, WORD)


def sums_of(data, lengths):
    """word_sums of records that stand one after the other in `data`; lengths in bytes, 0 for a record left out."""
    kept = lengths > 0
    sums = np.zeros(len(lengths), WORD)
    sums[kept] = word_sums(np.frombuffer(data, WORD), (np.cumsum(lengths) - lengths)[kept])
    return sums


def index_lines(keys, offsets):
    """Yields blocks of the .idx file: `key TAB offset LF` per record."""
    for begin in range(0, len(keys), 65536):
        pairs = zip(keys[begin : begin + 65536].tolist(), offsets[begin : begin + 65536].tolist())
        yield "".join("%d\t%d\n" % pair for pair in pairs).encode()


def list_lines(keys, labels, paths):
    """Yields blocks of the .lst file: `key TAB label as %f TAB path LF` per record."""
    for begin in range(0, len(keys), 65536):
        rows = zip(
            keys[begin : begin + 65536].tolist(),
            labels[begin : begin + 65536].tolist(),
            paths[begin : begin + 65536],
        )
        yield "".join("%d\t%f\t%s\n" % row for row in rows).encode()
