# SPDX-License-Identifier: Apache-2.0
"""Follow the links in a tar archive to the members that they lead to."""

from __future__ import annotations

import posixpath
from typing import Dict, Iterable, List, Optional, Sequence, Set

from prepare.tar_format import HARD_LINK, SYMBOLIC_LINK, TarDamageError, TarMember, read_members

LINK_KINDS = (HARD_LINK, SYMBOLIC_LINK)


def target_path(link: TarMember) -> str:
    """Return the name of the member that a link refers to."""
    if link.kind == SYMBOLIC_LINK:
        return posixpath.normpath(posixpath.join(posixpath.dirname(link.name), link.target))
    return link.target


def final_targets(links: Sequence[TarMember]) -> List[Optional[str]]:
    """Return for each link the name at the end of its chain of links; None if it is a circle.

    The time is proportional to the number of links, whatever their order.
    """
    link_of_name = {link.name: link for link in links}
    final: Dict[str, Optional[str]] = {}  # by name of a link
    for link in links:
        chain: Dict[str, None] = {}  # names in order
        name = link.name
        while name in link_of_name and name not in final and name not in chain:
            chain[name] = None
            name = target_path(link_of_name[name])
        end = None if name in chain else final.get(name, name)
        final.update(dict.fromkeys(chain, end))
    return [final[link.name] for link in links]


def find_members(
    descriptor: int, begin: int, end: int, names: Iterable[str]
) -> Dict[str, TarMember]:
    """Return those of an archive's members, other than links, that have one of these names.

    Args:
        descriptor: an open file.
        begin: offset of the archive in the file, bytes.
        end: offset of the archive's end in the file, bytes.
        names: the names.
    """
    wanted: Set[str] = set(names)
    found: Dict[str, TarMember] = {}
    try:
        for member in read_members(descriptor, begin, end):
            if member.name in wanted and member.kind not in LINK_KINDS:
                found[member.name] = member
    except TarDamageError:
        pass  # reported when the archive was indexed
    return found
