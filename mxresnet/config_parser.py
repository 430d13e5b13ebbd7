# SPDX-License-Identifier: Apache-2.0
"""Parse the settings of a run and show them: --help, --print-config, docs/settings.md.

The value of a setting is that of its flag, else of its environment variable, else its default. The
system configurations (config_<system>.sh) set the variables.

    python -m mxresnet.config_parser > docs/settings.md      write the page of all settings
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any, Mapping, NoReturn, Sequence, Tuple

from mxresnet.config import FIELDS, Config, flag_of
from mxresnet.config_combinations import check_combinations
from mxresnet.errors import UserError

# Flags that the reference benchmark declares and never reads, and why they are refused.
UNSUPPORTED_FLAGS = {
    "--custom-bn-off": "its networks read an option of another name",
    "--initializer": "the initializer is fixed",
    "--model-prefix": "it writes no checkpoints",
    "--save-period": "it writes no checkpoints",
    "--logging-dir": "it logs to standard output (here: --log-file)",
    "--log": "it logs to standard output (here: --log-file)",
    "--epoch-size": "an epoch is the whole data set (--num-examples shortens it)",
    "--dali-bytes-per-sample-hint": "the decoder, crop and normalize hints replace it",
    "--profile-server-suffix": "Horovod has no parameter server",
}
# Epochs of a run that times its parts, as in the reference's run_and_time.sh.
TIMED_RUN_EPOCHS, TIMED_RUN_WARMUP_EPOCHS = 4, 2

SETTINGS_PAGE = """# Settings

Every setting of a run, as declared in `mxresnet/config.py`; `python -m mxresnet.config_parser`
prints this page. A flag overrides the environment variable, which overrides the default. Under
`run_and_time.sh`, the system configuration (`config_<DGXSYSTEM>.sh`) replaces variables of the same
name that were set before.

Names and defaults are those of NVIDIA's MLPerf Training v2.1 MXNet benchmark: a default is the
value that its `run_and_time.sh` passes when nothing is set, or else the default of its
`train_imagenet.py`. The exceptions:

- What a CPU cannot do (float16, channels last, four channels, fused batch norms, cuDNN's
  algorithm): the configurations for GPUs set these.
- `--seed` is drawn (there 1), and `--kv-store` is `horovod` (there `device`, with which its program
  does not run).
- `--gpus` and the numbers of images and classes are taken from the machine and the data.

"(own)" marks settings that the benchmark does not have. Flags that the benchmark declares and never
reads are refused with the reason. A switch may be given without a value, which sets it, or with one
(1/true/yes, 0/false/no).

"""


def format_default(name: str) -> str:
    """Return the default as a user would write it, or "none"."""
    default = FIELDS[name].default
    if default in ("", None):
        return "none"
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    if isinstance(default, bool):
        return str(int(default))
    return f"{default:.5g}" if isinstance(default, float) else str(default)


def format_meaning(name: str) -> str:
    """Return the help text, and where the setting has an effect if not everywhere."""
    metadata = FIELDS[name].metadata
    return metadata["help"] + (f"; {metadata['requires']} only" if metadata["requires"] else "")


def to_markdown() -> str:
    """Return the table of all settings."""
    rows = ["| Flag | Variable | Default | Meaning |", "|---|---|---|---|"]
    for name, item in FIELDS.items():
        variable, default = item.metadata["env"], format_default(name)
        rows.append(f"| `{flag_of(name)}` | `{variable}` | {default} | {format_meaning(name)} |")
    return "\n".join(rows) + "\n"


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python -m mxresnet --help lists the flags)")


def _make_argument_parser() -> argparse.ArgumentParser:
    """Return a parser whose values are text, or None where the flag is not given."""
    parser = _ArgumentParser(
        prog="python -m mxresnet",
        description="Run one rank of a training run. Variables are environment variables.",
        allow_abbrev=False,
    )
    for name, item in FIELDS.items():
        is_switch = isinstance(item.default, bool)
        variable, default = item.metadata["env"], format_default(name)
        help_text = f"{format_meaning(name)} (variable {variable}, default {default})"
        parser.add_argument(
            flag_of(name),
            dest=name,
            default=None,
            metavar="VALUE",
            nargs="?" if is_switch else None,
            const="1" if is_switch else None,
            help=help_text.replace("%", "%%"),
        )
    parser.add_argument(
        "--print-config", action="store_true", help="print the effective settings as JSON and exit"
    )
    return parser


def _parse_value(name: str, text: str, origin: str) -> Any:
    """Return the value of a setting; origin is the flag or variable that the text comes from.

    Raises:
        UserError: the text is not a valid value.
    """
    metadata = FIELDS[name].metadata
    try:
        value = metadata["parse"](text)
    except ValueError:
        raise UserError(f"{origin}: {text!r} is not a value for {metadata['help']!r}") from None
    if metadata["check"]:
        is_valid, requirement = metadata["check"]
        if not is_valid(value):
            raise UserError(f"{origin}: {text!r} {requirement} ({metadata['help']})")
    return value


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Tuple[Config, bool]:
    """Return the settings, and whether to print them and exit (--print-config).

    Raises:
        UserError: a setting is unknown or wrong.
    """
    for argument in argv:
        flag = argument.split("=")[0]
        if flag in UNSUPPORTED_FLAGS:
            raise UserError(
                f"{argument} does nothing in the reference and is refused here: "
                f"{UNSUPPORTED_FLAGS[flag]}"
            )
    arguments = _make_argument_parser().parse_args(list(argv))
    values = {}
    for name, item in FIELDS.items():
        text, variable = getattr(arguments, name), item.metadata["env"]
        if text is not None:
            values[name] = _parse_value(name, text, flag_of(name))
        elif environ.get(variable):
            values[name] = _parse_value(name, environ[variable], f"variable {variable}")
    config = Config(**values)
    if config.time_tags or config.nvtx_flag:
        config = dataclasses.replace(
            config, num_epochs=TIMED_RUN_EPOCHS, warmup_epochs=TIMED_RUN_WARMUP_EPOCHS
        )
    check_combinations(config)
    return config, arguments.print_config


if __name__ == "__main__":
    sys.stdout.write(SETTINGS_PAGE + to_markdown())
