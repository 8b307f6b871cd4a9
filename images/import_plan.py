"""The rules of an import and the one transaction that ends it.

The rules are pure functions over rows: which rows can be used, which split a group gets, which labels are withheld.
The transaction writes images, groups, splits, labels, quarantine and an audit event, all of them or none. Rows that
the ledger has already stay as they are, so writing the same import again adds nothing but the audit event.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import sqlalchemy as sa

from images.grouping import NearPair, set_groups, set_splits, write_groups
from images.intake import ERASED, TakenIn
from images.label_rows import Label, Said, differing, known_labels, sentence, strongest, write_labels
from images.source_table import SourceRow, SourceTable, is_blank
from records import audit
from records.erasure import remove_expired_tombstones
from records.errors import TaxonomyError
from records.grouping import draw_split, draw_stratified, position
from records.ids import hash_of, utc_now
from records.ledger import Transaction
from records.ledger.tables import TABLES, any_of
from records.store import remember_taxonomy
from records.taxonomy import Taxonomy, folded
from records.types import Group, Image, Quarantined, Split

IMPORT_ACTION = "data.imported"
"""Action of the audit event; its subject is the import's id."""


@dataclass(frozen=True)
class Refusal:
    """A row that cannot be used; see Quarantined."""

    source_id: str
    code: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """A row that can be used, with its stored image. Its label is None if the row has no diagnosis."""

    row: SourceRow
    taken: TakenIn

    @property
    def image_id(self) -> str:
        """Id of the stored image."""
        return self.taken.image_id


@dataclass(frozen=True)
class GroupFacts:
    """The facts about a group that drawing its split needs.

    Args:
        label: class of its first labelled image.
        splits: the splits that the table gives to its images.
        is_stated: whether an export says the group, and so exactly its split.
    """

    label: str
    splits: frozenset[Split]
    is_stated: bool = False


def read_label(text: str | None, taxonomy: Taxonomy, said: Mapping[str, str] | None = None) -> str | None:
    """Return the class that a table means.

    Args:
        text: as written.
        taxonomy: its classes are the known ones.
        said: `--labels`: text of the table to a class, compared as codes are.
    Returns:
        A class code; None if the row has no diagnosis.
    Raises:
        TaxonomyError: no class, or more than one, is written like this.
    """
    if text is None:
        return None
    meant = {folded(key): value for key, value in (said or {}).items()}.get(folded(text), text)
    code = taxonomy.class_of(meant)
    # After the classes, because `none` and `unknown` are classes of some taxonomies.
    if code is None and not is_blank(meant):
        raise TaxonomyError(f"the class {meant!r}; taxonomy {taxonomy.name!r} has {', '.join(taxonomy.codes)}")
    return code


def without_guesses(
    source: SourceTable, taxonomy: Taxonomy, said: Mapping[str, str] | None = None
) -> tuple[list[SourceRow], list[str]]:
    """Return the rows of a table, unlabelled if their labels are names of folders and none of them is a class.

    Args:
        source: the table.
        taxonomy: its classes are the known ones.
        said: see `read_label`.
    Returns:
        The rows, and a sentence if labels were dropped.
    """
    if not source.folders_may_be_classes or any(_is_class(row.label, taxonomy, said) for row in source.rows):
        return source.rows, []
    if all(row.label is None for row in source.rows):
        return source.rows, []
    note = f"the names of the folders are no classes of taxonomy {taxonomy.name!r}, so these images have no label"
    return [replace(row, label=None) for row in source.rows], [note]


def _is_class(text: str | None, taxonomy: Taxonomy, said: Mapping[str, str] | None) -> bool:
    try:
        return read_label(text, taxonomy, said) is not None
    except TaxonomyError:
        return False


