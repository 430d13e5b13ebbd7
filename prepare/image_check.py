# SPDX-License-Identifier: Apache-2.0
"""Is this an image? By its first and last bytes, or by decoding it with the decoder that training uses."""

import re
import threading

import numpy as np

JPEG_START, JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"
SCAN_MARKER = 0xDA
DECODE_BATCH = 32
DALI_ERROR = re.compile(
    r"Error in thread \d+: (?:\[[^]]*\] )*(.*)"
)  # after the places in DALI's own source


def check_nothing(raw, begins, sizes):
    """Accepts any bytes."""
    return []


def check_ends(raw, begins, sizes):
    """Returns [(number, reason)] for the images that are neither whole JPEGs nor whole PNGs.

    `raw` (uint8) holds the images at `begins`, `sizes` bytes each. What nearly every JPEG satisfies is looked at for
    all of them at once; only the others are looked at one by one.
    """
    sure = sizes > 4
    for places, byte in zip((begins, begins + 1, begins + 2), JPEG_START):
        sure &= raw.take(places, mode="clip") == byte
    for places, byte in zip((begins + sizes - 2, begins + sizes - 1), JPEG_END):
        sure &= raw.take(places, mode="clip") == byte
    found = []
    for number in np.flatnonzero(~sure).tolist():
        reason = problem_of(raw[begins[number] : begins[number] + sizes[number]].tobytes())
        if reason:
            found.append((number, reason))
    return found


def problem_of(image):
    """Why these bytes are not a whole JPEG or PNG, or None. Bytes after the end of the image are allowed."""
    if not image:
        return "empty"
    if image.startswith(JPEG_START):
        scan = first_scan(image)
        if scan is None or image.rfind(JPEG_END) < scan:
            return "truncated: a JPEG without its end marker"
        return None
    if image.startswith(PNG_START):
        return None if PNG_END in image else "truncated: a PNG without its end"
    return "neither a JPEG nor a PNG: it begins with %s" % " ".join(
        "%02x" % byte for byte in image[:8]
    )


def first_scan(jpeg):
    """Where the compressed data begin, or None. Steps over the segments before: a thumbnail has an end marker too."""
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
    """Decodes every image with DALI on the CPU, after check_ends. Each thread has a pipeline of its own.

    Raises ImportError when DALI is not installed.
    """

    def __init__(self):
        from nvidia.dali import fn, pipeline_def

        # One batch at a time: a pipeline that runs ahead would ask for more images than it was given.
        once = dict(prefetch_queue_depth=1, exec_async=False, exec_pipelined=False)

        @pipeline_def(batch_size=DECODE_BATCH, num_threads=1, device_id=None, **once)
        def decode():
            return fn.shapes(fn.decoders.image(fn.external_source(name="jpegs"), device="cpu"))

        self._pipeline = decode
        self._local = threading.local()

    def __call__(self, raw, begins, sizes):
        found = check_ends(raw, begins, sizes)
        bad = {number for number, _ in found}
        numbers = [number for number in range(len(sizes)) if number not in bad]
        for at in range(0, len(numbers), DECODE_BATCH):
            batch = numbers[at : at + DECODE_BATCH]
            jpegs = [raw[begins[number] : begins[number] + sizes[number]] for number in batch]
            if self._failure(jpegs) is not None:
                reasons = [(number, self._failure([jpeg])) for number, jpeg in zip(batch, jpegs)]
                found += [
                    (number, "cannot be decoded: %s" % reason)
                    for number, reason in reasons
                    if reason
                ]
        return found

    def _failure(self, jpegs):
        """Why DALI cannot decode these images, or None. After a failure a pipeline is of no further use."""
        if getattr(self._local, "pipeline", None) is None:
            self._local.pipeline = self._pipeline()
            self._local.pipeline.build()
        try:
            self._local.pipeline.feed_input("jpegs", jpegs)
            self._local.pipeline.run()
        except RuntimeError as error:
            self._local.pipeline = None
            told = DALI_ERROR.search(str(error))
            return told.group(1) if told else str(error).split("\n", 1)[0]
        return None
