# SPDX-License-Identifier: Apache-2.0
"""Check settings that are valid alone and contradict each other.

The check of a single setting is part of its declaration in config.py.
"""

from __future__ import annotations

from mxresnet.config import Config, flag_of
from mxresnet.errors import UserError


def check_combinations(config: Config) -> None:
    """Raise UserError when settings that are valid alone contradict each other."""
    if config.watchdog_limit < 3 * config.watchdog_period:
        raise UserError(
            f"--watchdog-limit {config.watchdog_limit:g} is below three times --watchdog-period "
            f"{config.watchdog_period:g}"
        )
    if config.eval_offset >= config.eval_period:
        raise UserError(
            f"--eval-offset {config.eval_offset} is not below --eval-period {config.eval_period}: "
            "nothing would be evaluated"
        )
    if config.warmup_epochs >= config.num_epochs and "pow" in config.lr_step_epochs:
        raise UserError(
            f"--warmup-epochs {config.warmup_epochs} is not below --num-epochs {config.num_epochs}"
        )
    if config.bn_group > 1 and config.dtype == "bfloat16":
        raise UserError("--bn-group above 1 cannot compute in bfloat16: use --dtype float32")
    _check_image_sizes(config)


def _check_image_sizes(config: Config) -> None:
    """Raise UserError when the sizes of images and crops contradict each other."""
    for low, high in (
        ("min_random_area", "max_random_area"),
        ("min_random_aspect_ratio", "max_random_aspect_ratio"),
    ):
        low_value, high_value = getattr(config, low), getattr(config, high)
        if low_value > high_value:
            raise UserError(f"{flag_of(low)} {low_value:g} is above {flag_of(high)} {high_value:g}")
    channels, height, width = config.image_shape
    if channels not in (3, 4) or min(height, width) < 1:
        raise UserError(
            f"--image-shape {channels},{height},{width} must have 3 or 4 channels and positive "
            "sizes"
        )
    if config.resize < max(height, width):
        raise UserError(
            f"--resize {config.resize} is below the crop of {height} x {width} pixels "
            "(--image-shape)"
        )