def usable_rows(
    rows: Sequence[SourceRow], taxonomy: Taxonomy, said: Mapping[str, str] | None = None
) -> tuple[list[SourceRow], list[Refusal], list[str]]:
    """Separate the rows that can be used from the others, before any image is read.

    Args:
        rows: all rows of the table.
        taxonomy: its classes are the known ones.
        said: see `read_label`.
    Returns:
        The usable rows, one per image name; the refused ones; notes about repeated rows.
    """
    refusals: list[Refusal] = []
    known: list[SourceRow] = []
    for row in rows:
        try:
            known.append(replace(row, label=read_label(row.label, taxonomy, said)))
        except TaxonomyError as error:
            refusals.append(Refusal(row.source_id, "unknown_class", f"{row.source_id} has {error}"))
    # Which of two contradicting classes is right cannot be known here, so all rows concerned are refused.
    in_conflict = _class_conflicts(known, lambda row: row.source_id, "image")
    # In an export, each image has its strongest label, and these may differ within a lesion.
    of_lesion = _class_conflicts(known, lambda row: None if row.group else row.context["lesion_id"], "lesion")
    in_conflict.update(of_lesion)
    kept: dict[str, SourceRow] = {}
    repeated = 0
    for row in known:
        if row.source_id in in_conflict:
            refusals.append(Refusal(row.source_id, "label_conflict", in_conflict[row.source_id]))
        elif row.path is None:
            refusals.append(Refusal(row.source_id, row.code, row.problem or "there is no image"))
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
        All entries whose labels agree; (name, name of the first with the same bytes) pairs; the refused others.
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

    A given split is kept if no group crosses it. Splits that it does not name (usually calibration and gate) get their
    share of its training groups, because a model needs them to be calibrated and judged.

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
        # One group on two splits means that the table's split leaks, so none of it is kept.
        given = {}
    named = {split for listed in given.values() for split in listed}
    # Held-out splits of the table stay; its training groups may still be drawn to splits that it does not name.
    fixed = {group_id: split for group_id, listed in given.items() for split in listed if split is not Split.TRAIN}
    free = {group_id: facts.label for group_id, facts in groups.items() if group_id not in fixed}
    drawn = draw_stratified(free, salt) if is_first else {group_id: draw_split(group_id, salt) for group_id in free}
    splits: dict[str, tuple[Split, str]] = {group_id: (split, "given") for group_id, split in fixed.items()}
    for group_id, split in drawn.items():
        stays = group_id in given and split in named
        splits[group_id] = (Split.TRAIN, "given") if stays else (split, "stratified" if is_first else "hash")
    return splits, notes


def pick_withheld(train_groups: Mapping[str, str], share: float, salt: str) -> set[str]:
    """Choose the training groups whose labels are withheld.

    Args:
        train_groups: group id to class code, groups of the train split only.
        share: share of the groups of each class, 0 to below 1.
        salt: setting `records.split_salt`.
    Returns:
        Group ids: of each class the first ones by salted hash, the same ones at every call.
    """
    by_class: dict[str, list[str]] = {}
    for group_id, label in train_groups.items():
        by_class.setdefault(label, []).append(group_id)
    picked: set[str] = set()
    for members in by_class.values():
        # A salt of its own: with that of the splits, the withheld groups would be one end of the train split.
        members.sort(key=lambda group_id: (position(group_id, f"{salt}:withhold"), group_id))
        picked.update(members[: int(share * len(members) + 0.5)])
    return picked


