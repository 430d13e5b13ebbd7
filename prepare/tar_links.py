# SPDX-License-Identifier: Apache-2.0
"""Follow the links in a tar archive to the members that they lead to."""

from __future__ import annotations

import posixpath
from collections import Counter
from typing import Container, Dict, Iterable, List, Optional, Sequence, Set

from prepare.tar_format import HARD_LINK, SYMBOLIC_LINK, TarDamageError, TarMember, read_members

LINK_KINDS = (HARD_LINK, SYMBOLIC_LINK)


def target_path(link: TarMember) -> str:
    """Return the name of the member that a link refers to."""
    if link.kind == SYMBOLIC_LINK:
        return posixpath.normpath(posixpath.join(posixpath.dirname(link.name), link.target))
    return link.target


def final_targets(links: Sequence[TarMember], repeated: Container[str] = ()) -> List[Optional[str]]:
    """Return for each link the name at the end of its chain of links; None if it is a circle.

    The time is proportional to the number of links, whatever their order.

    Args:
        links: the links of an archive.
        repeated: names of more than one member. Such a name ends a chain, and is the result for a
            link of this name.
    """
    link_of_name = {link.name: link for link in links if link.name not in repeated}
    final: Dict[str, Optional[str]] = {}  # by name of a link
    for link in links:
        chain: Dict[str, None] = {}  # names in order
        name = link.name
        while name in link_of_name and name not in final and name not in chain:
            chain[name] = None
            name = target_path(link_of_name[name])
        end = None if name in chain else final.get(name, name)
        final.update(dict.fromkeys(chain, end))
    return [final.get(link.name, link.name) for link in links]


def find_members(
    descriptor: int, begin: int, end: int, names: Iterable[str]
) -> Dict[str, List[TarMember]]:
    """Return those of an archive's members, other than links, that have one of these names.

    Args:
        descriptor: an open file.
        begin: offset of the archive in the file, bytes.
        end: offset of the archive's end in the file, bytes.
        names: the names.
    """
    wanted: Set[str] = set(names)
    found: Dict[str, List[TarMember]] = {}
    if not wanted:
        return found
    try:
        for member in read_members(descriptor, begin, end):
            if member.name in wanted and member.kind not in LINK_KINDS:
                found.setdefault(member.name, []).append(member)
    except TarDamageError:
        pass  # reported when the archive was indexed
    return found


def repeated_names(names: Iterable[str]) -> Set[str]:
    """Return the names that occur more than once."""
    return {name for name, count in Counter(names).items() if count > 1}
