"""The rules of an import, apart from files and ledger: which rows can be used, which split a group gets,
which labels are withheld. Pure functions over rows.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from images.intake import TakenIn
from images.source_table import SourceRow
from records.grouping import draw_split, draw_stratified, position
from records.taxonomy import Taxonomy
from records.types import Split


@dataclass(frozen=True)
class Refusal:
    """A row that cannot be used; see Quarantined."""

    source_id: str
    code: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """A row that can be used, with its stored image. A label of None: an image without a diagnosis."""

    row: SourceRow
    taken: TakenIn

    @property
    def image_id(self) -> str:
        """Id of the stored image."""
        return self.taken.image_id


@dataclass(frozen=True)
class GroupFacts:
    """What drawing a split needs to know of a group.

    Args:
        label: class of its first labelled image.
        splits: the splits that the table gives to its images.
    """

    label: str
    splits: frozenset[Split]


def usable_rows(rows: Sequence[SourceRow], taxonomy: Taxonomy) -> tuple[list[SourceRow], list[Refusal], list[str]]:
    """Sort out the rows that cannot be used, before any image is read.

    Args:
        rows: of the table.
        taxonomy: whose classes are known.
    Returns:
        The rows to go on with, one per image name; the refused ones; sentences about the rest.
    """
    refusals: list[Refusal] = []
    known: list[SourceRow] = []
    for row in rows:
        if row.label is not None and row.label not in taxonomy.codes:
            classes = ", ".join(taxonomy.codes)
            reason = f"{row.source_id} has the class {row.label!r}; taxonomy {taxonomy.name!r} has {classes}"
            refusals.append(Refusal(row.source_id, "unknown_class", reason))
        else:
            known.append(row)
    in_conflict = _conflicts(known, lambda row: row.source_id, "image")
    in_conflict.update(_conflicts(known, lambda row: row.context["lesion_id"], "lesion"))
    kept: dict[str, SourceRow] = {}
    repeated = 0
    for row in known:
        if row.source_id in in_conflict:
            refusals.append(Refusal(row.source_id, "label_conflict", in_conflict[row.source_id]))
        elif row.path is None:
            refusals.append(Refusal(row.source_id, "missing", row.problem or "there is no image"))
        elif row.source_id in kept:
            repeated += 1
        else:
            kept[row.source_id] = row
    notes = [f"{repeated} rows repeat the image of another row and were read once"] if repeated else []
    return list(kept.values()), list(dict.fromkeys(refusals)), notes


def merge_same_bytes(entries: Iterable[Entry]) -> tuple[list[Entry], list[tuple[str, str]], list[Refusal]]:
    """Find names whose files are byte for byte the same image.

    Args:
        entries: in the table's order.
    Returns:
        All entries whose labels agree; (name, name of the first with the same bytes) pairs; the refused rest.
    """
    by_image: dict[str, list[Entry]] = {}
    for entry in entries:
        by_image.setdefault(entry.image_id, []).append(entry)
    kept: list[Entry] = []
    same_bytes: list[tuple[str, str]] = []
    refusals: list[Refusal] = []
    for alike in by_image.values():
        labels = sorted({entry.row.label for entry in alike if entry.row.label is not None})
        names = [entry.row.source_id for entry in alike]
        if len(labels) > 1:
            reason = f"{' and '.join(names)} are the same image with the classes {' and '.join(labels)}"
            refusals.extend(Refusal(name, "label_conflict", reason) for name in names)
            continue
        kept.extend(alike)
        same_bytes.extend((name, names[0]) for name in names[1:])
    return kept, same_bytes, refusals


def draw_splits(
    groups: Mapping[str, GroupFacts], *, is_first: bool, salt: str
) -> tuple[dict[str, tuple[Split, str]], list[str]]:
    """Draw a split for every group: as the table gives it, else stratified at the first import, else by hash.

    A given split is kept if no group crosses it. Splits that it does not name (calibration and gate, as a rule)
    get their share of its training groups, because without them a model could be neither calibrated nor judged.

    Args:
        groups: group id to facts, of the labelled groups that have no split.
        is_first: True if no group has a split yet.
        salt: setting `records.split_salt`.
    Returns:
        Group id to (split, what drew it); and sentences about a split that could not be kept.
    """
    given = {group_id: facts.splits for group_id, facts in groups.items() if facts.splits}
    crossing = [group_id for group_id, named in given.items() if len(named) > 1]
    notes: list[str] = []
    if crossing:
        notes.append(f"the table's split was not kept: {len(crossing)} lesions or patients lie on two of its splits")
        given = {}
    named = {split for listed in given.values() for split in listed}
    fixed = {group_id: split for group_id, listed in given.items() for split in listed if split is not Split.TRAIN}
    free = {group_id: facts.label for group_id, facts in groups.items() if group_id not in fixed}
    drawn = draw_stratified(free, salt) if is_first else {group_id: draw_split(group_id, salt) for group_id in free}
    splits: dict[str, tuple[Split, str]] = {group_id: (split, "given") for group_id, split in fixed.items()}
    for group_id, split in drawn.items():
        stays = group_id in given and split in named
        splits[group_id] = (Split.TRAIN, "given") if stays else (split, "stratified" if is_first else "hash")
    return splits, notes


def pick_withheld(train_groups: Mapping[str, str], share: float, salt: str) -> set[str]:
    """Choose the training groups whose labels are kept back.

    Args:
        train_groups: group id to class code, groups of the train split only.
        share: of the groups of each class, 0 to below 1.
        salt: setting `records.split_salt`.
    Returns:
        Group ids: of each class the first ones by salted hash, the same ones at every call.
    """
    by_class: dict[str, list[str]] = {}
    for group_id, label in train_groups.items():
        by_class.setdefault(label, []).append(group_id)
    picked: set[str] = set()
    for members in by_class.values():
        members.sort(key=lambda group_id: (position(group_id, f"{salt}:withhold"), group_id))
        picked.update(members[: int(share * len(members) + 0.5)])
    return picked


def _conflicts(rows: Sequence[SourceRow], key: Callable[[SourceRow], str | None], what: str) -> dict[str, str]:
    """Return image name to reason, for rows that share a key and have different classes."""
    labels: dict[str, Counter[str]] = {}
    for row in rows:
        value = key(row)
        if value is not None and row.label is not None:
            labels.setdefault(value, Counter())[row.label] += 1
    reasons: dict[str, str] = {}
    for row in rows:
        value = key(row)
        if value is not None and len(labels.get(value, ())) > 1:
            reasons[row.source_id] = f"{what} {value} has the classes {' and '.join(sorted(labels[value]))}"
    return reasons
