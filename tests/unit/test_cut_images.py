# SPDX-License-Identifier: Apache-2.0
"""Test that images whose last part is lost are recognized, whatever has taken its place."""

import random

import pytest

from prepare.decode_process import DECODED, FAILED, Dali, OpenCv, check_images
from prepare.image_check import inspect_ends
from prepare.jpeg_format import find_data_end

cv2 = pytest.importorskip("cv2")
np = pytest.importorskip("numpy")
SEEDS = range(4)
ENCODINGS = {
    "usual": (),
    "optimized": (cv2.IMWRITE_JPEG_OPTIMIZE, 1),
    "restarts": (cv2.IMWRITE_JPEG_RST_INTERVAL, 3),
    "progressive": (cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
}


@pytest.fixture(scope="module", params=[Dali, OpenCv])
def decoder(request):
    try:
        return request.param()
    except ImportError:
        pytest.skip(f"{request.param.name} is not installed")


def picture(seed, quality=90, options=(), extension=".jpg"):
    pixels = np.random.RandomState(seed).randint(0, 256, (64, 80, 3)).astype(np.uint8)
    pixels = cv2.GaussianBlur(pixels, (9, 9), 3)
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, *options] if extension == ".jpg" else []
    return cv2.imencode(extension, pixels, options)[1].tobytes()


def results(decoder, contents):
    """Return for each image whether it is DECODED or FAILED; all have unusual ends."""
    assert all(inspect_ends(content) is not None for content in contents)
    arrays = [np.frombuffer(content, np.uint8) for content in contents]
    return [result for result, _ in check_images(decoder, arrays, [True] * len(arrays))]


def random_bytes(seed, size, with_end):
    """Return bytes that may contain markers, among them the end marker or not."""
    data = bytearray(random.Random(seed).getrandbits(8 * size).to_bytes(size, "big"))
    if with_end:
        data[size // 3 : size // 3 + 2] = b"\xff\xd9"
    return b"x" + bytes(data) + b"x"


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("quality", [50, 90, 95])
def test_other_bytes_in_place_of_the_last_part(decoder, quality, encoding):
    cut = []
    for seed in SEEDS:
        image = picture(seed, quality, ENCODINGS[encoding])
        scan = image.index(b"\xff\xda") + 14
        for percent in (5, 50, 80, 95):
            size = scan + (len(image) - scan) * percent // 100
            rest = len(image) - size
            cut += [image[:size] + bytes(count) for count in (rest, 8192)]
            cut += [image[:size] + byte * rest for byte in (b"\x20", b"\xaa")]
            cut += [image[:size] + random_bytes(seed, 3000, with_end) for with_end in (False, True)]
    assert results(decoder, cut) == [FAILED] * len(cut)


@pytest.mark.parametrize("encoding", ["usual", "optimized", "restarts"])
def test_a_whole_image_without_its_end_marker(decoder, encoding):
    whole = []
    for seed in SEEDS:
        image = picture(seed, 90, ENCODINGS[encoding])[:-2]
        whole += [image, image + bytes(9), image + bytes(8192)]
    assert results(decoder, whole) == [DECODED] * len(whole)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_whole_image_and_bytes_after_its_end_marker(decoder, encoding):
    image = picture(0, 90, ENCODINGS[encoding])
    junk = [b"junk", bytes(700), random_bytes(1, 3000, True), b"\xff\xd9x", b"\r\n"]
    whole = [image + more for more in junk]
    whole.append(image[:-2] + b"junk" + image[-2:] + b"junk")
    assert results(decoder, whole) == [DECODED] * len(whole)
    assert "with 4 bytes after" in inspect_ends(whole[0]).description


def test_an_image_that_ends_in_a_flat_area(decoder):
    """The last codes of such an image may be zeros, and a table may have few codes."""
    for shade in (0, 128, 255):
        for height in range(16, 72, 8):
            pixels = np.full((height, 64, 3), shade, np.uint8)
            pixels[0, ::3] = 99
            for options in ((), ENCODINGS["optimized"]):
                image = cv2.imencode(".jpg", pixels, options)[1].tobytes()[:-2]
                assert results(decoder, [image, image + bytes(99)]) == [DECODED] * 2


def test_a_png_whose_last_part_is_lost(decoder):
    image = picture(0, extension=".png")
    half = image[: len(image) // 2]
    cut = [half, half + bytes(len(half)), half + random_bytes(0, len(half), True)]
    verdicts = results(decoder, cut)
    assert verdicts == [FAILED] * len(cut)


def test_where_the_data_of_an_image_end():
    image = picture(0)
    assert find_data_end(image) == (len(image) - 2, True)
    assert find_data_end(image[:-2] + b"\xff" + image[-2:] + b"x") == (len(image) - 2, True)
    assert find_data_end(image[:-1]) == (len(image) - 1, False)
    scan = image.index(b"\xff\xda")
    assert find_data_end(image[:scan]) == (scan, False)
    thumbnail = b"\xff\xe1" + (len(image) + 2).to_bytes(2, "big") + image
    assert find_data_end(image[:2] + thumbnail + image[2:-2])[1] is False
    progressive = picture(0, 90, ENCODINGS["progressive"])
    assert progressive.count(b"\xff\xda") > 2
    assert find_data_end(progressive + b"\xff\xd9") == (len(progressive) - 2, True)
