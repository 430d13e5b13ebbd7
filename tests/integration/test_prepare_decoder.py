# SPDX-License-Identifier: Apache-2.0
"""The decoder that checks unusual images: a surrounding in which it fails is no fault of an image.

An image that could not be decoded for such a reason must neither be kept nor be left out.
"""

import os
import signal

import pytest
from support import image_fixtures as images

from prepare.decoder import Decoder, DecoderError

cv2 = pytest.importorskip("cv2")
np = pytest.importorskip("numpy")
NOT_INSTALLED = b"raise ModuleNotFoundError"
FAKE_CV2 = b"IMREAD_COLOR, error = 1, ValueError\ndef imdecode(image, flags):\n"


@pytest.fixture
def source(tmp_path):
    """A data set in which one image is cut off in the middle."""
    pixels = np.random.RandomState(0).randint(0, 256, (60, 80, 3)).astype(np.uint8)
    jpeg = cv2.imencode(".jpg", pixels)[1].tobytes()
    files = {f"{split}/n{c}/{c}.JPEG": jpeg for split in ("train", "val") for c in range(2)}
    files["train/n1/half.JPEG"] = jpeg[: len(jpeg) // 2]
    images.write_files(tmp_path / "in", files)
    return tmp_path / "in"


def convert(tmp_path, *options, packages=None, **variables):
    """Convert with Python packages that replace others, {file name: content}."""
    images.write_files(tmp_path / "packages", packages or {})
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "packages"), **variables}
    return images.run_prepare(tmp_path / "in", tmp_path / "out", *options, env=environment)


def test_warnings_as_errors_do_not_weaken_the_check(tmp_path, source):
    """A module of a library that warns when it is imported must not end the decoder."""
    warns = b"import warnings\nwarnings.warn('old', DeprecationWarning)\n"
    decodes = warns + FAKE_CV2 + b"    return None\n"
    packages = {"nvidia/__init__.py": NOT_INSTALLED, "cv2.py": decodes}
    result = convert(tmp_path, packages=packages, PYTHONWARNINGS="error")
    assert result.returncode == 1, result.stdout
    assert "half.JPEG: truncated: a JPEG without its end marker; OpenCV" in result.stderr


@pytest.mark.parametrize(
    "failure, reason",
    [
        (b"raise ImportError('cannot allocate memory')", "OpenCV: cannot allocate memory"),
        (b"raise RuntimeError", "OpenCV: RuntimeError"),
        (b"import os; os._exit(9)", "it ends with exit status 9"),
        (b"import os; os.kill(os.getpid(), 11)", "it ends with signal 11"),
    ],
)
def test_an_installed_decoder_that_does_not_start(tmp_path, monkeypatch, failure, reason):
    images.write_files(tmp_path, {"nvidia/__init__.py": NOT_INSTALLED, "cv2.py": failure})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DecoderError, match=reason):
        Decoder().check([memoryview(b"image")], [True])


def test_a_conversion_goes_on_when_the_decoder_starts_again(tmp_path, source):
    packages = {"nvidia/__init__.py": NOT_INSTALLED, "cv2.py": b"raise RuntimeError('broken')"}
    result = convert(tmp_path, "--on-error=skip", packages=packages)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 4 and line.startswith(
        "prepare.imagenet: images cannot be checked, because the decoder does not work (DALI: "
    )
    assert "OpenCV: broken" in line and not (tmp_path / "out" / "train.json").exists()
    again = convert(tmp_path, packages={"cv2.py": FAKE_CV2 + b"    return None\n"})
    assert again.returncode == 1 and "half.JPEG: truncated" in again.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGXCPU])
def test_a_decoder_that_is_killed(tmp_path, monkeypatch, number):
    """A signal that no crash causes is no fault of the image, which must not be left out."""
    killed = FAKE_CV2 + b"    import os; os.kill(os.getpid(), %d)\n" % number
    images.write_files(tmp_path, {"nvidia/__init__.py": NOT_INSTALLED, "cv2.py": killed})
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(DecoderError, match=f"it ends with signal {number:d}; the memory may be"):
        Decoder().check([memoryview(b"image")] * 2, [True] * 2)


def test_why_dali_cannot_be_used_to_decode_all_images(tmp_path, source):
    packages = {"nvidia/__init__.py": b"raise ImportError('libdali.so: no memory')"}
    result = convert(tmp_path, "--check=decode", packages=packages)
    assert result.returncode == 2
    assert result.stderr.endswith("--check=decode needs NVIDIA DALI: libdali.so: no memory\n")
