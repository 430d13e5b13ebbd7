# SPDX-License-Identifier: Apache-2.0
"""The process that decodes images for `prepare.decoder`.

A request on standard input is a line of JSON with the sizes of the images, followed by their bytes.
A reply on standard output is a line of JSON. The process ends when its standard input ends.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np

from prepare.cpus import usable_cpus
from prepare.jpeg_format import JPEG_END, JPEG_START, find_data_end

DECODED, FAILED, NOT_TRIED = "decoded", "failed", "not tried"  # what became of an image
MAX_PIXELS = 1 << 26  # decoded at the same time; 192 MiB
MAX_BATCH = 32  # images
UNUSED_BYTES = 4  # at the end of a JPEG; codes of no pixel, if their values change nothing
# Continues an incomplete JPEG. It contains no marker, because it has no byte of 255.
NOISE = np.random.RandomState(0).randint(0, 255, 1 << 16).astype(np.uint8).tobytes()
# DALI's message without the positions in DALI's source code.
DALI_ERROR = re.compile(r"Error in thread \d+: (?:\[[^]]*\] )*(.*)")

Verdict = Tuple[str, str]  # what became of an image, and a text with the decoder's name or a reason


class DecodeError(Exception):
    """An image cannot be decoded; the message is the decoder's reason."""


class Dali:
    """DALI's decoder on the CPU."""

    name = "DALI"

    def __init__(self) -> None:
        """Define the pipelines. Raises ImportError if DALI is not installed."""
        from nvidia.dali import fn, pipeline_def

        # No prefetching: the pipeline would need more batches than it is fed.
        settings: Dict[str, Any] = {
            "batch_size": MAX_BATCH,
            "num_threads": usable_cpus(),
            "device_id": None,
            "prefetch_queue_depth": 1,
            "exec_async": False,
            "exec_pipelined": False,
        }

        @pipeline_def(**settings)
        def decode() -> Any:
            return fn.decoders.image(fn.external_source(name="images"), device="cpu")

        @pipeline_def(**settings)
        def peek() -> Any:
            return fn.peek_image_shape(fn.external_source(name="images"))

        self._definitions = {"decode": decode, "peek": peek}
        self._pipelines: Dict[str, Any] = {}

    def count_pixels(self, images: Sequence[np.ndarray]) -> List[int]:
        """Return the number of pixels of images, from their headers. Raises DecodeError."""
        return [int(height * width) for height, width, _ in self._run("peek", images)]

    def decode(self, images: Sequence[np.ndarray]) -> List[np.ndarray]:
        """Return the pixels of images. Raises DecodeError."""
        return self._run("decode", images)

    def _run(self, kind: str, images: Sequence[np.ndarray]) -> List[np.ndarray]:
        if kind not in self._pipelines:
            self._pipelines[kind] = self._definitions[kind]()
            self._pipelines[kind].build()
        pipeline = self._pipelines[kind]
        try:
            pipeline.feed_input("images", images)
            (output,) = pipeline.run()
        except RuntimeError as error:
            del self._pipelines[kind]  # it cannot be used after a failure
            raise DecodeError(dali_reason(str(error))) from None
        return [np.asarray(output.at(index)) for index in range(len(images))]


def dali_reason(message: str) -> str:
    """Return the reason in DALI's message as a part of a sentence."""
    match = DALI_ERROR.search(message)
    reason = match.group(1) if match else message.split("\n", 1)[0]
    if reason.startswith("Assert on"):  # a condition in DALI's source code
        return "its data are damaged or incomplete"
    return reason.rstrip(".")


class OpenCv:
    """OpenCV's decoder."""

    name = "OpenCV"

    def __init__(self) -> None:
        """Import the library. Raises ImportError if it is not installed."""
        os.environ["OPENCV_IO_MAX_IMAGE_PIXELS"] = str(MAX_PIXELS)
        import cv2

        self._cv2: Any = cv2

    def count_pixels(self, images: Sequence[np.ndarray]) -> List[int]:
        """Return zeros: OpenCV checks the limit itself."""
        return [0] * len(images)

    def decode(self, images: Sequence[np.ndarray]) -> List[np.ndarray]:
        """Return the pixels of images. Raises DecodeError."""
        try:
            decoded = [self._cv2.imdecode(image, self._cv2.IMREAD_COLOR) for image in images]
        except self._cv2.error as error:
            raise DecodeError(str(error).strip().split("\n", 1)[0]) from None
        if any(pixels is None for pixels in decoded):
            raise DecodeError("it is damaged, or has an unknown format")
        return decoded


ImageDecoder = Union[Dali, OpenCv]


def find_decoder() -> Tuple[Optional[ImageDecoder], Dict[str, Any]]:
    """Find the decoder that training would use here.

    Returns:
        It, or None; and the first reply: its name, {other decoder: why it is not used}, and whether
        one of these is installed.
    """
    failures: Dict[str, str] = {}
    is_installed = False
    found: Optional[ImageDecoder] = None
    for kind in (Dali, OpenCv):
        try:
            found = kind()
            break
        except ModuleNotFoundError as error:
            failures[kind.name] = str(error)
        except Exception as error:  # a library may fail in any way, such as for lack of memory
            failures[kind.name] = " ".join(str(error).split()) or type(error).__name__
            is_installed = True
    name = found.name if found else None
    return found, {"name": name, "failures": failures, "is_installed": is_installed}


