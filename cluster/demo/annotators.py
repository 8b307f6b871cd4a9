"""The demo's annotators, simulated or human, and what became of each of their annotations."""

import time
from collections import Counter
from typing import Any

import pandas as pd

from cluster.demo.view import View
from cluster.settings import Settings
from labeling.client import LabelStudioClient
from labeling.local_server import ServerInfo
from labeling.project import known_projects
from labeling.simulated_annotator import annotate
from records.datasets import load_dataset
from records.errors import LabelStudioError
from records.store import Store
from records.types import Annotation, AnnotationKind, ReviewItem, ReviewState, Split

POLL_S = 2.0


def annotate_as_simulated(store: Store, client: LabelStudioClient, settings: Settings) -> int:
    """Annotate the open tasks from the known truth through Label Studio's API; return how many."""
    truth = pd.read_parquet(store.home.demo / "truth.parquet")
    made = annotate(
        client,
        store,
        dict(zip(truth["image_id"], truth["label"], strict=True)),
        error_rate=settings.demo.annotator_error_rate,
        cant_tell_rate=settings.demo.cant_tell_rate,
        seed=settings.demo.seed,
    )
    return len(made)


def wait_for_people(store: Store, client: LabelStudioClient, server: ServerInfo, view: View) -> None:
    """Show address and login of Label Studio and wait until people have annotated every pushed task."""
    projects = _projects(store, client)
    for project_id in projects:
        view.say(f"annotate the tasks here: {server.url}/projects/{project_id}/data")
    view.say(f"log in as {server.username} with the password {server.password.get_secret_value()}")
    with store.ledger.read() as tx:
        wanted = tx.count(ReviewItem, where={"state": ReviewState.PUSHED})
    while (made := sum(client.state(number).total_annotations for number in projects)) < wanted:
        view.now(f"waiting for annotators: {made} of {wanted} tasks annotated")
        time.sleep(POLL_S)


def label_studio_figures(store: Store, client: LabelStudioClient, dataset_id: str) -> dict[str, Any]:
    """Compare the ledger with Label Studio: no annotation may be lost or duplicated.

    Args:
        store: with the pulled annotations.
        client: connected.
        dataset_id: the version that was built from the annotations.
    Returns:
        Counts of tasks and annotations in Label Studio, and of pulled annotations by what became of them.
    """
    projects = _projects(store, client)
    pages = (page for number in projects for page in client.list_tasks(number, with_annotations=True))
    tasks = [task for page in pages for task in page]
    there = {annotation.id for task in tasks for annotation in task.annotations if not annotation.was_cancelled}
    with store.ledger.read() as tx:
        rows = tx.find(Annotation, where={"project_id": projects}, order_by=("created_at", "id"))
    # The ledger appends a row per revision; the last one of an annotation is what it says now.
    newest = {row.annotation_id: row for row in rows}
    pulled = [row for row in newest.values() if not row.deleted]
    items = Counter(str(task.meta.get("relook_item")) for task in tasks)
    tasks_doubled = sum(count - 1 for count in items.values())
    rows_doubled = len(rows) - len({(row.annotation_id, row.revision) for row in rows})
    return {
        "tasks_pushed": len(tasks),
        "annotations_in_label_studio": len(there),
        "annotations_pulled": len(pulled),
        **_uses(pulled, load_dataset(store, dataset_id).rows),
        "lost": len(there - {row.annotation_id for row in pulled}),
        "duplicated": tasks_doubled + rows_doubled,
    }


def _uses(pulled: list[Annotation], manifest: pd.DataFrame) -> dict[str, int]:
    """Count annotations by what became of them; each is counted exactly once."""
    by_annotator = manifest[manifest["label_source"].str.startswith("annotator:")].set_index("image_id")["split"]
    uses: Counter[str] = Counter({"trained_on": 0, "cant_tell": 0, "extra_reads": 0, "held_out": 0})
    counted: set[str] = set()
    for row in pulled:
        if row.kind is not AnnotationKind.CLASS:
            uses["cant_tell"] += 1
        elif row.image_id in counted or row.image_id not in by_annotator.index:
            uses["extra_reads"] += 1
        else:
            counted.add(row.image_id)
            uses["trained_on" if by_annotator[row.image_id] == Split.TRAIN else "held_out"] += 1
    return dict(uses)


def _projects(store: Store, client: LabelStudioClient) -> list[int]:
    projects = list(known_projects(store, client))
    if not projects:
        raise LabelStudioError("nothing was pushed to Label Studio yet")
    return projects
