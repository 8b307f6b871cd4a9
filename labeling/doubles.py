"""Second tasks of a question, which a network that repeats requests can leave in Label Studio."""

from collections import defaultdict
from collections.abc import Mapping

from labeling.client import LabelStudioClient
from labeling.rows import TaskRow
from records.store import Store
from records.types import ReviewItem, ReviewState


def remove_doubles(store: Store, client: LabelStudioClient, project_id: int, items: Mapping[str, ReviewItem]) -> int:
    """Leave one task for each question.

    The one that was answered stays, else the one that the ledger knows. A task that somebody answered or
    skipped is never deleted.

    Args:
        store: with the questions.
        client: connected.
        project_id: of this store.
        items: questions that have a task there, by id.
    Returns:
        How many tasks were deleted.
    Raises:
        LabelStudioError: Label Studio does not answer; what is left is removed the next time.
    """
    found: dict[str, list[int]] = defaultdict(list)
    for page in client.list_tasks(project_id, page_size=5000):
        for row in page:
            found[str(row.meta.get("relook_item"))].append(row.id)
    several = {item_id: task_ids for item_id, task_ids in found.items() if len(task_ids) > 1 and item_id in items}
    return sum(_leave_one(store, client, project_id, items[item_id], several[item_id]) for item_id in several)


def _leave_one(store: Store, client: LabelStudioClient, project_id: int, item: ReviewItem, task_ids: list[int]) -> int:
    # Looked at again one by one, so that an answer that has just been given is seen.
    rows = [row for task_id in task_ids if (row := _read(client, project_id, task_id)) is not None]
    touched = {row.id: row for row in rows if row.annotations}
    kept = item.task_id if item.task_id in touched or not touched else min(touched)
    spare = [row.id for row in rows if row.id != kept and row.id not in touched]
    for task_id in spare:
        client.delete_task(task_id)
    if kept != item.task_id:
        answered = any(not annotation.was_cancelled for annotation in touched[kept or 0].annotations)
        with store.ledger.begin() as tx:
            tx.update(ReviewItem, item.id, task_id=kept)
            if answered and item.state is ReviewState.PUSHED:
                tx.update(ReviewItem, item.id, state=ReviewState.ANSWERED)
    return len(spare)


def _read(client: LabelStudioClient, project_id: int, task_id: int) -> TaskRow | None:
    page = next(client.list_tasks(project_id, after_id=task_id - 1, with_annotations=True, page_size=1), [])
    return page[0] if page and page[0].id == task_id else None
