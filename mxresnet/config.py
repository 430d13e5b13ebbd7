# SPDX-License-Identifier: Apache-2.0
"""Every setting of a training run, declared once: default, variable, meaning, check.

To add a setting, add a field to Config. config_parser.py makes its flag and its line in --help and
in docs/settings.md.

Names and defaults are those of NVIDIA's MLPerf Training v2.1 MXNet benchmark: a default is the
value that its run_and_time.sh passes when nothing is set, or else the default of its
train_imagenet.py. docs/settings.md (SETTINGS_PAGE in config_parser.py) names the exceptions.
Settings that the benchmark does not have are marked "(own)".
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Optional, Tuple

from mxresnet.config_field import (
    GPU,
    PIXELS,
    POSITIVE,
    THREADS,
    at_least,
    between,
    one_of,
    parse_file_name,
    parse_int,
    parse_text,
    setting,
    zero_or_between,
)
from mxresnet.config_network import NetworkSettings


@dataclass(frozen=True)
class Config(NetworkSettings):
    """All settings of one run. Each field declares one flag: `some_name` is --some-name."""

    # Evaluation and stop
    accuracy_threshold: float = setting(
        0.759, "THR", "target: stop when top-1 accuracy is above this fraction", between(0, 1)
    )
    eval_period: int = setting(
        4, "EVAL_PERIOD", "epochs from one evaluation to the next", at_least(1)
    )
    eval_offset: int = setting(
        2, "EVAL_OFFSET", "evaluate after 0-based epoch e if e % period == offset", at_least(0)
    )
    separ_val: bool = setting(False, "SEPAR_VAL", "every rank evaluates the whole validation set")
    top_k: int = setting(0, "TOP_K", "also report top-k accuracy; 0: do not", at_least(0))

    # Data
    data_root: str = setting(
        "/data", "DATAROOT", "folder of the data set made by python -m prepare.imagenet (own)"
    )
    data_train: str = setting("", "DATA_TRAIN", "training records; empty: <data-root>/train.rec")
    data_train_idx: str = setting(
        "", "DATA_TRAIN_IDX", "index of the training records; empty: <data-root>/train.idx"
    )
    data_val: str = setting("", "DATA_VAL", "validation records; empty: <data-root>/val.rec")
    data_val_idx: str = setting(
        "", "DATA_VAL_IDX", "index of the validation records; empty: <data-root>/val.idx"
    )
    num_examples: int = setting(
        0,
        "NUMEXAMPLES",
        "training images an epoch; 0: as in the manifest, else 1281167",
        at_least(0),
    )
    num_val_examples: int = setting(
        0, "NUMVALEXAMPLES", "validation images; 0: as in the manifest, else 50000", at_least(0)
    )
    synth_data: int = setting(
        0, "SYNTH_DATA", "1: random images, no data set, no evaluation", at_least(0)
    )
    use_dali: bool = setting(True, "USE_DALI", "0: use MXNet's ImageRecordIter instead of DALI")
    input_batch_multiplier: int = setting(
        1, "INPUT_BATCH_MULTIPLIER", "training batches that a pipeline makes at a time", at_least(1)
    )
    lazy_init_sanity: bool = setting(
        False,
        "LAZY_INIT_SANITY",
        "hide the data set from the input pipelines until the timed run starts",
        flag="--lazy_init_sanity",
    )
    resize: int = setting(
        256, "RESIZE", "shorter side of validation images before the crop, pixels (own)", PIXELS
    )
    min_random_area: float = setting(
        0.05, "MIN_RANDOM_AREA", "minimum area of the random crop, as a fraction", between(0.001, 1)
    )
    max_random_area: float = setting(
        1.0, "MAX_RANDOM_AREA", "maximum area of the random crop, as a fraction", between(0.001, 1)
    )
    min_random_aspect_ratio: float = setting(
        3 / 4, "MIN_RANDOM_ASPECT_RATIO", "minimum width/height of the random crop", POSITIVE
    )
    max_random_aspect_ratio: float = setting(
        4 / 3, "MAX_RANDOM_ASPECT_RATIO", "maximum width/height of the random crop", POSITIVE
    )
    rand_mirror: bool = setting(True, "RAND_MIRROR", "mirror half of the training images (own)")
    dali_threads: int = setting(3, "DALI_THREADS", "CPU threads of each input pipeline", THREADS)
    dali_prefetch_queue: int = setting(
        2, "DALI_PREFETCH_QUEUE", "batches that each input pipeline prefetches", at_least(1)
    )
    dali_dont_use_mmap: bool = setting(
        False, "DALI_DONT_USE_MMAP", "read records with read() instead of mmap()"
    )
    dali_roi_decode: bool = setting(
        False, "DALI_ROI_DECODE", "decode only the random crop; not possible with --dali-cache-size"
    )
    dali_cache_size: int = setting(
        0,
        "DALI_CACHE_SIZE",
        "cache of decoded images, MiB; a rank then keeps its shard in every epoch",
        at_least(0),
        requires=GPU,
    )
    dali_hw_decoder_load: float = setting(
        0.0,
        "DALI_HW_DECODER_LOAD",
        "share of images for the hardware JPEG decoder, as a fraction",
        between(0, 1),
        requires=GPU,
    )
    dali_nvjpeg_memory_padding: int = setting(
        64, "DALI_NVJPEG_MEMPADDING", "padding of nvJPEG's buffers, MiB", at_least(0), requires=GPU
    )
    dali_tmp_buffer_hint: int = setting(
        25273239, "DALI_TMP_BUFFER_HINT", "resize buffer hint, bytes", at_least(0), requires=GPU
    )
    dali_decoder_buffer_hint: int = setting(
        1315942, "DALI_DECODER_BUFFER_HINT", "decoder buffer hint, bytes", at_least(0), requires=GPU
    )
    dali_crop_buffer_hint: int = setting(
        165581, "DALI_CROP_BUFFER_HINT", "crop buffer hint, bytes", at_least(0), requires=GPU
    )
    dali_normalize_buffer_hint: int = setting(
        441549,
        "DALI_NORMALIZE_BUFFER_HINT",
        "normalize buffer hint, bytes",
        at_least(0),
        requires=GPU,
    )
    dali_preallocate_width: int = setting(
        0, "DALI_PREALLOCATE_WIDTH", "largest image width, pixels", at_least(0), requires=GPU
    )
    dali_preallocate_height: int = setting(
        0, "DALI_PREALLOCATE_HEIGHT", "largest image height, pixels", at_least(0), requires=GPU
    )

    # The run
    seed: Optional[int] = setting(
        None, "SEED", "random seed; empty: rank 0 draws one", between(0, 2**31 - 1), parse=parse_int
    )
    log_file: str = setting(
        "", "LOG_FILE", "file to which rank 0 appends MLPerf log and progress; empty: none (own)"
    )
    checkpoints: bool = setting(
        True,
        "CHECKPOINTS",
        "write checkpoints, if --checkpoint-dir or --log-file is given (own)",
    )
    checkpoint_dir: str = setting(
        "",
        "CHECKPOINT_DIR",
        "folder of this run's checkpoints, on the machine of rank 0; empty: beside the log file, "
        "named as it with .checkpoints (own)",
    )
    checkpoint_minutes: float = setting(
        10.0,
        "CHECKPOINT_MINUTES",
        "minutes between two checkpoints; 0: only after evaluations and on SIGTERM (own)",
        zero_or_between(0.001, 100_000),
    )
    resume: str = setting(
        "auto",
        "RESUME",
        "auto: continue an unfinished run of --checkpoint-dir; no: start a new one (own)",
        one_of("auto", "no"),
    )
    init_from: str = setting("", "INIT_FROM", "start with the weights of this checkpoint (own)")
    evaluate: str = setting(
        "", "EVALUATE", "only evaluate this checkpoint, with its settings and these flags (own)"
    )
    expected_ranks: int = setting(
        0, "EXPECTED_RANKS", "number of ranks to require; 0: any (own)", between(0, 2**20)
    )
    watchdog_period: float = setting(
        2.0,
        "WATCHDOG_PERIOD",
        "seconds between heartbeats of a rank; 0: hanging ranks are not detected (own)",
        zero_or_between(0.01, 3600),
    )
    watchdog_limit: float = setting(
        40.0,
        "WATCHDOG_LIMIT",
        "seconds without a heartbeat, or of waiting for a rank to start, that end the run (own)",
        between(0.1, 604800),
    )
    disp_batches: int = setting(
        20, "DISP_BATCHES", "steps between two progress lines; 0: one line per epoch", at_least(0)
    )
    profile: int = setting(
        0,
        "PROFILE",
        "above 0: CUDA profiler and NVTX ranges, no evaluation",
        at_least(0),
    )
    profile_worker_suffix: str = setting(
        "",
        "PROFILE_WORKER_SUFFIX",
        "write MXNet's profile to rank<N>_<suffix> in the current folder; empty: no profile",
        parse=parse_file_name,
    )
    time_tags: int = setting(
        0, "TIME_TAGS", "above 0: time the parts of each step; 4 epochs, 2 of warm-up", at_least(0)
    )
    nvtx_flag: int = setting(
        0,
        "NVTX_FLAG",
        "above 0: NVTX ranges of each step's parts; epochs as TIME_TAGS",
        at_least(0),
    )
    epoch_prof: int = setting(0, "EPOCH_PROF", "above 0: time each epoch", at_least(0))

    # Submission and machine, for the log (own)
    submission_org: str = setting(
        "unknown", "SUBMISSION_ORG", "submitting organization, for the log", parse=parse_text
    )
    submission_platform: str = setting(
        "unknown", "SUBMISSION_PLATFORM", "name of the machine, for the log", parse=parse_text
    )
    submission_division: str = setting(
        "closed", "SUBMISSION_DIVISION", "MLPerf division, for the log", one_of("closed", "open")
    )
    submission_status: str = setting(
        "onprem",
        "SUBMISSION_STATUS",
        "MLPerf status, for the log",
        one_of("cloud", "onprem", "preview", "research"),
    )
    cache_cleared: bool = setting(
        False, "CACHE_CLEARED", "whether the page cache was dropped before this run, for the log"
    )

    @property
    def input_dtype(self) -> str:
        """Data type of the input batches and of the network's parameters in MXNet."""
        return "float16" if self.dtype == "float16" else "float32"

    @property
    def batch_shape(self) -> Tuple[int, int, int, int]:
        """Shape of one rank's input batch, in input_layout."""
        channels, height, width = self.image_shape
        if self.input_layout == "NHWC":
            return self.batch_size, height, width, channels
        return self.batch_size, channels, height, width

    def path(self, name: str) -> str:
        """Return the path of data_train, data_train_idx, data_val or data_val_idx."""
        _, split, *index = name.split("_")
        return getattr(self, name) or f"{self.data_root}/{split}.{'idx' if index else 'rec'}"


FIELDS = {f.name: f for f in dataclasses.fields(Config)}


def flag_of(name: str) -> str:
    """Return the flag of a field, such as --batch-size."""
    return FIELDS[name].metadata["flag"] or "--" + name.replace("_", "-")
