# SPDX-License-Identifier: Apache-2.0
"""Decode images as training would, in a process of its own.

A separate process, because a damaged image may end it or make a library print to standard error,
and because its memory is limited and released apart from that of the conversion.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any, Dict, List, Optional, Sequence

from prepare.decode_process import FAILED, NOT_TRIED, Verdict
from prepare.exit_status import ExitStatus

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NO_DECODER = "not decoded, because neither DALI nor OpenCV is installed"
MAX_REQUEST_BYTES = 16 << 20  # of several images; a larger one is sent alone
# Ends that a damaged image can cause in a library. Others come from outside, or from a shortage.
CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)


class ProcessEndedError(Exception):
    """The decoder's process has ended; the message describes how."""

    def __init__(self, status: int) -> None:
        """Describe how.

        Args:
            status: the exit status, or the negative number of a signal.
        """
        super().__init__(f"signal {-status}" if status < 0 else f"exit status {status}")
        self.may_be_the_image = (
            -status in CRASHES if status < 0 else status != ExitStatus.IO_ERROR  # of a MemoryError
        )


class DecoderError(Exception):
    """A decoder is installed, but it does not work: images that need it cannot be checked."""


class Decoder:
    """Decode images with DALI, or with OpenCV where DALI is not installed; for many threads.

    Where DALI is not installed, training uses MXNet's ImageRecordIter, which decodes with OpenCV.
    """

    def __init__(self) -> None:
        """Start no process yet: most conversions need none."""
        self._lock = threading.Lock()
        self._process: Optional[subprocess.Popen[bytes]] = None
        self._name: Optional[str] = None
        self._failures: Dict[str, str] = {}

    def require(self, name: str) -> None:
        """Raise ImportError, with the reason, if the decoder with this name is not used here.

        Raises:
            DecoderError: no decoder can be started.
        """
        with self._lock:
            self._start()
            if self._name != name:
                raise ImportError(self._failures.get(name, "it is not installed"))

    def check(self, images: Sequence[memoryview], may_be_cut: Sequence[bool]) -> List[Verdict]:
        """Decode images.

        Args:
            images: the bytes of each.
            may_be_cut: whether its last pixels may be missing, as its ends are unusual.

        Raises:
            DecoderError: a decoder is installed, but cannot be started, or it was killed.
        """
        verdicts: List[Verdict] = []
        begin = 0
        while begin < len(images):
            end, size = begin + 1, len(images[begin])
            while end < len(images) and size + len(images[end]) <= MAX_REQUEST_BYTES:
                size += len(images[end])
                end += 1
            with self._lock:
                verdicts += self._check(images[begin:end], may_be_cut[begin:end])
            begin = end
        return verdicts

    def _check(self, images: Sequence[memoryview], may_be_cut: Sequence[bool]) -> List[Verdict]:
        self._start()
        if self._name is None:
            return [(NOT_TRIED, NO_DECODER)] * len(images)
        try:
            return self._ask(images, may_be_cut)
        except ProcessEndedError as error:
            if len(images) == 1:
                if not error.may_be_the_image:
                    raise DecoderError(
                        f"it ends with {error}; the memory may be too small"
                    ) from None
                return [(FAILED, f"{self._name} ends while decoding it ({error})")]
        # One of them ended the process: decode each alone.
        pairs = zip(images, may_be_cut)
        return [verdict for image, cut in pairs for verdict in self._check([image], [cut])]

    def _start(self) -> None:
        """Start the process unless it runs.

        Raises:
            DecoderError: it ended before it was ready, or cannot load a decoder.
        """
        if self._process is not None:
            return
        given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        paths = [ROOT, *map(os.path.abspath, given)]  # because its working folder is another one
        self._process = subprocess.Popen(
            [sys.executable, "-m", "prepare.decode_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            reply = self._read_reply()
        except ProcessEndedError as error:
            raise DecoderError(f"it ends with {error}") from None
        self._name, self._failures = reply["name"], reply["failures"]
        if self._name is None and reply["is_installed"]:
            self.close()
            reasons = (f"{name}: {reason}" for name, reason in self._failures.items())
            raise DecoderError("; ".join(reasons))

    def _ask(self, images: Sequence[memoryview], may_be_cut: Sequence[bool]) -> List[Verdict]:
        assert self._process is not None and self._process.stdin is not None
        sizes = [len(image) for image in images]
        stream = self._process.stdin
        try:
            stream.write(json.dumps({"sizes": sizes, "may_be_cut": [*may_be_cut]}).encode() + b"\n")
            for image in images:
                stream.write(image)
            stream.flush()
        except BrokenPipeError:
            pass  # reading the reply finds out why
        return [(result, text) for result, text in self._read_reply()["verdicts"]]

    def _read_reply(self) -> Dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise ProcessEndedError(self.close())
        reply: Dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> int:
        """End the process; return its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        for stream in (process.stdin, process.stdout):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:
                pass
        return process.wait()
