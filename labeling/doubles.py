"""Second tasks of a question, which a network that repeats requests can leave in Label Studio."""

from collections import defaultdict
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

from labeling.client import PAGE_SIZE, LabelStudioClient
from labeling.rows import TaskRow
from records.ledger import Transaction
from records.store import Store
from records.types import ReviewItem, ReviewState

_AT_ONCE = 4


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
    touched = _touched(client, project_id, {task_id for task_ids in several.values() for task_id in task_ids})
    spare: list[int] = []
    with store.ledger.begin() as tx:
        for item_id, task_ids in several.items():
            kept = _kept(items[item_id], task_ids, touched)
            spare.extend(task_id for task_id in task_ids if task_id != kept and task_id not in touched)
            if kept != items[item_id].task_id:
                _move(tx, items[item_id], kept, touched.get(kept))

    def delete(task_id: int) -> bool:
        # Looked at once more, so that an answer that has just been given is seen; the next pull sees it, too.
        if _touched(client, project_id, {task_id}):
            return False
        client.delete_task(task_id)
        return True

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return sum(pool.map(delete, spare))


def _kept(item: ReviewItem, task_ids: list[int], touched: Mapping[int, TaskRow]) -> int:
    among = [task_id for task_id in task_ids if task_id in touched] or task_ids
    return item.task_id if item.task_id in among else min(among)


def _move(tx: Transaction, item: ReviewItem, task_id: int, answers: TaskRow | None) -> None:
    tx.update(ReviewItem, item.id, task_id=task_id)
    was_answered = answers is not None and any(not annotation.was_cancelled for annotation in answers.annotations)
    if item.state is ReviewState.PUSHED and was_answered:
        tx.update(ReviewItem, item.id, state=ReviewState.ANSWERED)


def _touched(client: LabelStudioClient, project_id: int, task_ids: Collection[int]) -> dict[int, TaskRow]:
    """Return those tasks that somebody answered or skipped, as they are now."""
    found: dict[int, TaskRow] = {}
    if task_ids:
        size = min(len(task_ids), PAGE_SIZE)
        for page in client.list_tasks(project_id, after_id=min(task_ids) - 1, with_annotations=True, page_size=size):
            found.update({row.id: row for row in page if row.id in task_ids and row.annotations})
            if page[-1].id >= max(task_ids):
                break
    return found
