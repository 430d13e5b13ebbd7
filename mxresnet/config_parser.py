# SPDX-License-Identifier: Apache-2.0
"""Make a Config of the command line and the environment, and show settings (--help, --print-config, docs/settings.md).

The value of a setting is that of its flag, else of its environment variable, else its default. The configuration
files (config_<system>.sh) set the variables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any, Mapping, Sequence, Tuple

from mxresnet.config import FIELDS, Config, flag_of
from mxresnet.errors import UserError

# Flags of the reference that nothing in it reads.
UNSUPPORTED_FLAGS = {
    "--custom-bn-off": "its networks look for another name",
    "--initializer": "the initializer is fixed",
    "--model-prefix": "it writes no checkpoints",
    "--save-period": "it writes no checkpoints",
    "--logging-dir": "it logs to standard output (here: --log-file)",
    "--log": "it logs to standard output (here: --log-file)",
    "--epoch-size": "the data set decides (--num-examples shortens an epoch)",
    "--dali-bytes-per-sample-hint": "the decoder, crop and normalize hints took its place",
    "--profile-server-suffix": "Horovod has no parameter server",
}


def default_of(name: str) -> str:
    """The default as one would write it, or "none"."""
    default = FIELDS[name].default
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    if isinstance(default, bool):
        return str(int(default))
    return (
        f"{default:.5g}"
        if isinstance(default, float)
        else "none"
        if default in ("", None)
        else str(default)
    )


def described(name: str) -> str:
    metadata = FIELDS[name].metadata
    return metadata["help"] + (f"; {metadata['requires']} only" if metadata["requires"] else "")


def to_markdown() -> str:
    """All settings as the table in docs/settings.md."""
    rows = ["| Flag | Variable | Default | Meaning |", "|---|---|---|---|"]
    rows += [
        f"| `{flag_of(n)}` | `{FIELDS[n].metadata['env']}` | {default_of(n)} | {described(n)} |"
        for n in FIELDS
    ]
    return "\n".join(rows) + "\n"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message} (python -m mxresnet --help lists the flags)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m mxresnet", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    for name, item in FIELDS.items():
        bare = {"nargs": "?", "const": "1"} if isinstance(item.default, bool) else {}
        meaning = f"{described(name)} (variable {item.metadata['env']}, default {default_of(name)})"
        parser.add_argument(
            flag_of(name),
            dest=name,
            default=None,
            metavar="VALUE",
            **bare,
            help=meaning.replace("%", "%%"),
        )
    parser.add_argument(
        "--print-config", action="store_true", help="print the effective settings as JSON and exit"
    )
    return parser


def _value(name: str, text: str, origin: str) -> Any:
    metadata = FIELDS[name].metadata
    try:
        value = metadata["parse"](text)
    except ValueError:
        raise UserError(f"{origin}: {text!r} is not a value for {metadata['help']!r}") from None
    check = metadata["check"]
    if check and not check[0](value):
        raise UserError(f"{origin}: {text!r} {check[1]} ({metadata['help']})")
    return value


def _validate_combinations(config: Config) -> None:
    """Refuse settings that are right alone and wrong together. Raises UserError."""
    if config.watchdog_limit < 3 * config.watchdog_period:
        raise UserError(
            f"--watchdog-limit {config.watchdog_limit:g} is below three times --watchdog-period {config.watchdog_period:g}"
        )
    if config.eval_offset >= config.eval_period:
        raise UserError(
            f"--eval-offset {config.eval_offset} is not below --eval-period {config.eval_period}: nothing would be evaluated"
        )
    if config.warmup_epochs >= config.num_epochs and "pow" in config.lr_step_epochs:
        raise UserError(
            f"--warmup-epochs {config.warmup_epochs} is not below --num-epochs {config.num_epochs}"
        )
    for low, high in (
        ("min_random_area", "max_random_area"),
        ("min_random_aspect_ratio", "max_random_aspect_ratio"),
    ):
        if getattr(config, low) > getattr(config, high):
            raise UserError(
                f"{flag_of(low)} {getattr(config, low):g} is above {flag_of(high)} {getattr(config, high):g}"
            )
    if config.bn_group > 1 and config.dtype == "bfloat16":
        raise UserError("--bn-group above 1 cannot compute in bfloat16: use --dtype float32")
    channels, height, width = config.image_shape
    if channels not in (3, 4) or min(height, width) < 1:
        raise UserError(
            f"--image-shape {channels},{height},{width}: wants 3 or 4 channels and positive sizes"
        )
    if config.resize < max(height, width):
        raise UserError(
            f"--resize {config.resize} is below the crop of {height} x {width} pixels (--image-shape)"
        )


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Tuple[Config, bool]:
    """Return the settings and whether they are only to be printed. Raises UserError."""
    for word in argv:
        if word.split("=")[0] in UNSUPPORTED_FLAGS:
            raise UserError(
                f"{word} does nothing in the reference and is refused here: {UNSUPPORTED_FLAGS[word.split('=')[0]]}"
            )
    given = _parser().parse_args(list(argv))
    values = {}
    for name, item in FIELDS.items():
        flag, env = getattr(given, name), item.metadata["env"]
        if flag is not None:
            values[name] = _value(name, flag, flag_of(name))
        elif environ.get(env):
            values[name] = _value(name, environ[env], f"variable {env}")
    config = Config(**values)
    if config.time_tags or config.nvtx_flag:
        # A run that times its parts is short, as in the reference's run_and_time.sh.
        config = dataclasses.replace(config, num_epochs=4, warmup_epochs=2)
    _validate_combinations(config)
    return config, given.print_config


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)