def check_images(
    decoder: ImageDecoder, images: Sequence[np.ndarray], may_be_cut: Sequence[bool]
) -> List[Verdict]:
    """Decode images, few enough at a time to limit the memory.

    Args:
        decoder: what decodes them.
        images: the bytes of each.
        may_be_cut: whether its last pixels may be missing.
    """
    verdicts: Dict[int, Verdict] = {}
    batches: List[List[int]] = []
    room = 0  # pixels that fit into the last batch
    for index, pixels in enumerate(call_for_each(decoder.count_pixels, images)):
        if isinstance(pixels, DecodeError):
            verdicts[index] = (FAILED, f"{decoder.name} cannot decode it: {pixels}")
        elif pixels > MAX_PIXELS:
            verdicts[index] = (NOT_TRIED, f"not decoded, because it has {pixels} pixels")
        else:
            if not batches or pixels > room or len(batches[-1]) == MAX_BATCH:
                batches.append([])
                room = MAX_PIXELS
            batches[-1].append(index)
            room -= pixels
    for batch in batches:
        results = call_for_each(decoder.decode, [images[index] for index in batch])
        for index, result in zip(batch, results):
            if isinstance(result, DecodeError):
                verdicts[index] = (FAILED, f"{decoder.name} cannot decode it: {result}")
            else:
                reason = cut_reason(decoder, images[index].tobytes()) if may_be_cut[index] else None
                decoded = (DECODED, f"{decoder.name} decodes it")
                verdicts[index] = decoded if reason is None else (FAILED, reason)
        del results
    return [verdicts[index] for index in range(len(images))]


def call_for_each(
    function: Callable[[Sequence[np.ndarray]], List[Any]], images: Sequence[np.ndarray]
) -> List[Any]:
    """Return what `function` returns for images, or a DecodeError in place of a result."""
    results: List[Any] = []
    for begin in range(0, len(images), MAX_BATCH):
        batch = images[begin : begin + MAX_BATCH]
        try:
            results += function(batch)
        except DecodeError as error:
            if len(batch) == 1:
                results.append(error)
            else:
                results += [
                    result for image in batch for result in call_for_each(function, [image])
                ]
    return results


def cut_reason(decoder: ImageDecoder, image: bytes) -> Optional[str]:
    """Return why an image that can be decoded is cut off; None: it is whole, or is no JPEG.

    A decoder replaces what is missing. Then the pixels depend on the bytes that follow the data;
    those of an image that lacks nothing but the end marker do not. Other bytes may have taken the
    place of the missing ones; then the pixels do not depend on the last of them.
    """
    if not image.startswith(JPEG_START):
        return None
    end, has_marker = find_data_end(image)
    data = image[:end]
    if has_marker:
        return find_defect(decoder, data, may_have_more=True)
    # A byte of 255 is the first byte of the end marker, or a part of a code. Zeros may be padding.
    content = data.rstrip(b"\0")
    candidates = [data.rstrip(b"\xff")]
    if len(content) < len(data):
        candidates += [content.rstrip(b"\xff"), content + b"\0"]
    defects = []
    for candidate in candidates:
        defects.append(find_defect(decoder, candidate, may_have_more=False))
        if defects[-1] is None:
            return None
    return defects[0]


def find_defect(decoder: ImageDecoder, data: bytes, may_have_more: bool) -> Optional[str]:
    """Return what is wrong with the data of a JPEG, or None.

    Args:
        decoder: what decodes it.
        data: the JPEG up to its end marker, which is left out.
        may_have_more: whether unused bytes may follow the last pixel.
    """
    try:
        pixels = decode_jpeg(decoder, data)
    except DecodeError as error:
        return f"{decoder.name} cannot decode it without the bytes after its data: {error}"
    if not has_pixels(decoder, data + NOISE, pixels):
        return "its last pixels are missing"
    others = (data[:-UNUSED_BYTES] + NOISE[begin:] for begin in range(0, len(NOISE), 1 << 13))
    if not may_have_more and all(has_pixels(decoder, other, pixels) for other in others):
        return "its last bytes belong to no pixel: others are missing"
    return None


def has_pixels(decoder: ImageDecoder, data: bytes, pixels: np.ndarray) -> bool:
    """Return whether a JPEG, given without its end marker, can be decoded and has these pixels."""
    try:
        return np.array_equal(decode_jpeg(decoder, data), pixels)
    except DecodeError:
        return False


def decode_jpeg(decoder: ImageDecoder, data: bytes) -> np.ndarray:
    """Return the pixels of a JPEG that is given without its end marker. Raises DecodeError."""
    return decoder.decode([np.frombuffer(data + JPEG_END, np.uint8)])[0].copy()


def main() -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process decides when to end
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # a library's own messages are no replies
    decoder, reply = find_decoder()
    while True:
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()
        line = requests.readline()
        if not line or decoder is None:
            return
        request = json.loads(line)
        images = [np.frombuffer(requests.read(size), np.uint8) for size in request["sizes"]]
        reply = {"verdicts": check_images(decoder, images, request["may_be_cut"])}


if __name__ == "__main__":
    main()
