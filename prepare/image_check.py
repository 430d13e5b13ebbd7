# SPDX-License-Identifier: Apache-2.0
"""Check that bytes are an image: by its first and last bytes, or by decoding it with DALI.

A check is a function check(raw, begins, sizes) that returns [(image index, reason)] of bad images:
`raw` (uint8) contains the images, which begin at `begins` and have `sizes` bytes (int64 arrays).
"""

from __future__ import annotations

import re
import threading
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np

JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
SCAN_MARKER = 0xDA
DECODE_BATCH = 32  # images
# Group 1 is DALI's message without the positions in DALI's source code.
DALI_ERROR = re.compile(r"Error in thread \d+: (?:\[[^]]*\] )*(.*)")

BadImage = Tuple[int, str]  # image index and reason


def check_nothing(raw: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> List[BadImage]:
    """Accept any bytes."""
    return []


def check_ends(raw: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> List[BadImage]:
    """Return the images that are neither complete JPEGs nor complete PNGs.

    A vectorized test accepts nearly every JPEG; only the other images are examined one by one.

    Args:
        raw: the bytes of all images (uint8).
        begins: index of each image's first byte in `raw`.
        sizes: bytes of each image.
    """
    accepted = sizes > 4
    for positions, byte in zip((begins, begins + 1, begins + 2), JPEG_START):
        accepted &= raw.take(positions, mode="clip") == byte
    for positions, byte in zip((begins + sizes - 2, begins + sizes - 1), JPEG_END):
        accepted &= raw.take(positions, mode="clip") == byte
    bad = []
    for index in np.flatnonzero(~accepted).tolist():
        reason = image_problem(raw[begins[index] : begins[index] + sizes[index]].tobytes())
        if reason is not None:
            bad.append((index, reason))
    return bad


def image_problem(image: bytes) -> Optional[str]:
    """Return why these bytes are not a complete JPEG or PNG, or None if they are.

    Bytes after the end of the image are allowed.
    """
    if not image:
        return "empty"
    if image.startswith(JPEG_START):
        scan = find_first_scan(image)
        if scan is None or image.rfind(JPEG_END) < scan:
            return "truncated: a JPEG without its end marker"
        return None
    if image.startswith(PNG_START):
        return None if PNG_END in image else "truncated: a PNG without its end"
    begin = " ".join(f"{byte:02x}" for byte in image[:8])
    return f"neither a JPEG nor a PNG: it begins with {begin}"


def find_first_scan(jpeg: bytes) -> Optional[int]:
    """Return the offset of the first start-of-scan marker in a JPEG, or None.

    The segments before it are skipped, because a thumbnail in one of them has its own end marker.
    Source of the format: ITU-T T.81, annex B.
    """
    at = 2
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF:
        marker = jpeg[at + 1]
        if marker == SCAN_MARKER:
            return at
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            at += 2
        else:
            at += 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
    return None


class DecodeCheck:
    """A check that decodes every image that passes check_ends, with DALI on the CPU.

    Each thread that calls it has its own pipeline.
    """

    def __init__(self) -> None:
        """Define the pipeline.

        Raises:
            ImportError: DALI is not installed.
        """
        from nvidia.dali import fn, pipeline_def

        # No prefetching: the pipeline would need more batches than it is fed.
        settings: Dict[str, Any] = {
            "batch_size": DECODE_BATCH,
            "num_threads": 1,
            "device_id": None,
            "prefetch_queue_depth": 1,
            "exec_async": False,
            "exec_pipelined": False,
        }

        @pipeline_def(**settings)
        def decode() -> Any:
            return fn.shapes(fn.decoders.image(fn.external_source(name="jpegs"), device="cpu"))

        self._make_pipeline = decode
        self._thread_state = threading.local()

    def __call__(self, raw: np.ndarray, begins: np.ndarray, sizes: np.ndarray) -> List[BadImage]:
        """Return the images that cannot be decoded; arguments as in check_ends."""
        bad = check_ends(raw, begins, sizes)
        bad_indices = {index for index, _ in bad}
        remaining = [index for index in range(len(sizes)) if index not in bad_indices]
        for first in range(0, len(remaining), DECODE_BATCH):
            batch = remaining[first : first + DECODE_BATCH]
            images = [raw[begins[index] : begins[index] + sizes[index]] for index in batch]
            if self._decode_problem(images) is None:
                continue
            for index, image in zip(batch, images):
                reason = self._decode_problem([image])
                if reason is not None:
                    bad.append((index, f"cannot be decoded: {reason}"))
        return bad

    def _decode_problem(self, images: Sequence[np.ndarray]) -> Optional[str]:
        """Return why DALI cannot decode a batch of images, or None if it can."""
        state = self._thread_state
        if getattr(state, "pipeline", None) is None:
            state.pipeline = self._make_pipeline()
            state.pipeline.build()
        try:
            state.pipeline.feed_input("jpegs", images)
            state.pipeline.run()
        except RuntimeError as error:
            state.pipeline = None  # a pipeline cannot be used after a failure
            match = DALI_ERROR.search(str(error))
            return match.group(1) if match else str(error).split("\n", 1)[0]
        return None
