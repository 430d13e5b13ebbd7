# SPDX-License-Identifier: Apache-2.0
"""Images from files, preprocessed by the same operators as the validation images of a run."""

from __future__ import annotations

import os
from typing import Any, List, Optional, Sequence

import numpy as np

from mxresnet.config import Config
from mxresnet.data import dali_graph
from mxresnet.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_MAX_BYTES = 256 << 20


class ImageReader:
    """Reads and preprocesses one image after the other, on the CPU."""

    def __init__(self, config: Config):
        self._config = config
        self._pipeline: Optional[Any] = None

    def read(self, path: str) -> np.ndarray:
        """Return an image as float32 (1, *config.batch_shape[1:]).

        Raises:
            UserError: the file cannot be read, or is no image that DALI decodes.
        """
        content = _read_file(path)
        if self._pipeline is None:
            self._pipeline = dali_graph.build_image_pipeline(self._config)
        try:
            self._pipeline.feed_input(dali_graph.IMAGE_INPUT, [np.frombuffer(content, np.uint8)])
            output: Any = self._pipeline.run()[0]
            return np.array(output.as_array(), dtype=np.float32)
        except RuntimeError:
            self._pipeline = None  # a pipeline cannot be used after an error
            raise UserError(
                f"{path} is no image that can be decoded: JPEG, PNG, BMP and TIFF can"
            ) from None


def _read_file(path: str) -> bytes:
    try:
        if not os.path.isfile(path):
            reason = "is not a file" if os.path.exists(path) else "does not exist"
            raise UserError(f"{path} {reason}: name image files or folders of them")
        size = os.path.getsize(path)
        if not 0 < size <= _MAX_BYTES:
            raise UserError(f"{path} has {size} bytes: it is no image")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def find_images(paths: Sequence[str]) -> List[str]:
    """Return files as they are, and of each folder all images below it, sorted.

    Raises:
        UserError: a folder has none, or cannot be read.
    """
    found: List[str] = []
    for path in paths:
        if not os.path.isdir(path):
            found.append(path)
            continue
        images = []
        for folder, folders, names in os.walk(path):
            folders.sort()
            images += [os.path.join(folder, n) for n in names if n.lower().endswith(EXTENSIONS)]
        if not images:
            raise UserError(f"{path} has no image ({' '.join(EXTENSIONS)})")
        found += sorted(images)
    return found
