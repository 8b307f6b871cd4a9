"""An annotator that knows the truth and answers through Label Studio's own API, for demos and experiments.

What it says travels the same way as a person's answer: it becomes an annotation, by a named user of
its own, and is read back by a pull. What it gets wrong depends on the seed and the image alone.
"""

import random
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from labeling.client import LabelStudioClient
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
    """One answer that the simulated annotator gave.

    Args:
        review_item_id: the question.
        image_id: what it is about.
        label: class code, or None for `can't tell`.
        correct: whether it is the truth; False for `can't tell`.
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
    """Answer the open tasks whose truth is known, the most urgent first.

    Args:
        client: connected.
        store: with the ledger that says which questions are open.
        truth: class code by image id.
        error_rate: share of answers that name another class, 0 to 1.
        cant_tell_rate: share of answers that are `can't tell`, 0 to 1.
        seed: of both draws; equal seed and image give the equal answer.
        limit: at most so many answers.
        advance: hears how far it is.
    Returns:
        The answers given now. A task that it answered before is left alone.
    Raises:
        ContractError: a rate is outside 0 to 1, or both together are above 1.
        LabelStudioError: Label Studio does not answer.
    """
    if min(error_rate, cant_tell_rate) < 0 or not error_rate + cant_tell_rate <= 1:
        raise ContractError(f"rates must be 0 to 1 together, got {error_rate} wrong and {cant_tell_rate} can't tell")
    projects = list(known_projects(store, client))
    if not projects:
        return []
    with store.ledger.read() as tx:
        where = {"state": ReviewState.PUSHED, "project_id": projects}
        waiting = tx.find(ReviewItem, where=where, order_by=("-priority", "id"))
    wanted = [item for item in waiting if item.image_id in truth and item.task_id is not None][:limit]
    if not wanted:
        return []
    reader = client.ensure_user(EMAIL, "Simulated", "annotator")

    def give(item: ReviewItem) -> SimulatedAnnotation | None:
        right = truth[item.image_id]
        label = _draw(right, store.taxonomy, f"{seed}:{item.image_id}", error_rate, cant_tell_rate)
        key = uuid.uuid5(_KEYS, item.id)
        try:
            made = client.create_annotation(
                item.task_id or 0, annotation_result(label or CANT_TELL), key=key, completed_by=reader
            )
        except UnknownIdError:  # the task was deleted meanwhile; the next pull says so
            return None
        return None if made is None else SimulatedAnnotation(item.id, item.image_id, label, label == right, made)

    given: list[SimulatedAnnotation] = []
    with ThreadPoolExecutor(_CONCURRENCY) as pool:
        for number, one in enumerate(pool.map(give, wanted), start=1):
            if one is not None:
                given.append(one)
            advance(number, len(wanted))
    return given


def read_truth(path: Path, taxonomy: Taxonomy) -> dict[str, str]:
    """Read what is true.

    Args:
        path: a CSV or parquet file with the columns image_id and label.
        taxonomy: of the labels.
    Returns:
        Class code by image id.
    Raises:
        DataError: there is no such file, or it lacks a column.
        TaxonomyError: a label is not a class.
    """
    if not path.is_file():
        raise DataError(f"there is no file {str(path)!r}; name one with the columns image_id and label")
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=str)
    if not {"image_id", "label"} <= set(table.columns):
        raise DataError(f"{str(path)!r} has the columns {', '.join(table.columns)}; it needs image_id and label")
    for label in table["label"].unique():
        taxonomy.index_of(label)
    return dict(zip(table["image_id"], table["label"], strict=True))


def _draw(right: str, taxonomy: Taxonomy, key: str, error_rate: float, cant_tell_rate: float) -> str | None:
    chance = random.Random(key)
    draw = chance.random()
    if draw < cant_tell_rate:
        return None
    if draw < cant_tell_rate + error_rate:
        return chance.choice([code for code in taxonomy.codes if code != right])
    return right
