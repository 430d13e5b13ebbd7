# SPDX-License-Identifier: Apache-2.0
"""Change the manifests of converted data sets, with the sum that belongs to the new content."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any, Callable, Dict

SUM_FIELD = "manifest_sha256"


def write_manifest(path: pathlib.Path, fields: Dict[str, Any]) -> None:
    """Write a manifest of version 2: its last field is the SHA-256 of the bytes before it."""
    fields = {name: value for name, value in fields.items() if name != SUM_FIELD}
    begin = json.dumps(fields, indent=1).encode()[: -len("\n}")] + b","
    digest = hashlib.sha256(begin).hexdigest()
    path.write_bytes(begin + f'\n "{SUM_FIELD}": "{digest}"\n}}\n'.encode())


def change_manifest(path: pathlib.Path, change: Callable[[Dict[str, Any]], object]) -> None:
    """Call `change` with the fields of a manifest and write them back with the right sum."""
    fields = json.loads(path.read_text())
    change(fields)
    write_manifest(path, fields)


def make_version_1(path: pathlib.Path) -> None:
    """Write a manifest as earlier versions of prepare did: without a sum of its own."""
    fields = {**json.loads(path.read_text()), "version": 1}
    fields.pop(SUM_FIELD, None)
    path.write_text(json.dumps(fields, indent=1) + "\n")