def _class_conflicts(rows: Sequence[SourceRow], key: Callable[[SourceRow], str | None], what: str) -> dict[str, str]:
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


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Reading:
    """How a table was read; the same folder is recognized by it later.

    Args:
        table: SHA-256 of the table.
        columns: the columns that were named by the user, meaning to column.
        layout: the layout that was named by the user.
        sentence: which layout was taken, and why.
        licences: what the source says about its licence.
    """

    table: str
    columns: Mapping[str, str]
    layout: str | None = None
    sentence: str = ""
    licences: Sequence[str] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that an import writes.

    Args:
        import_id: 16 hex characters.
        entries: rows that can be used.
        images: their images, one per entry; two entries may be the same image.
        pairs: near-duplicates.
        refusals: rows that cannot be used.
        withhold_share: share of the train-split groups whose labels are withheld.
        split_salt: setting `records.split_salt`.
        taxonomy: that of the labels; the home remembers it.
        reading: goes into the audit event.
        corrects: True takes over labels that differ from stored ones.
        to_train: True puts groups without a split into train.
    """

    import_id: str
    entries: Sequence[Entry]
    images: Sequence[Image]
    pairs: Sequence[NearPair]
    refusals: Sequence[Refusal]
    withhold_share: float
    split_salt: str
    taxonomy: Taxonomy
    reading: Reading
    corrects: bool = False
    to_train: bool = False


@dataclass(frozen=True)
class Written:
    """Everything that was written.

    Args:
        new_images: images that the ledger did not know.
        group_of: image id to group id; an image that would have joined two splits is missing.
        split_of: group id to split, of the groups that have one.
        withheld: entries whose label was withheld, one per image.
        quarantined: every row that could not be used, including those of earlier runs of the same import.
        notes: sentences about a given split.
        stored: image id to the class that counts for it now, as imports and outcomes say.
        erased: images that were erased while they were read; their bytes have to be deleted again.
    """

    new_images: int
    group_of: dict[str, str]
    split_of: dict[str, Split]
    withheld: list[Entry]
    quarantined: list[Quarantined]
    notes: list[str]
    stored: Mapping[str, str]
    erased: frozenset[str] = frozenset()


def write_import(tx: Transaction, plan: Plan) -> Written:
    """Write an import in one write transaction; TaxonomyError if the home has another taxonomy."""
    if any(entry.row.label is not None for entry in plan.entries):
        remember_taxonomy(tx, plan.taxonomy)
    plan, erased = _without_erased(tx, plan)
    new_images, linking = _write_images(tx, plan)
    group_of = _groups_of(tx, plan)
    facts = _facts(plan, group_of)
    split_of, notes = _write_splits(tx, facts, plan)
    known = known_labels(tx)
    withheld = _withheld(plan, facts, group_of, split_of, known)
    left_out = {entry.image_id for entry in withheld}
    said = [Said(e.image_id, e.row.source_id, e.row.label, e.row.confirmation) for e in plan.entries if e.row.label]
    found = differing(said, known)
    conflicts = {} if plan.corrects else found
    said = [one for one in said if one.image_id not in left_out and one.image_id not in conflicts]
    counts = write_labels(tx, plan.import_id, said, known, frozenset(found) - frozenset(conflicts))
    stored = {e.image_id: row.text for e in plan.entries if (row := strongest(known.get(e.image_id, ())))} | counts
    notes += sentence(found, taken_over=plan.corrects)
    refusals = [*plan.refusals, *linking, *_contradictions(conflicts)]
    quarantined = _write_quarantine(tx, plan.import_id, refusals)
    details = {
        "images": len(group_of), "quarantined": len(quarantined), "withheld": len(withheld),
        "table": plan.reading.table, "columns": dict(plan.reading.columns), "layout": plan.reading.layout,
        "reading": plan.reading.sentence, "licences": list(plan.reading.licences),
    }  # fmt: skip
    audit.append(tx, actor="local", action=IMPORT_ACTION, subject=plan.import_id, details=details)
    if plan.corrects and found:
        changes = Counter(f"{before.text} -> {one.text}" for one, before in found.values())
        audit.append(tx, actor="local", action="labels.corrected", subject=plan.import_id, details=dict(changes))
    return Written(new_images, group_of, split_of, withheld, quarantined, notes, stored, erased)


def _contradictions(conflicts: Mapping[str, tuple[Said, Label]]) -> list[Refusal]:
    return [
        Refusal(
            one.source_id, "label_conflict", f"{one.source_id} is {one.text} here and was imported as {row.text} before"
        )
        for one, row in conflicts.values()
    ]


def _without_erased(tx: Transaction, plan: Plan) -> tuple[Plan, frozenset[str]]:
    """Refuse entries whose image was erased since it was read; returns their ids, too."""
    images = TABLES[Image].c
    of_plan = any_of(images.id, {entry.image_id for entry in plan.entries}, tx.connection.dialect)
    query = sa.select(images.id).where(of_plan, images.erased_at.is_not(None), images.expired_at.is_(None))
    erased = frozenset(tx.connection.scalars(query))
    if not erased:
        return plan, erased
    left_out = [
        Refusal(entry.row.source_id, ERASED, f"{entry.row.source_id}: this image was erased on request")
        for entry in plan.entries
        if entry.image_id in erased
    ]
    remaining = replace(
        plan,
        entries=[entry for entry in plan.entries if entry.image_id not in erased],
        images=[image for image in plan.images if image.id not in erased],
        pairs=[pair for pair in plan.pairs if erased.isdisjoint((pair.first, pair.second))],
        refusals=[*plan.refusals, *left_out],
    )
    return remaining, erased


def _write_images(tx: Transaction, plan: Plan) -> tuple[int, list[Refusal]]:
    """Write the new images with their groups; return their number and the rows that would join two splits."""
    # Their ids would otherwise collide with the rows that are added below.
    remove_expired_tombstones(tx, {image.id for image in plan.images})
    table = TABLES[Image]
    known = dict(tx.connection.execute(sa.select(table.c.id, table.c.group_id)).all())
    # Reversed, so that the first of several rows about one image wins.
    first = {image.id: image for image in reversed(plan.images)}
    without_group = sorted(image_id for image_id in first if known.get(image_id) is None)
    stated = {entry.image_id: entry.row.group for entry in plan.entries if entry.row.group is not None}
    placement = write_groups(tx, without_group, plan.images, plan.pairs, stated)
    # A known image keeps its row: only its missing group may be filled in.
    new = [image for image_id, image in first.items() if image_id not in known]
    tx.add(*(image.model_copy(update={"group_id": placement.group_of.get(image.id)}) for image in new))
    set_groups(tx, {i: group_id for i, group_id in placement.group_of.items() if i in known})
    refusals = [
        Refusal(
            entry.row.source_id,
            "links_two_splits",
            f"{entry.row.source_id} belongs to groups {' and '.join(placement.refused[entry.image_id])}, "
            "which are on two different splits",
        )
        for entry in plan.entries
        if entry.image_id in placement.refused
    ]
    return len(new), refusals


def _groups_of(tx: Transaction, plan: Plan) -> dict[str, str]:
    table = TABLES[Image]
    wanted = {image.id for image in plan.images}
    rows = tx.connection.execute(sa.select(table.c.id, table.c.group_id).where(table.c.group_id.is_not(None))).all()
    return {image_id: group_id for image_id, group_id in rows if image_id in wanted}


def _facts(plan: Plan, group_of: Mapping[str, str]) -> dict[str, GroupFacts]:
    """Collect the labelled groups of the import; the label of a group is that of its first image by id."""
    facts: dict[str, GroupFacts] = {}
    # Sorted by id, not by row, so that the order of the table does not change any split.
    for entry in sorted(plan.entries, key=lambda entry: entry.image_id):
        group_id = group_of.get(entry.image_id)
        if group_id is None or entry.row.label is None:
            continue
        splits = frozenset() if entry.row.split is None else frozenset({entry.row.split})
        before = facts.get(group_id, GroupFacts(entry.row.label, frozenset(), entry.row.group is not None))
        facts[group_id] = replace(before, splits=before.splits | splits)
    return facts


def _write_splits(tx: Transaction, facts: Mapping[str, GroupFacts], plan: Plan) -> tuple[dict[str, Split], list[str]]:
    split_of = {group.id: group.split for group in tx.find(Group) if group.split is not None}
    undrawn = {group_id: fact for group_id, fact in facts.items() if group_id not in split_of}
    stated = {
        group_id: (next(iter(fact.splits)), "given")
        for group_id, fact in undrawn.items()
        if fact.is_stated and len(fact.splits) == 1
    }
    if plan.to_train:
        stated = dict.fromkeys(undrawn, (Split.TRAIN, "given"))
    others = {group_id: fact for group_id, fact in undrawn.items() if group_id not in stated}
    drawn, notes = draw_splits(others, is_first=not split_of, salt=plan.split_salt)
    if plan.to_train and (held := sum(split_of.get(group_id, Split.TRAIN) is not Split.TRAIN for group_id in facts)):
        notes.append(f"{held} lesions were on held-out splits before and stay there, so training does not see them")
    drawn |= stated
    set_splits(tx, drawn)
    return {**split_of, **{group_id: split for group_id, (split, _) in drawn.items()}}, notes


def _withheld(
    plan: Plan,
    facts: Mapping[str, GroupFacts],
    group_of: Mapping[str, str],
    split_of: Mapping[str, Split],
    known: Mapping[str, list[Label]],
) -> list[Entry]:
    """Choose the images whose label is withheld; a label that the ledger has already cannot be."""
    train = {group_id: fact.label for group_id, fact in facts.items() if split_of.get(group_id) is Split.TRAIN}
    picked = pick_withheld(train, plan.withhold_share, plan.split_salt)
    withheld = {
        entry.image_id: entry
        for entry in plan.entries
        if entry.row.label is not None and group_of.get(entry.image_id) in picked and entry.image_id not in known
    }
    return list(withheld.values())


def _write_quarantine(tx: Transaction, import_id: str, refusals: Sequence[Refusal]) -> list[Quarantined]:
    now = utc_now()
    rows = {
        key: Quarantined(
            id=key, import_id=import_id, source_id=r.source_id, code=r.code, reason=r.reason, created_at=now
        )
        for r in refusals
        for key in [hash_of([import_id, r.source_id, r.code])[:32]]
    }
    # Keys are hashes of their content, so a second run finds its own rows and adds only new ones.
    known = {row.id for row in tx.find(Quarantined, where={"import_id": import_id})}
    # The name of an erased image is reported to whoever imports it, and not kept.
    tx.add(*(row for key, row in rows.items() if key not in known and row.code != ERASED))
    return list(rows.values())
