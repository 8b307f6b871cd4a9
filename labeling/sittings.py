"""Sittings: a reader's own project gets a few tasks at a time, and the next ones after a break.

The tasks of a sitting are sent together, most urgent first, and each says which one of how many it is. The next sitting
is sent once all of them are annotated and the break is over. Other projects get all tasks at once: an urgent task there
waits for nobody.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

from labeling.project import ProjectKey
from labeling.settings import LabelingSettings
from records.ledger import Transaction
from records.types import ReviewItem, ReviewState


def next_sitting(
    tx: Transaction,
    project_key: ProjectKey,
    waiting: Sequence[ReviewItem],
    settings: LabelingSettings,
    now: datetime,
) -> tuple[list[ReviewItem], dict[str, str]]:
    """Choose the review items that are sent to a project now.

    Args:
        tx: with all items.
        project_key: of the project.
        waiting: its items that wait, the most urgent first.
        settings: tasks of a sitting, and the break.
        now: the time.
    Returns:
        The items, and by item what its task says of its place in the sitting.
    """
    if settings.sitting_tasks == 0 or project_key.reader is None:
        return list(waiting), {}
    own = {"blind": True, "reader": project_key.reader}
    if tx.count(ReviewItem, where={**own, "state": ReviewState.PUSHED}, at_most=1):
        return [], {}
    last = tx.find(ReviewItem, where={**own, "state": ReviewState.ANSWERED}, order_by=("-answered_at",), limit=1)
    ended = last[0].answered_at if last else None
    if ended is not None and now < ended + timedelta(minutes=settings.sitting_break_min):
        return [], {}
    chosen = list(waiting[: settings.sitting_tasks])
    said = {item.id: f"Task {number} of {len(chosen)} in this sitting." for number, item in enumerate(chosen, start=1)}
    if chosen:
        pause = f"The last task of this sitting: take a break of {settings.sitting_break_min:g} minutes afterwards."
        said[chosen[-1].id] = pause if len(chosen) > 1 else ""
    return chosen, said
