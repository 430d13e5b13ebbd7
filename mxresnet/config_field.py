# SPDX-License-Identifier: Apache-2.0
"""How a setting is declared: default, variable, help, check, parser. config.py has them all."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import field
from typing import Any, Callable, Dict, Optional, Tuple

# Where a setting has an effect (`requires`). Elsewhere it is accepted, and the run reports that it
# has none.
NVIDIA_MXNET = "NVIDIA's MXNet"
FUSED = "NVIDIA's MXNet or this project's batch norms on a GPU"
GPU = "GPU"

# A predicate on the parsed value, and the error message when it is false ("must be from 1 to 8").
Check = Tuple[Callable[[Any], bool], str]

MAX_INT = 2**31 - 1  # the libraries behind the settings take 32-bit integers
MAX_EPOCHS = 100_000
MAX_TEXT_CHARACTERS = 1000
MAX_NAME_BYTES = 200  # of a part of a file name, of which most file systems allow 255
MAX_PIXELS = 16384  # width or height of an image


def between(low: float, high: float) -> Check:
    return (lambda value: low <= value <= high), f"must be from {_format(low)} to {_format(high)}"


def at_least(low: int) -> Check:
    """Return the check of an integer that has no upper limit of its own."""
    return between(low, MAX_INT)


def zero_or_between(low: float, high: float) -> Check:
    return (
        lambda value: value == 0 or low <= value <= high,
        f"must be 0 or from {_format(low)} to {_format(high)}",
    )


def _format(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


EPOCHS = between(1, MAX_EPOCHS)
PIXELS = between(1, MAX_PIXELS)
THREADS = between(1, 1024)
# Factors are limited so that float32 holds their products.
POSITIVE = between(1e-9, 1e9)
NOT_NEGATIVE = between(0, 1e9)


def one_of(*choices: Any) -> Check:
    return (lambda value: value in choices), "must be one of " + ", ".join(map(str, choices))


def parse_int(text: str) -> int:
    """Parse a decimal integer; raise ValueError for what else Python accepts, such as "1_000"."""
    if not re.fullmatch(r"\s*[+-]?[0-9]+\s*", text, re.ASCII):
        raise ValueError(text)
    return int(text)


def parse_float(text: str) -> float:
    """Parse a decimal number that float32 can hold, as the libraries do.

    Raises:
        ValueError: text is not a number, is infinite or NaN, or has too large or small an exponent.
    """
    if not re.fullmatch(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?\s*", text, re.I | re.A):
        raise ValueError(text)
    value = float(text)
    if value != 0 and not 2.0**-126 <= abs(value) < 2.0**128:
        raise ValueError(text)
    return value


def parse_switch(text: str) -> bool:
    """Parse a boolean in any of the reference benchmark's spellings.

    Raises:
        ValueError: text is none of 1, true, yes, 0, false, no (in any case).
    """
    if text.lower() in ("1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no"):
        return False
    raise ValueError(text)


def parse_image_shape(text: str) -> Tuple[int, int, int]:
    """Parse "channels,height,width". Raises ValueError."""
    channels, height, width = (parse_int(part) for part in text.split(","))
    if max(height, width) > MAX_PIXELS:
        raise ValueError(text)
    return channels, height, width


def parse_lr_step_epochs(text: str) -> str:
    """Return text when it is "pow2" or lists epochs ("30,60,80").

    Raises:
        ValueError: an item of the list is not the number of an epoch.
    """
    epochs = [] if text in ("", "pow2") else [parse_int(part) for part in text.split(",")]
    if any(not 0 <= epoch <= MAX_EPOCHS for epoch in epochs):
        raise ValueError(text)
    return text


def parse_gpu_list(text: str) -> str:
    """Return text when it lists GPU numbers ("0,1"). Raises ValueError."""
    if any(not 0 <= parse_int(part) <= MAX_INT for part in text.split(",")):
        raise ValueError(text)
    return text


def parse_text(text: str) -> str:
    """Return a text for the log. UTF-8 is read as such, also where the locale is another.

    Raises:
        ValueError: text has bytes that are no text in the encoding of the locale, or is too long.
    """
    with contextlib.suppress(UnicodeDecodeError):
        text = os.fsencode(text).decode()
    text.encode()
    if len(text) > MAX_TEXT_CHARACTERS:
        raise ValueError(text)
    return text


def parse_file_name(text: str) -> str:
    """Return text when it can be part of the name of a file. Raises ValueError."""
    if "/" in text or len(os.fsencode(text)) > MAX_NAME_BYTES:
        raise ValueError(text)
    return text


_PARSERS: Dict[type, Callable[[str], Any]] = {
    bool: parse_switch,
    int: parse_int,
    float: parse_float,
    str: str,
}


def setting(
    default: Any,
    env: str,
    help: str,
    check: Optional[Check] = None,
    parse: Optional[Callable[[str], Any]] = None,
    requires: str = "",
    flag: str = "",
) -> Any:
    """Declare a field of Config.

    Args:
        default: value when neither the flag nor the variable is given.
        env: name of the environment variable.
        help: meaning and unit, for --help and docs/settings.md.
        check: restriction on the parsed value.
        parse: convert the text of the flag or variable; raises ValueError. Default: by the type of
            `default`.
        requires: environment outside which the setting has no effect ("GPU"). Empty: it has an
            effect everywhere.
        flag: name of the flag. Empty: the field's name with dashes.
    """
    if parse is None:
        parse = _PARSERS[type(default)]
    return field(
        default=default,
        metadata={
            "env": env,
            "help": help,
            "check": check,
            "parse": parse,
            "requires": requires,
            "flag": flag,
        },
    )
