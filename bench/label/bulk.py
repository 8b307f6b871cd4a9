"""Rates of pushing tasks and pulling annotations, compared with a client that only transfers them.

Both use one real, local Label Studio. The bare client sends the task documents that a push sent, in the same batches,
and reads the same pages of annotations; it makes no images, keeps no ledger and checks nothing. They alternate, so
that other load on the machine affects both.
"""

import io
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image as PillowImage

from labeling.client import LabelStudioClient
from labeling.local_server import ServerInfo
from labeling.project import known_project
from labeling.pull import pull
from labeling.push import push
from labeling.settings import LabelingSettings
from labeling.tasks import annotation_result, label_config
from records.errors import IntegrityError
from records.ids import new_id, utc_now
from records.store import Store
from records.types import Annotation, Image, ReasonCode, ReviewItem

TURNS = 5
_ANNOTATORS = 4
_PAGE_SIZE = 500


def measure(
    store: Store,
    server: ServerInfo,
    settings: LabelingSettings,
    items: int,
    advance: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Push, annotate and pull, and let the bare client do the same.

    Args:
        store: empty; it is filled with generated images.
        server: a Label Studio without projects.
        settings: of the labeling room.
        items: number of tasks.
        advance: called with a line about each step.
    Returns:
        The keys of `python -m bench label`; rates are tasks and annotations per second.
    Raises:
        LabelStudioError: Label Studio cannot be reached or refuses.
        IntegrityError: the two clients did not read the same number of annotations.
    """
    settings = settings.model_copy(update={"blind_share": 0.0})
    with _Recording(server.url, server.token) as client, LabelStudioClient(server.url, server.token) as bare:
        advance(f"pushing {items} tasks")
        pushed_s, bare_pushed_s = _push_in_turns(store, client, bare, settings, items)
        advance(f"annotating {items} tasks")
        _annotate_all(store, client)
        advance(f"pulling {items} annotations")
        number = known_project(store, client) or 0
        first_s, first = _timed(lambda: _read_bare(bare, number))
        # The bare client reads before and after the pull; the mean cancels a drift of the machine's speed.
        pulled_s, report = _timed(lambda: pull(store, client, settings))
        second_s, second = _timed(lambda: _read_bare(bare, number))
        if {first, second, report.new_labels} != {items}:
            raise IntegrityError(f"{items} annotations were made and {first}, {report.new_labels}, {second} were read")
        exact = counted(store, client)
    bare_pulled_s = (first_s + second_s) / 2
    return {
        "items": items,
        "push_s": items / pushed_s,
        "bare_push_s": items / bare_pushed_s,
        "push_over_bare": bare_pushed_s / pushed_s,
        "pull_s": items / pulled_s,
        "bare_pull_s": items / bare_pulled_s,
        "pull_over_bare": bare_pulled_s / pulled_s,
        "lost": exact["lost"],
        "duplicated": exact["doubled"],
    }


def counted(store: Store, client: LabelStudioClient) -> dict[str, Any]:
    """Compare the ledger with the shared project in Label Studio, as it is now.

    Args:
        store: with what was pushed and pulled.
        client: connected.
    Returns:
        Numbers of `tasks` and `annotations`; `lost`: review items without a task and annotations missing from the
        ledger; `doubled`: second tasks of a review item and second rows of a revision; `different`: annotations whose
        label differs in the ledger, or that Label Studio no longer has.
    """
    project_id = known_project(store, client)
    pages = client.list_tasks(project_id, with_annotations=True) if project_id is not None else ()
    rows = [row for page in pages for row in page]
    with store.ledger.read() as tx:
        items = {item.id for item in tx.find(ReviewItem)}
        labels = tx.find(Annotation, order_by=("created_at", "id"))
    tasks = Counter(str(row.meta.get("relook_item")) for row in rows)
    made = {a.id: a.result[0]["value"]["choices"][0] for row in rows for a in row.annotations if not a.was_cancelled}
    newest = {label.annotation_id: label for label in labels}
    held = {number: label.label for number, label in newest.items() if not label.deleted}
    revisions = {(label.annotation_id, label.revision) for label in labels}
    return {
        "tasks": len(rows),
        "annotations": len(made),
        "lost": len(items - tasks.keys()) + len(made.keys() - held.keys()),
        "doubled": tasks.total() - len(tasks) + len(labels) - len(revisions),
        "different": sum(held[number] != label for number, label in made.items() if number in held)
        + len(held.keys() - made.keys()),
    }


def add_review_items(store: Store, count: int, seed: int) -> None:
    """Add review items of generated images with random priorities."""
    chance = np.random.default_rng(seed)
    for start in range(0, count, 500):
        records: list[Image | ReviewItem] = []
        for _ in range(start, min(start + 500, count)):
            blob, now = store.blobs.put(_image(chance)), utc_now()
            records.append(
                Image(
                    id=blob, uri=store.blobs.uri(blob), format="jpeg", width_px=200, height_px=152, provenance="bench",
                    created_at=now,
                )
            )  # fmt: skip
            records.append(
                ReviewItem(
                    id=new_id(), created_at=now, image_id=blob, reasons=[ReasonCode.REFER],
                    priority=float(chance.random() * 300), heat_map=chance.integers(0, 256, (7, 7)).tolist(),
                )
            )  # fmt: skip
        with store.ledger.begin() as tx:
            tx.add(*records)


class _Recording(LabelStudioClient):
    """A client that keeps the batches that it imported."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.sent: list[Sequence[Mapping[str, Any]]] = []

    def import_tasks(self, project_id: int, tasks: Sequence[Mapping[str, Any]]) -> list[int]:
        self.sent.append(tasks)
        return super().import_tasks(project_id, tasks)


def _push_in_turns(
    store: Store, client: _Recording, bare: LabelStudioClient, settings: LabelingSettings, items: int
) -> tuple[float, float]:
    """Return the seconds that the push and the bare client took for all tasks."""
    project = {"title": "bare", "label_config": label_config(store.taxonomy)}
    bare_project = int(bare.request("POST", "api/projects/", "make a project", body=project)["id"])
    pushed_s = bare_s = 0.0
    for turn in range(TURNS):
        add_review_items(store, items // TURNS + (turn < items % TURNS), seed=turn)
        client.sent.clear()
        pushed_s += _timed(lambda: push(store, client, settings))[0]
        bare_s += _timed(lambda: _send_bare(bare, bare_project, client.sent))[0]
    return pushed_s, bare_s


def _send_bare(bare: LabelStudioClient, project_id: int, batches: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    for batch in batches:
        bare.request("POST", f"api/projects/{project_id}/import", "import", body=list(batch), repeat=False)


def _read_bare(bare: LabelStudioClient, project_id: int) -> int:
    """Read all annotations of a project page by page and return their number."""
    wanted = {"project": project_id, "fields": "all", "page_size": _PAGE_SIZE, "include": "id,annotations,result"}
    found, page = 0, 1
    while True:
        listed = bare.request("GET", "api/tasks/", "read", params={**wanted, "page": page})
        found += sum(len(task["annotations"]) for task in listed["tasks"])
        if page * _PAGE_SIZE >= listed["total"]:
            return found
        page += 1


def _annotate_all(store: Store, client: LabelStudioClient) -> None:
    with store.ledger.read() as tx:
        items = tx.find(ReviewItem, order_by=("id",))
    codes = store.taxonomy.codes

    def annotate(numbered: tuple[int, ReviewItem]) -> None:
        label = codes[numbered[0] % len(codes)]
        client.create_annotation(numbered[1].task_id or 0, annotation_result(label), key=uuid.uuid4())

    with ThreadPoolExecutor(_ANNOTATORS) as pool:
        list(pool.map(annotate, enumerate(items)))


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def _image(chance: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    coarse = chance.integers(0, 255, (19, 25, 3), dtype=np.uint8)
    smooth = PillowImage.fromarray(coarse).resize((200, 152), PillowImage.Resampling.BICUBIC)
    smooth.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
