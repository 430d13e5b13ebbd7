#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Make published_configs.json from the results of MLPerf Training v2.1.

For each of this project's published configurations it has

- "exports": what the submitter's configuration files export (NVIDIA's files name one that was not
  published, and so do Dell's: its values are then missing);
- "flags": the effective flags that the benchmark wrote to the submitted log ("start with
  arguments"); NVIDIA's own logs do not have that line;
- "keys": the hyperparameters in the MLPerf lines of the log, in their order;
- "evaluated": the epochs that the log evaluates;
- "start": the keys of all lines up to the first epoch, without repetitions in a row.

    git clone https://github.com/mlcommons/training_results_v2.1
    python tests/golden/make_published_configs.py training_results_v2.1 \
        >tests/golden/published_configs.json
"""

import ast
import itertools
import json
import re
import subprocess
import sys

NVIDIA = "NVIDIA/benchmarks/resnet/implementations/mxnet-22.04"
DELL = "Dell/benchmarks/resnet/implementations/mxnet"
ASUSTEK = "ASUSTeK/benchmarks/resnet/implementations/mxnet"
LENOVO = "Lenovo/benchmarks/resnet/implementations/SR670v2-4xA100_SXM4_40GB_400W"
COMMON = "config_DGXA100_common.sh"
# Configuration: machines, ranks on each, files in the order in which bash sources them, logs.
SYSTEMS = {
    "A30_1x2x204": (
        *(1, 2, [f"{NVIDIA}/{COMMON}", f"{NVIDIA}/config_A30_1x2x204.sh"]),
        ["Fujitsu/results/rx_A30x2_mxnet_NGC_22.04/resnet/result_0.txt"],
    ),
    "DGXA100_4gpu": (1, 4, [f"{NVIDIA}/config_DGXA100_4gpu.sh"], []),
    "DGXA100": (
        *(1, 8, [f"{NVIDIA}/{COMMON}", f"{NVIDIA}/config_DGXA100.sh"]),
        ["NVIDIA/results/dgxa100_ngc22.04_mxnet/resnet/result_0.txt"],
    ),
    "DGXA100_multi_8x8x51": (
        *(8, 8, [f"{NVIDIA}/{COMMON}", f"{NVIDIA}/config_DGXA100_multi_8x8x51.sh"]),
        ["NVIDIA/results/dgxa100_n8_ngc22.04_mxnet/resnet/result_0.txt"],
    ),
    "DGXA100_multi_128x8x35": (
        *(128, 8, [f"{NVIDIA}/{COMMON}", f"{NVIDIA}/config_DGXA100_multi_128x8x35.sh"]),
        ["NVIDIA/results/dgxa100_n128_ngc22.04_mxnet/resnet/result_0.txt"],
    ),
    "DGXA100_multi_527x8x16xgbn2_larsv2": (
        527,
        8,
        [f"{NVIDIA}/{COMMON}", f"{NVIDIA}/config_DGXA100_multi_527x8x16xgbn2_larsv2.sh"],
        ["NVIDIA/results/dgxa100_n527_ngc22.04_mxnet/resnet/result_0.txt"],
    ),
    "A100-40GB_4gpu": (
        *(1, 4, [f"{NVIDIA}/{COMMON}", f"{LENOVO}/config_4xA100-SXM4-40GB.sh"]),
        [
            "Lenovo/results/SR670v2-4xA100_SXM4_40GB_400W/resnet/result_1.txt",
            "Dell/results/XE8545x4A100-SXM-40GB/resnet/result_0.txt",
        ],
    ),
    "A100-40GB_8gpu": (
        *(1, 8, [f"{DELL}/config_2xXE8545x4A100-SXM4-40GB.sh"]),
        ["Dell/results/2xXE8545x4A100-SXM-40GB/resnet/result_0.txt"],
    ),
    "A100-80GB_4gpu": (
        1,
        4,
        [f"{ASUSTEK}/config_ESCN4A-E11_common.sh", f"{ASUSTEK}/config_ESCN4A-E11.sh"],
        [
            "ASUSTeK/results/ESCN4A-E11/resnet/result_0.txt",
            "Dell/results/XE8545x4A100-SXM-80GB/resnet/result_0.txt",
        ],
    ),
    "A100-PCIe-80GB_4gpu": (
        1,
        4,
        [
            f"{DELL}/config_R750xax4A100PCIE80GB_common.sh",
            f"{DELL}/config_R750xax4A100PCIE80GB.sh",
        ],
        ["Dell/results/R750xax4A100-PCIE-80GB-NVBRIDGE/resnet/result_0.txt"],
    ),
}
# MLPerf keys that are not hyperparameters.
OTHER_KEYS = re.compile(
    "submission_|cache_clear|seed|(init|run|block|epoch|eval)_(start|stop)|weights_initialization"
    "|tracked_stats|throughput|eval_accuracy|train_samples|eval_samples"
)


def read(repository: str, path: str) -> str:
    """Return the text of a file at the head of a git repository."""
    command = ["git", "-C", repository, "show", f"HEAD:{path}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def exports(text: str) -> dict:
    """Return what the lines `export NAME=value` set, for ${NAME:-value} the default value."""
    lines = re.findall(r"^export (\w+)=(\S*)", text, re.MULTILINE)
    values = {name: re.sub(r"^\$\{\w+:-(.*)\}$", r"\1", value) for name, value in lines}
    return {name: value.strip('"') for name, value in values.items() if not value.startswith("$(")}


def logged_flags(text: str) -> dict:
    """Return the flags in the first line "start with arguments Namespace(...)", if there is one."""
    found = re.search(r"start with arguments Namespace\((.*)\)$", text, re.MULTILINE)
    call = ast.parse(f"f({found[1] if found else ''})", mode="eval").body
    assert isinstance(call, ast.Call)
    return {str(item.arg): ast.literal_eval(item.value) for item in call.keywords}


def logged_events(text: str) -> list:
    """Return (key, value, metadata) of the MLPerf lines."""
    lines = re.findall(r":::MLLOG (\{.*\})\s*$", text, re.MULTILINE)
    events = [json.loads(line) for line in lines]
    return [(event["key"], event["value"], event["metadata"]) for event in events]


def start_of_log(keys: list) -> list:
    """Return the keys up to the first epoch, each run of equal keys as one."""
    return [key for key, _ in itertools.groupby(keys[: keys.index("epoch_start") + 1])]


def describe(repository: str, machines: int, ranks: int, files: list, logs: list) -> dict:
    """Return the published facts of one configuration."""
    result = {"nodes": machines, "gpus": ranks, "files": files, "logs": []}
    result["exports"] = exports("\n".join(read(repository, path) for path in files))
    for path in logs:
        text = read(repository, path)
        events = logged_events(text)
        evaluated = [metadata["epoch_num"] for key, _, metadata in events if key == "eval_start"]
        result["logs"].append(
            {
                "file": path,
                "flags": logged_flags(text),
                "keys": [[key, value] for key, value, _ in events if not OTHER_KEYS.match(key)],
                "evaluated": evaluated,
                "start": " ".join(start_of_log([key for key, _, _ in events])),
            }
        )
    return result


def main() -> None:
    """Print the JSON for the results repository that the argument names."""
    systems = {name: describe(sys.argv[1], *facts) for name, facts in SYSTEMS.items()}
    print(json.dumps(systems, indent=1))


if __name__ == "__main__":
    main()
