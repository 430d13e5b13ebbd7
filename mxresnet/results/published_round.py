# SPDX-License-Identifier: Apache-2.0
"""The ResNet results of MLPerf Training v2.1, and the place of a run among systems of its kind.

The data are in published/*.csv, which name their source and licence.
"""

from __future__ import annotations

import csv
import functools
import os
import re
from dataclasses import dataclass
from typing import Dict, List, NamedTuple, Optional, Sequence

from mxresnet.results.log_reader import finite_number

ROUND = "v2.1"
FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "published")
_FAMILY = re.compile(
    r"\b(GH200|H200|H100|A100|A800|A40|A30|A10|A5000|V100|P100|T4|L40S|L40|L4|RTX \w+|Gaudi ?\d)"
    r"(?![0-9])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Kind:
    """A kind of accelerator; a part that a name does not have is None and matches any."""

    family: str
    memory_gb: Optional[int]
    form: Optional[str]  # "SXM" or "PCIe"

    def matches(self, other: Kind) -> bool:
        """Return whether both may be the same accelerator."""
        return (
            self.family == other.family
            and (None in (self.memory_gb, other.memory_gb) or self.memory_gb == other.memory_gb)
            and (None in (self.form, other.form) or self.form == other.form)
        )

    def __str__(self) -> str:
        memory = f"{self.memory_gb} GB" if self.memory_gb else None
        return " ".join(filter(None, [self.family, self.form, memory]))


def parse_kind(name: str) -> Optional[Kind]:
    """Return the kind of an accelerator from its name, such as "NVIDIA A100-SXM4-40GB"."""
    name = re.sub(r"[-_/]+", " ", name[:200])
    family = _FAMILY.search(name)
    if not family:
        return None
    memory = re.search(r"\b(\d{1,3}) ?Gi?B", name, re.IGNORECASE)
    form = re.search(r"\b(SXM|PCIe)\d?", name, re.IGNORECASE)
    label = family.group(1).upper().replace("GAUDI", "Gaudi ").replace("  ", " ")
    return Kind(
        re.sub(r"^RTX ", "", label),
        int(memory.group(1)) if memory else None,
        {"sxm": "SXM", "pcie": "PCIe"}[form.group(1).lower()] if form else None,
    )


@dataclass(frozen=True)
class PublishedSystem:
    """One result of the round."""

    submitter: str
    system: str
    division: str
    nodes: int
    accelerators: int
    accelerator: str
    framework: str
    network: str
    global_batch: int
    bn_span: float
    score_minutes: float
    epochs: float
    images_per_second: Optional[float]
    effective_images_per_second: float
    eval_seconds: float
    init_seconds: float
    settings: Dict[str, str]

    @property
    def kind(self) -> Optional[Kind]:
        return parse_kind(self.accelerator)

    @property
    def images_per_second_each(self) -> Optional[float]:
        """Throughput of one accelerator; None where the log or the number is missing."""
        if not self.accelerators:
            return None
        speed = self.images_per_second
        if speed is None or speed > 2 * self.effective_images_per_second:
            speed = self.effective_images_per_second
        return speed / self.accelerators

    @property
    def label(self) -> str:
        return f"{self.submitter} {self.system}"


class BandPoint(NamedTuple):
    """The accuracies at one epoch of the published runs with one global batch."""

    epoch: int
    runs: int
    mean: float
    sd: float
    low: float
    high: float


def _rows(name: str) -> List[Dict[str, str]]:
    """Return the rows of a data file, without its comment."""
    with open(os.path.join(FOLDER, name), encoding="utf-8", newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def _mean(text: str) -> float:
    values = [float(word) for word in text.split()]
    return sum(values) / len(values)


_SETTINGS = ("base_lr", "weight_decay", "momentum", "warmup_epochs", "decay_steps", "bn_span")


@functools.lru_cache(maxsize=1)
def published_systems() -> Sequence[PublishedSystem]:
    """Return all ResNet results of the round."""
    return [
        PublishedSystem(
            submitter=row["submitter"],
            system=row["system"],
            division=row["division"],
            nodes=int(row["nodes"]),
            accelerators=int(row["accelerators"]),
            accelerator=row["accelerator"],
            framework=row["framework"],
            network=row["network"],
            global_batch=int(row["global_batch"]),
            bn_span=float(row["bn_span"]),
            score_minutes=float(row["score_minutes"]),
            epochs=_mean(row["epochs"]),
            images_per_second=float(row["images_per_s"]) if row["images_per_s"] else None,
            effective_images_per_second=float(row["effective_images_per_s"]),
            eval_seconds=float(row["eval_seconds"]),
            init_seconds=float(row["init_seconds"]),
            settings={name: row[name] for name in _SETTINGS},
        )
        for row in _rows("v2.1_resnet.csv")
    ]


@functools.lru_cache(maxsize=1)
def _bands() -> Dict[int, List[BandPoint]]:
    bands: Dict[int, List[BandPoint]] = {}
    for row in _rows("v2.1_resnet_accuracy.csv"):
        numbers = [float(row[name]) for name in ("mean", "sd", "min", "max")]
        point = BandPoint(int(row["epoch"]), int(row["runs"]), *numbers)
        bands.setdefault(int(row["global_batch"]), []).append(point)
    return bands


def accuracy_band(global_batch: Optional[float]) -> List[BandPoint]:
    """Return the accuracies of the published runs with this global batch, by epoch."""
    return _bands().get(int(global_batch), []) if global_batch else []


def same_batch(global_batch: Optional[float]) -> List[PublishedSystem]:
    """Return the systems that trained with this global batch."""
    return [system for system in published_systems() if system.global_batch == global_batch]


@dataclass(frozen=True)
class Placement:
    """The place of a result among the published systems of its kind.

    Attributes:
        label: The kind, such as "4 x A100 SXM 40 GB".
        peers: The published systems of this kind, the fastest first, without the result itself.
        rank: Place of the result among them, from 1.
        ratio: Its minutes over those of the fastest peer.
        is_published: Whether the result is one of the round's.
        differences: What makes the comparison unequal.
    """

    label: str
    peers: List[PublishedSystem]
    rank: int
    ratio: Optional[float]
    is_published: bool
    differences: List[str]


def systems_of_kind(kind: Optional[Kind], accelerators: Optional[int]) -> List[PublishedSystem]:
    """Return the systems with these accelerators, the fastest first; None: of any number."""
    if kind is None:
        return []
    found = [
        system
        for system in published_systems()
        if system.kind and kind.matches(system.kind) and accelerators in (None, system.accelerators)
    ]
    return sorted(found, key=lambda system: system.score_minutes)


def place(
    minutes: float, accelerators: int, kind: Kind, own: str, settings: Dict[str, object]
) -> Placement:
    """Return the place of a result.

    Args:
        minutes: Its score, or the minutes of its only run.
        accelerators: Their number.
        kind: Their kind.
        own: Its submitter and system, as in PublishedSystem.label.
        settings: Its "global_batch_size" and "s_network".
    """
    found = systems_of_kind(kind, accelerators)
    same = [
        system
        for system in found
        if system.label == own and abs(system.score_minutes / minutes - 1) < 0.1
    ]
    peers = [system for system in found if system not in same]
    rank = 1 + sum(system.score_minutes < minutes for system in peers)
    ratio = minutes / peers[0].score_minutes if peers else None
    differences = []
    batch, network = finite_number(settings.get("global_batch_size")), settings.get("s_network")
    batches = sorted({system.global_batch for system in peers})
    if peers and batch is not None and batches != [batch]:
        listed = ", ".join(map(str, batches))
        differences.append(f"global batch {batch:g}, theirs {listed}")
    networks = sorted({system.network for system in peers if system.network})
    if peers and network and networks and network not in networks:
        differences.append(f"network {network}, theirs {', '.join(networks)}")
    label = f"{accelerators} x {kind}"
    return Placement(label, peers, rank, ratio, bool(same), differences)
