# SPDX-License-Identifier: Apache-2.0
"""How a setting is declared: default, variable, help, check, parser. config.py has them all."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Callable, Optional, Tuple

# A predicate on the parsed value, and the error message when it is false ("must be at least 1").
Check = Tuple[Callable[[Any], bool], str]


def at_least(low: float) -> Check:
    return (lambda value: value >= low), f"must be at least {low:g}"


def above(low: float) -> Check:
    return (lambda value: value > low), f"must be above {low:g}"


def between(low: float, high: float) -> Check:
    return (lambda value: low <= value <= high), f"must be from {low:g} to {high:g}"


def one_of(*choices: Any) -> Check:
    return (lambda value: value in choices), "must be one of " + ", ".join(map(str, choices))


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
    channels, height, width = (int(part) for part in text.split(","))
    return channels, height, width


def parse_lr_step_epochs(text: str) -> str:
    """Return text when it names a polynomial ("pow2") or lists epochs ("30,60,80").

    Raises:
        ValueError: an item of the list is not an integer.
    """
    if "pow" not in text and text:
        [int(part) for part in text.split(",")]
    return text


def parse_gpu_list(text: str) -> str:
    """Return text when it lists GPU numbers ("0,1"). Raises ValueError."""
    if any(int(part) < 0 for part in text.split(",")):
        raise ValueError(text)
    return text


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
        parse = parse_switch if isinstance(default, bool) else type(default)
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
