"""A simulated annotator, which annotates tasks from a known truth through Label Studio's API, for demos and tests.

Its annotations are those of a Label Studio user of its own and are read back by a pull like anybody else's. Which of
them are wrong depends on the seed and the image alone.
"""

import random
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from labeling.client import LabelStudioClient
from labeling.existing.link import linked_pages
from labeling.existing.page import LabelPage
from labeling.project import known_projects
from labeling.push import Advance
from labeling.tasks import CANT_TELL, annotation_result
from records.errors import ContractError, DataError, UnknownIdError
from records.store import Store
from records.taxonomy import Taxonomy
from records.types import ReviewItem, ReviewState

EMAIL = "simulated.annotator@relook.local"
_CONCURRENCY = 4
_KEYS = uuid.UUID("5f6ac1c3-2f4e-4f0e-9a63-6a3a0f0d7f52")


@dataclass(frozen=True)
class SimulatedAnnotation:
    """One annotation that the simulated annotator made.

    Args:
        review_item_id: of the task.
        image_id: of the task.
        label: class code, or None for `can't tell`.
        correct: whether the label is the truth; False for `can't tell`.
        annotation_id: in Label Studio.
    """

    review_item_id: str
    image_id: str
    label: str | None
    correct: bool
    annotation_id: int


def annotate(
    client: LabelStudioClient,
    store: Store,
    truth: Mapping[str, str],
    *,
    error_rate: float = 0.0,
    cant_tell_rate: float = 0.0,
    seed: int = 0,
    limit: int | None = None,
    advance: Advance = lambda done, total: None,
) -> list[SimulatedAnnotation]:
    """Annotate the open tasks whose truth is known, the most urgent first.

    Args:
        client: connected.
        store: its ledger says which tasks are open.
        truth: class code by image id.
        error_rate: share of annotations that name another class, 0 to 1.
        cant_tell_rate: share of annotations that are `can't tell`, 0 to 1.
        seed: of both draws; the same seed and image give the same annotation.
        limit: most annotations to make; default: no limit.
        advance: called with (done, total) after each task.
    Returns:
        The annotations made now; tasks that were annotated by an earlier call are left out.
    Raises:
        ContractError: a rate is outside 0 to 1, or both together are above 1.
        LabelStudioError: Label Studio cannot be reached.
    """
    if min(error_rate, cant_tell_rate) < 0 or not error_rate + cant_tell_rate <= 1:
        raise ContractError(f"rates must be 0 to 1 together, got {error_rate} wrong and {cant_tell_rate} can't tell")
    if not (projects := list(known_projects(store, client))):
        return []
    with store.ledger.read() as tx:
        where = {"state": ReviewState.PUSHED, "project_id": projects}
        waiting = tx.find(ReviewItem, where=where, order_by=("-priority", "id"))
    wanted = [item for item in waiting if item.image_id in truth and item.task_id is not None][:limit]
    if not wanted:
        return []
    user_id = client.ensure_user(EMAIL, "Simulated", "annotator")
    pages = linked_pages(store, client)

    def annotate_one(item: ReviewItem) -> SimulatedAnnotation | None:
        right = truth[item.image_id]
        label = _draw(right, store.taxonomy, f"{seed}:{item.image_id}", error_rate, cant_tell_rate)
        # One key per item, so that a second call, or a request that is sent twice, adds no second annotation.
        key = uuid.uuid5(_KEYS, item.id)
        if not (result := _result(pages.get(item.project_id or 0), label, store.taxonomy)):
            return None
        try:
            made = client.create_annotation(item.task_id or 0, result, key=key, completed_by=user_id)
        except UnknownIdError:  # the task was deleted meanwhile; the next pull withdraws its item
            return None
        return None if made is None else SimulatedAnnotation(item.id, item.image_id, label, label == right, made)

    made_now: list[SimulatedAnnotation] = []
    with ThreadPoolExecutor(_CONCURRENCY) as pool:
        for number, one in enumerate(pool.map(annotate_one, wanted), start=1):
            made_now += [] if one is None else [one]
            advance(number, len(wanted))
    return made_now


def read_truth(path: Path, taxonomy: Taxonomy) -> dict[str, str]:
    """Read class codes by image id from a CSV or parquet file with the columns image_id and label.

    Raises DataError if there is no such file or a column is missing, and TaxonomyError if a label is not a class.
    """
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}; name one with the columns image_id and label")
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=str)
    if not {"image_id", "label"} <= set(table.columns):
        raise DataError(f"{str(path)!r} has the columns {', '.join(table.columns)}; it needs image_id and label")
    for label in table["label"].unique():
        taxonomy.index_of(label)
    return dict(zip(table["image_id"], table["label"], strict=True))


def _result(page: LabelPage | None, label: str | None, taxonomy: Taxonomy) -> list[dict[str, Any]]:
    """Return what chooses a class on Relook's page or a linked one; nothing if its choices lack it."""
    return annotation_result(label or CANT_TELL) if page is None else page.result(label, taxonomy)


def _draw(right: str, taxonomy: Taxonomy, key: str, error_rate: float, cant_tell_rate: float) -> str | None:
    chance = random.Random(key)
    draw = chance.random()
    if draw < cant_tell_rate:
        return None
    if draw < cant_tell_rate + error_rate:
        return chance.choice([code for code in taxonomy.codes if code != right])
    return right
