# SPDX-License-Identifier: Apache-2.0
"""Check that bytes are an image: by its first and last bytes, or by decoding it.

An image whose ends are unusual is decoded as in training: if that succeeds it is kept and noted, so
that no harmless oddity ends a conversion of hours.
"""

from __future__ import annotations

from typing import Dict, NamedTuple, Optional

import numpy as np

from prepare.decode_process import DECODED, FAILED, NOT_TRIED, Verdict
from prepare.decoder import Decoder
from prepare.jpeg_format import JPEG_END, JPEG_START, find_data_end, find_first_scan

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
END_BYTES = 8  # of each end of an image, enough to recognize its format
CHECKS = ("none", "ends", "decode")
NO_END_MARKER = "a JPEG without its end marker"


class Findings(NamedTuple):
    """What a check has found: {index of the image: description}."""

    bad: Dict[int, str]
    unusual: Dict[int, str]  # can be decoded


class Ends(NamedTuple):
    """What is unusual about the ends of an image."""

    description: str
    is_cut: bool = False  # has no end: the last pixels may be missing
    may_be_whole: bool = True  # as far as is known without decoding it


class ImageCheck:
    """A check of images, for any number of threads; a context manager."""

    def __init__(self, kind: str) -> None:
        """Prepare the check; no decoder is started yet.

        Args:
            kind: one of CHECKS. "none": accept any bytes; "ends": decode only images with unusual
                ends; "decode": decode all images.
        """
        self._kind = kind
        self._decoder = Decoder()

    def __enter__(self) -> ImageCheck:
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder.close()

    def require_decoder(self) -> None:
        """Raise ImportError or DecoderError if all images are to be decoded, without DALI."""
        if self._kind == "decode":
            self._decoder.require("DALI")

    def accepts_ends(self, begin: bytes, end: bytes) -> bool:
        """Return whether an image with these ends, of END_BYTES each, need not be checked."""
        if self._kind == "ends":
            return is_jpeg(begin, end) or is_png(begin, end)
        return self._kind == "none"

    def __call__(self, raw: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> Findings:
        """Check images.

        Args:
            raw: the bytes of all images (uint8).
            begins: index of each image's first byte in `raw`.
            sizes: bytes of each image.
        """
        findings = Findings({}, {})
        if self._kind == "none":
            return findings

        def image(index: int) -> memoryview:
            return raw[begins[index] : begins[index] + sizes[index]].data

        ends: Dict[int, Ends] = {}
        for index in np.flatnonzero(~has_jpeg_ends(raw, begins, sizes)).tolist():
            unusual = inspect_ends(bytes(image(index)))
            if unusual is not None:
                ends[index] = unusual
        indices = list(ends) if self._kind == "ends" else range(len(sizes))
        to_decode = [index for index in indices if sizes[index]]
        may_be_cut = [index in ends for index in to_decode]
        verdicts = self._decoder.check([image(index) for index in to_decode], may_be_cut)
        for index, verdict in zip(to_decode, verdicts):
            add_finding(findings, index, ends.get(index), verdict)
        findings.bad.update({index: "empty" for index in indices if not sizes[index]})
        return findings


def has_jpeg_ends(raw: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return for each image whether it begins and ends as a JPEG; arguments as of ImageCheck."""
    accepted = sizes > len(JPEG_START + JPEG_END) - 1
    for positions, byte in zip((begins, begins + 1, begins + 2), JPEG_START):
        accepted &= raw.take(positions, mode="clip") == byte
    for positions, byte in zip((begins + sizes - 2, begins + sizes - 1), JPEG_END):
        accepted &= raw.take(positions, mode="clip") == byte
    return accepted


def is_jpeg(begin: bytes, end: bytes) -> bool:
    """Return whether the ends of an image are those of a JPEG."""
    return begin.startswith(JPEG_START) and end.endswith(JPEG_END)


def is_png(begin: bytes, end: bytes) -> bool:
    """Return whether the ends of an image are those of a PNG."""
    return begin.startswith(PNG_START) and end.endswith(PNG_END)


def add_finding(findings: Findings, index: int, ends: Optional[Ends], verdict: Verdict) -> None:
    """Add what is known about an image that was, or could not be, decoded.

    Args:
        findings: where to add it.
        index: of the image.
        ends: what is unusual about its ends; None: nothing.
        verdict: the decoder's.
    """
    result, text = verdict
    if ends is None:
        if result != DECODED:
            selected = findings.bad if result == FAILED else findings.unusual
            selected[index] = text
    elif result == DECODED or result == NOT_TRIED and ends.may_be_whole:
        findings.unusual[index] = f"{ends.description}; {text}"
    else:
        cut = "truncated: " if ends.is_cut else ""
        findings.bad[index] = f"{cut}{ends.description}; {text}"


def inspect_ends(image: bytes) -> Optional[Ends]:
    """Return what is unusual about the ends of an image; None: it is a complete JPEG or PNG."""
    if is_jpeg(image, image) or is_png(image, image):
        return None
    if image.startswith(JPEG_START):
        data_end = find_data_end(image)
        if not data_end.has_marker:
            may_be_whole = find_first_scan(image) is not None
            return Ends(NO_END_MARKER, True, may_be_whole)
        rest = len(image) - image.index(JPEG_END, data_end.offset) - len(JPEG_END)
        return Ends(f"a JPEG with {rest} bytes after its end marker")
    if image.startswith(PNG_START):
        end = image.rfind(PNG_END)
        if end < 0:
            return Ends("a PNG without its end", True, may_be_whole=False)
        return Ends(f"a PNG with {len(image) - end - len(PNG_END)} bytes after its end")
    begin = " ".join(f"{byte:02x}" for byte in image[:END_BYTES])
    return Ends(f"neither a JPEG nor a PNG: it begins with {begin}", may_be_whole=False)
