"""Groups and splits: all images of one lesion are in one group, and so on one split.

A group is a set of images that are connected by lesion, patient and near-duplicate links. The split of a labelled group
is drawn once and stored; images that are added later never move a group. Images whose links would join two splits get
no group.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from records.errors import ContractError
from records.ids import sha256_hex
from records.types import Split

if TYPE_CHECKING:
    # The functions that need it import it: that takes a third of a second, and most processes place no image.
    import networkx as nx

SPLIT_SHARES: dict[Split, float] = {
    Split.TRAIN: 0.58,
    Split.VAL: 0.10,
    Split.CALIBRATION: 0.12,
    Split.GATE: 0.10,
    Split.TEST: 0.10,
}
"""Share of the labelled groups in each split; the order is that of the hash line."""


@dataclass(frozen=True)
class KnownGroup:
    """An existing group, as far as placing new images needs it.

    Args:
        id: the group that holds the image now, after all merges.
        split: read in the transaction that writes the placement; None if it was not drawn yet.
    """

    id: str
    split: Split | None


@dataclass(frozen=True)
class Placement:
    """The groups of new images.

    Args:
        group_of: image id to group id, for every new image that could be placed.
        new_groups: ids of groups that did not exist.
        merged: group id to the group that takes it in (same split, or one of them without a split).
        refused: image id to the ids of the groups of different splits that it would have linked.
    """

    group_of: dict[str, str] = field(default_factory=dict)
    new_groups: tuple[str, ...] = ()
    merged: dict[str, str] = field(default_factory=dict)
    refused: dict[str, tuple[str, ...]] = field(default_factory=dict)


def group_id_of(first_image_id: str) -> str:
    """Return the id of a group that starts with this image, 16 hex characters."""
    return sha256_hex(f"group:{first_image_id}".encode())[:16]


def place(
    new_images: Sequence[str],
    links: Iterable[tuple[str, str]],
    known_group_of: Mapping[str, KnownGroup],
    stated: Mapping[str, str] | None = None,
) -> Placement:
    """Assign new images to groups.

    A connected component that touches groups of two splits is refused as a whole: its new images get no group.

    Args:
        new_images: ids of images without a group.
        links: pairs of image ids that belong together; either may be new or known.
        known_group_of: the group of every known image that a link names.
        stated: new image to the id that a new group with it gets; images of one id are linked.
    Returns:
        The placement.
    Raises:
        ContractError: a link names an image that is neither new nor known.
    """
    import networkx as nx

    # Groups become nodes of their own beside new images; the prefix keeps their ids apart.
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(new_images)
    groups = {group.id: group for group in known_group_of.values()}
    newcomers = set(new_images)
    for pair in links:
        ends = []
        for image_id in pair:
            # A known image stands for its whole group, so that links through the group are found as well.
            if image_id in newcomers:
                ends.append(image_id)
            elif image_id in known_group_of:
                ends.append(f"group:{known_group_of[image_id].id}")
            else:
                raise ContractError(f"a link names image {image_id[:12]}, which is neither new nor known")
        graph.add_edge(*ends)
    placement = Placement()
    new_groups: list[str] = []
    for component in nx.connected_components(graph):
        members = sorted(node for node in component if not node.startswith("group:"))
        touched = sorted(node.removeprefix("group:") for node in component if node.startswith("group:"))
        # Moving either group would change a split that models were measured on, so the images stay out.
        if len({groups[g].split for g in touched} - {None}) > 1:
            placement.refused.update(dict.fromkeys(members, tuple(touched)))
            continue
        target = _target(touched, groups, members, stated or {})
        if not touched:
            new_groups.append(target)
        placement.group_of.update(dict.fromkeys(members, target))
        placement.merged.update({g: target for g in touched if g != target})
    return Placement(placement.group_of, tuple(sorted(new_groups)), placement.merged, placement.refused)


def _target(
    touched: Sequence[str], groups: Mapping[str, KnownGroup], members: Sequence[str], stated: Mapping[str, str]
) -> str:
    """Choose the group that remains: one with a split before one without, then the smallest id."""
    if not touched:
        return min({stated[image_id] for image_id in members if image_id in stated} or {group_id_of(members[0])})
    return min(touched, key=lambda g: (groups[g].split is None, g))


def position(group_id: str, salt: str) -> float:
    """Return the position of a group on the hash line in [0, 1): the first 64 bits of its salted hash."""
    return int(sha256_hex(f"{salt}:{group_id}".encode())[:16], 16) / 2**64


def draw_split(group_id: str, salt: str) -> Split:
    """Draw the split of one group from its salted hash; over many groups the shares are `SPLIT_SHARES`."""
    return _split_at(position(group_id, salt))


def draw_stratified(class_of_group: Mapping[str, str], salt: str) -> dict[str, Split]:
    """Draw the splits of a first import so that every class, and all classes together, are divided at the shares.

    Within a class, groups are sorted by salted hash and cut at the counts of `_counts`.

    Args:
        class_of_group: group id to class code.
        salt: setting `records.split_salt`.
    Returns:
        Group id to split.
    """
    by_class: dict[str, list[str]] = {}
    for group_id, code in class_of_group.items():
        by_class.setdefault(code, []).append(group_id)
    counts = _counts({code: len(members) for code, members in sorted(by_class.items())})
    splits: dict[str, Split] = {}
    for code, members in by_class.items():
        members.sort(key=lambda group_id: (position(group_id, salt), group_id))
        places = (split for split, count in counts[code].items() for _ in range(count))
        splits.update(zip(members, places, strict=True))
    return splits


_MUST = 10**6
"""Cost that outweighs all fractions of a cell; its square outweighs all cells."""


def _counts(size_of_class: Mapping[str, int]) -> dict[str, dict[Split, int]]:
    """Return how many groups of each class go to each split.

    Every count of a class, and of all classes together, is its share rounded up or down. From five groups on no split
    is empty, for which below eight groups train gives up more than one.
    """
    import networkx as nx

    # Rounding class by class would round a share of 0.1 of every small class to nothing, and the split stays empty.
    # A table can always be rounded so that rows and columns are rounded, too: as the cheapest flow from the classes
    # through the cells to the splits.
    total = sum(size_of_class.values())
    flow: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    flow.add_node("all", demand=total)
    least = 1 if total >= len(SPLIT_SHARES) else 0
    for split, share in SPLIT_SHARES.items():
        whole = min(max(_whole(share * total), least), total - least * (len(SPLIT_SHARES) - 1))
        _add_rounded(flow, f"split {split.value}", "all", share * total, whole, _MUST**2)
    for code, size in size_of_class.items():
        flow.add_node(f"class {code}", demand=-size)
        for split, share in SPLIT_SHARES.items():
            _add_rounded(flow, f"class {code}", f"split {split.value}", share * size, _whole(share * size), _MUST)
    _, flows = nx.network_simplex(flow)
    return {
        code: {split: sum(flows[f"class {code}"][f"split {split.value}"].values()) for split in SPLIT_SHARES}
        for code in size_of_class
    }


def _whole(share: float) -> int:
    return int(round(share, 9))  # 0.58 x 50 is a little less than 29


def _add_rounded(graph: "nx.MultiDiGraph[str]", start: str, end: str, share: float, whole: int, must: int) -> None:
    """Add edges that a cheapest flow fills with `whole`, and with one more where the share has a fraction."""
    fraction = max(0.0, round(share, 9) - whole)
    graph.add_edge(start, end, capacity=whole, weight=-must)
    graph.add_edge(start, end, capacity=min(1, math.ceil(fraction)), weight=int(1000 * (1 - 2 * fraction)))
    graph.add_edge(start, end, weight=must)


def _split_at(fraction: float) -> Split:
    upper = 0.0
    for split, share in SPLIT_SHARES.items():
        upper += share
        if fraction < upper:
            return split
    return Split.TEST  # the shares add up to 1 only up to rounding
