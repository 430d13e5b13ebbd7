# SPDX-License-Identifier: Apache-2.0
"""Write tar archives member by member, and read them with prepare's reader and with tarfile."""

from __future__ import annotations

import io
import os
import tarfile
from typing import Dict, Iterable, List, Tuple

from prepare import tar_index
from prepare.image_reader import ImageReader
from prepare.listing import Problem
from prepare.plan import make_plan

Member = Tuple[tarfile.TarInfo, bytes]  # header and content


def make_member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, **fields: object
) -> Member:
    """Return a member; `fields` are attributes of its TarInfo."""
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def write_members(
    path: object, members: Iterable[Member], tar_format: int = tarfile.USTAR_FORMAT
) -> None:
    """Write an archive of these members in one of tarfile's formats."""
    with tarfile.open(str(path), "w", format=tar_format) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))


def read_all(path: object) -> Tuple[Dict[str, bytes], List[Problem]]:
    """Return {path: content} of the images that prepare reads in an archive, and the problems."""
    listing = tar_index.list_archive(str(path), 2)
    if not any(folder.names for folder in listing.folders):
        return {}, listing.problems
    plan = make_plan("train", listing, allow_empty=True)
    images = {}
    with ImageReader(plan) as reader:
        for record, name in enumerate(plan.paths):
            content = bytearray(int(plan.sizes[record]))
            reader.read(record, memoryview(content))
            images[name] = bytes(content)
    return images, plan.problems


def read_with_tarfile(path: object) -> Dict[str, bytes]:
    """Return {path: content} of the files that Python's tarfile reads in an archive."""
    images = {}
    with tarfile.open(str(path)) as tar:
        for member in tar:
            if member.isfile() or member.islnk():
                stream = tar.extractfile(member)
                assert stream is not None
                images[os.path.normpath(member.name)] = stream.read()
    return images
