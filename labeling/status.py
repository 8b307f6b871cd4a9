"""Status of labeling: the server, the projects, the review items by state, and problems with their fixes."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from labeling.client import LabelStudioClient
from labeling.connection import connect
from labeling.environment import environment_of, is_ready
from labeling.existing.link import active_link, linked_pages
from labeling.local_server import LocalLabelStudio
from labeling.project import ProjectKey, is_ours, known_project, known_projects, own_page
from labeling.servers import find_move, unsettled
from labeling.settings import LabelingSettings
from records.errors import RelookError
from records.ids import utc_now
from records.store import Store
from records.types import Annotation, ReviewItem, ReviewState


class LabelingStatus(BaseModel):
    """The state of labeling; `problems` holds one sentence with the fix per problem."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str | None = Field(default=None, description="of the Label Studio that responds")
    version: str | None = None
    installed: bool = Field(description="whether the local environment is complete")
    project_id: int | None = Field(default=None, description="of the shared project, or of the linked one")
    linked: bool = Field(default=False, description="whether that project is a linked one")
    tasks: int | None = Field(default=None, description="tasks in the project")
    items: dict[str, int] = Field(description="review items by state")
    oldest_waiting_s: float | None = Field(default=None, description="age of the oldest item not yet pushed, seconds")
    overdue: int = Field(ge=0, description="urgent items past their deadline without an annotation")
    annotations: int = Field(ge=0, description="rows read from Label Studio, tombstones included")
    problems: list[str]


def status(store: Store, settings: LabelingSettings) -> LabelingStatus:
    """Check the server, its projects and the outbox; an unreachable server is a problem in the result, not an error."""
    problems: list[str] = []
    installed = is_ready(environment_of(settings))
    if not installed and settings.url is None:
        problems.append("Label Studio is not installed; run `relook label install`")
    url, version, project_id, tasks, linked = None, None, None, None, None
    try:
        client = connect(store.home, settings)
        if client is not None:
            with client:
                version, url = client.version(), client.url
                linked = active_link(store, client)
                project_id = known_project(store, client) if linked is None else linked
                move = find_move(store, client)
                # The projects of the old address are not missing here: nothing is made anew before somebody decides.
                is_loss = move is not None and move.is_loss
                if move is not None and is_loss:
                    problems.append(unsettled(move, client))
                known = {} if is_loss else known_projects(store, client)
                counts = [_check_project(store, client, settings, *one, problems) for one in known.items()]
                there = [count for count in counts if count is not None]
                tasks = sum(there) if there else None
        elif installed:
            problems.append("Label Studio was never started here; run `relook label up`")
    except RelookError as error:
        problems.append(str(error))
        if settings.url is None:
            problems.append(f"its log is {LocalLabelStudio(store.home, settings).log_file}")
    outbox = _check_outbox(store, problems)
    return LabelingStatus(
        url=url, version=version, installed=installed, project_id=project_id, linked=linked is not None, tasks=tasks,
        problems=problems, **outbox,
    )  # fmt: skip


def _check_project(
    store: Store,
    client: LabelStudioClient,
    settings: LabelingSettings,
    project_id: int,
    project_key: ProjectKey,
    problems: list[str],
) -> int | None:
    if project_key.linked is not None:
        linked_pages(store, client, project_id)
        return client.state(project_id).total
    project = client.project(project_id)
    if project is None or not is_ours(store, client, project_id, project_key):
        problems.append(
            f"project {project_id} is gone from Label Studio; `relook label sync` makes it anew and sends its open "
            "review items again"
        )
        return None
    if project.label_config != own_page(store, settings, project_key)[0].strip():
        problems.append(f"the labeling page of project {project_id} was changed by hand; the next push sets it back")
    return client.state(project_id).total


def _check_outbox(store: Store, problems: list[str]) -> dict[str, Any]:
    now = utc_now()
    with store.ledger.read() as tx:
        items = {state.value: tx.count(ReviewItem, where={"state": state}) for state in ReviewState}
        oldest = tx.find(ReviewItem, where={"state": ReviewState.NEW}, order_by=("created_at",), limit=1)
        waiting = tx.find(ReviewItem, where={"state": (ReviewState.NEW, ReviewState.PUSHED)})
        num_labels = tx.count(Annotation)
    overdue = sum(1 for item in waiting if item.due is not None and item.due < now)
    if overdue:
        problems.append(f"{overdue} urgent review items are past their deadline; ask an annotator to open Label Studio")
    return {
        "items": items,
        "oldest_waiting_s": (now - oldest[0].created_at).total_seconds() if oldest else None,
        "overdue": overdue,
        "annotations": num_labels,
    }
