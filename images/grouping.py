"""Groups of images: links by lesion, patient and near-duplicate, and subsets of whole groups.

Input: images in the ledger, or about to be added. Output: links, near-duplicate pairs, and groups written in the
caller's transaction. Splits are drawn elsewhere (`images.import_plan`, `records.labelled`).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import sqlalchemy as sa
from rich.progress import Progress

from images.cache import PixelCache
from images.label_rows import known_labels, strongest
from images.near_duplicates import HASH_FRAME, find_near_duplicates, perceptual_hash
from records.arrays import IntArray, UInt8Array
from records.errors import DataError
from records.grouping import KnownGroup, Placement, place
from records.ids import utc_now
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.store import Store, find_images
from records.types import Annotation, AnnotationKind, Group, Image, Split


@dataclass(frozen=True)
class NearPair:
    """Two images that are nearly the same.

    Args:
        first: id of one image.
        second: id of the other.
        bits: number of bits, of 64, in which their hashes differ.
        correlation: correlation of their grey 64 px squares.
        same_diagnosis: False if both have a diagnosis and these differ; such a pair is not joined.
        same_lesion: True if both name the same lesion.
    """

    first: str
    second: str
    bits: int
    correlation: float
    same_diagnosis: bool
    same_lesion: bool


def group_images(store: Store, image_ids: Sequence[str]) -> int:
    """Assign images of the ledger to groups and return how many got one.

    An image that has a group keeps it, and an image whose links would join two splits gets none. Raises
    UnknownIdError if an image is not in the ledger, DataError if its file is gone or does not decode.
    """
    newcomers = [i for i in find_images(store, list(dict.fromkeys(image_ids))) if i.group_id is None]
    if not newcomers:
        return 0
    diagnoses = known_diagnoses(store)
    # Comparing decodes images, so it happens before the write transaction.
    pairs = near_pairs(store, newcomers, diagnoses, beside=grouped_images(store))
    with store.ledger.begin() as tx:
        placement = write_groups(tx, [image.id for image in newcomers], newcomers, pairs)
        set_groups(tx, placement.group_of)
    return len(placement.group_of)


def grouped_images(store: Store) -> list[Image]:
    """Return the images that are in a group and not erased, by id."""
    table = TABLES[Image]
    query = sa.select(table).where(table.c.group_id.is_not(None), table.c.erased_at.is_(None)).order_by(table.c.id)
    with store.ledger.read() as tx:
        return [Image.model_validate(dict(row)) for row in tx.connection.execute(query).mappings()]


def known_diagnoses(store: Store) -> dict[str, str]:
    """Return image id to diagnosis: the strongest imported one, else the one that all annotators agree on."""
    said: dict[str, set[str]] = {}
    with store.ledger.read() as tx:
        for label in tx.find(Annotation, where={"kind": AnnotationKind.CLASS, "deleted": False, "gold": False}):
            if label.label is not None:
                said.setdefault(label.image_id, set()).add(label.label)
        imported = known_labels(tx)
    diagnoses = {image_id: next(iter(labels)) for image_id, labels in said.items() if len(labels) == 1}
    diagnoses.update({i: row.text for i, rows in imported.items() if (row := strongest(rows)) is not None})
    return diagnoses


def near_pairs(
    store: Store,
    newcomers: Sequence[Image],
    diagnoses: Mapping[str, str],
    *,
    beside: Sequence[Image] = (),
    progress: Progress | None = None,
) -> list[NearPair]:
    """Find the near-duplicates among new images, and between new and known ones.

    Args:
        store: missing pixels are added to its 64 px cache.
        newcomers: images in the ledger, or whose 64 px squares are cached.
        diagnoses: image id to diagnosis, as far as known.
        beside: known images, which were compared with each other before.
        progress: shows decoding.
    Returns:
        The pairs, in the order of the images.
    Raises:
        DataError: an image's file is gone or does not decode.
    """
    images = [*beside, *newcomers]
    cache = PixelCache(store.home.cache, HASH_FRAME)

    def squares(index: IntArray) -> UInt8Array:
        wanted = [images[i].id for i in index.tolist()]
        cache.ensure(store, wanted, progress)
        return cache.rows(wanted).take(np.arange(len(wanted)))

    # Imported images have a hash in the ledger; images from the service are hashed here.
    unhashed = np.array([i for i, image in enumerate(images) if image.perceptual_hash is None], dtype=np.int64)
    computed = (
        dict(zip(unhashed.tolist(), map(perceptual_hash, squares(unhashed)), strict=True)) if len(unhashed) else {}
    )
    texts = [image.perceptual_hash or computed[i] for i, image in enumerate(images)]
    hashes = np.array([int(text, 16) for text in texts], dtype=np.uint64)
    found = find_near_duplicates(hashes, squares, first_new=len(beside))
    return [_pair(images[pair.first], images[pair.second], pair.bits, pair.correlation, diagnoses) for pair in found]


def _pair(first: Image, second: Image, bits: int, correlation: float, diagnoses: Mapping[str, str]) -> NearPair:
    one, other = diagnoses.get(first.id), diagnoses.get(second.id)
    return NearPair(
        first=first.id,
        second=second.id,
        bits=bits,
        correlation=round(correlation, 4),
        same_diagnosis=one is None or other is None or one == other,
        same_lesion=first.lesion_id is not None and first.lesion_id == second.lesion_id,
    )


def write_groups(
    tx: Transaction,
    new_ids: Sequence[str],
    described: Sequence[Image],
    pairs: Iterable[NearPair],
    stated: Mapping[str, str] | None = None,
) -> Placement:
    """Place new images into groups, and write the groups that are new or that merge.

    Args:
        tx: a write transaction.
        new_ids: images without a group.
        described: rows that name lesions and patients of new or known images; an image may have several.
        pairs: near-duplicates; those with different diagnoses are no links.
        stated: image id to the id of its group in an export, which is kept if the ledger has no such group.
    Returns:
        The placement. The caller writes it into the images.
    """
    images, groups = TABLES[Image], {group.id: group for group in tx.find(Group)}
    query = sa.select(images.c.id, images.c.group_id, images.c.lesion_id, images.c.patient_hash).where(
        images.c.group_id.is_not(None)
    )
    known = tx.connection.execute(query).all()
    group_of = {row.id: _final(row.group_id, groups) for row in known}
    links = [(pair.first, pair.second) for pair in pairs if pair.same_diagnosis]
    links += _links("lesion_id", described, {row.lesion_id: row.id for row in known})
    links += _links("patient_hash", described, {row.patient_hash: row.id for row in known})
    links += _stated_links(stated or {}, {group.id: image_id for image_id, group in group_of.items()}, groups)
    # A description may name an image that is not part of this import and has no group: no link can lead there.
    reachable = {*new_ids, *group_of}
    links = [(one, other) for one, other in links if one in reachable and other in reachable]
    named = {image_id for link in links for image_id in link}
    known_group_of = {i: KnownGroup(g.id, g.split) for i, g in group_of.items() if i in named}
    unknown = {image_id: group_id for image_id, group_id in (stated or {}).items() if group_id not in groups}
    placement = place(new_ids, links, known_group_of, unknown)
    now = utc_now()
    tx.add(*(Group(id=group_id, created_at=now) for group_id in placement.new_groups))
    for group_id, target in placement.merged.items():
        # The merged group keeps its row, since older dataset versions name it; its images move to the target at once.
        tx.update(Group, group_id, merged_into=target)
        tx.connection.execute(sa.update(images).where(images.c.group_id == group_id).values(group_id=target))
    return placement


def _links(field: str, described: Sequence[Image], known: Mapping[str | None, str]) -> list[tuple[str, str]]:
    """Link each row to one image, known or new, that has the same value in a field."""
    first = {value: image_id for value, image_id in known.items() if value is not None}
    links = []
    for image in described:
        value = getattr(image, field)
        # A star, not all pairs: connected components are the same, and a patient may have hundreds of images.
        if value is not None and first.setdefault(value, image.id) != image.id:
            links.append((first[value], image.id))
    return links


def _stated_links(
    stated: Mapping[str, str], member_of: Mapping[str, str], groups: Mapping[str, Group]
) -> list[tuple[str, str]]:
    """Link each image of an export to one image, known or new, of the group that the export says."""
    first, links = dict(member_of), []
    for image_id, group_id in stated.items():
        held_by = _final(group_id, groups).id if group_id in groups else group_id
        if first.setdefault(held_by, image_id) != image_id:
            links.append((first[held_by], image_id))
    return links


def _final(group_id: str, groups: Mapping[str, Group]) -> Group:
    group = groups[group_id]
    while group.merged_into is not None:
        group = groups[group.merged_into]
    return group


def set_groups(tx: Transaction, group_of: Mapping[str, str]) -> None:
    """Write the group of images that are in the ledger; `group_of` maps image id to group id."""
    if group_of:
        table = TABLES[Image]
        statement = sa.update(table).where(table.c.id == sa.bindparam("key")).values(group_id=sa.bindparam("group"))
        tx.connection.execute(statement, [{"key": key, "group": group} for key, group in group_of.items()])


def set_splits(tx: Transaction, splits: Mapping[str, tuple[Split, str]]) -> None:
    """Write the split of groups that have none; `splits` maps group id to (split, what drew it)."""
    if splits:
        table, now = TABLES[Group], utc_now()
        statement = (
            sa.update(table)
            .where(table.c.id == sa.bindparam("key"), table.c.split.is_(None))
            .values(split=sa.bindparam("new_split"), drawn_by=sa.bindparam("how"), drawn_at=sa.bindparam("now"))
        )
        rows = [{"key": g, "new_split": s.value, "how": how, "now": now} for g, (s, how) in splits.items()]
        tx.connection.execute(statement, rows)


def grouped_subset(rows: pd.DataFrame, max_images: int | None, seed: int) -> pd.DataFrame:
    """Take whole groups until about `max_images` images are chosen, each class in its proportion.

    A class gets its share of the images, rounded down, and at least one group, even one larger than the share. So the
    subset exceeds `max_images` at most by a few images of rare classes.

    Args:
        rows: rows of one split; columns image_id, group_id, label; N >= 1.
        max_images: None, or at least N, takes all.
        seed: a larger subset of the same seed is drawn in the same order.
    Returns:
        The chosen rows, in their order, with a fresh index.
    Raises:
        DataError: fewer images are allowed than there are classes.
    """
    if max_images is None or max_images >= len(rows):
        return rows.reset_index(drop=True)
    groups = rows.groupby("group_id", sort=True).agg(label=("label", "first"), size=("image_id", "size"))
    classes = sorted(groups["label"].unique())
    if max_images < len(classes):
        raise DataError(
            f"max_train_images is {max_images}, but {len(classes)} classes need an image each; "
            f"set it to at least {len(classes)}"
        )
    random = np.random.default_rng(seed)
    chosen: list[str] = []
    for label in classes:
        members = groups[groups["label"] == label]
        shuffled = members.iloc[random.permutation(len(members))]
        quota = int(max_images * members["size"].sum() / len(rows))
        # The cumulative sum keeps the prefix of one fixed order, which makes larger subsets contain smaller ones.
        fits = shuffled["size"].cumsum() <= quota
        fits.iloc[0] = True
        chosen.extend(shuffled.index[fits])
    return rows[rows["group_id"].isin(chosen)].reset_index(drop=True)
