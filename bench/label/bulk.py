"""Rates of pushing tasks and pulling annotations, compared with a client that only transfers them.

Both use one real, local Label Studio. The bare client sends the task documents that a push sent, in the same batches
and with as many imports in flight, and reads pages of annotations with the same fields; it makes no images, keeps no
ledger and checks nothing. They alternate, so that other load on the machine affects both.
"""

import io
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
from PIL import Image as PillowImage

from bench.label.annotating import arriving
from labeling.client import LabelStudioClient
from labeling.local_server import ServerInfo
from labeling.project import known_project
from labeling.pull import pull
from labeling.push import push
from labeling.settings import LabelingSettings
from labeling.tasks import annotation_result, label_config
from records.errors import IntegrityError
from records.ids import new_id, utc_now
from records.parts import in_flight
from records.store import Store
from records.types import Annotation, Image, ReasonCode, ReviewItem

TURNS = 5
_TASKS_EACH = 3
_PAGE_SIZE = 500
_FIELDS = "id,meta,updated_at,annotations,result,completed_by,was_cancelled,lead_time"
_PREDICTED = "bench"
_TIMEOUT_S = 600.0


def measure(
    store: Store,
    server: ServerInfo,
    settings: LabelingSettings,
    items: int,
    annotators: int = 0,
    advance: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Push, annotate and pull, and let the bare client do the same.

    Args:
        store: empty; it is filled with generated images.
        server: a Label Studio without projects.
        settings: of the labeling room.
        items: number of tasks.
        annotators: how many annotate further tasks of the same project meanwhile.
        advance: called with a line about each step.
    Returns:
        The keys of `python -m bench label`; rates are tasks and annotations per second.
    Raises:
        LabelStudioError: Label Studio cannot be reached or refuses.
        IntegrityError: the two clients did not read the same annotations.
    """
    settings = settings.model_copy(update={"blind_share": 0.0})
    with (
        _Recording(server.url, server.token, timeout_s=_TIMEOUT_S) as client,
        LabelStudioClient(server.url, server.token, timeout_s=_TIMEOUT_S) as bare,
    ):
        theirs = _push_for_annotators(store, client, settings, annotators)
        clock, label = _Clock(psutil.Process(server.pid)), store.taxonomy.codes[0]
        advance(f"pushing {items} tasks")
        with arriving(server, annotators, theirs, label) as took_s:
            pushed, bare_pushed = _push_in_turns(store, client, bare, settings, items, clock)
        # By nobody else meanwhile: SQLite refuses a bulk of annotations where others write.
        advance(f"annotating {items} tasks")
        number = known_project(store, client) or 0
        _annotate_all(store, client, number, set(theirs))
        advance(f"pulling {items} annotations")
        with arriving(server, annotators, theirs, label) as later_s:
            before, first = clock.timed(lambda: _read_bare(bare, number))
            # The bare client reads before and after the pull; the mean cancels a drift of the machine's speed.
            pulled, report = clock.timed(lambda: pull(store, client, settings))
            after, second = clock.timed(lambda: _read_bare(bare, number))
        took_s += later_s
        _require_all(items, [first, report.new_labels, second], len(took_s))
        while not pull(store, client, settings).idle:
            advance("pulling what arrived last")
        exact = counted(store, client)
    return {
        "items": items,
        "annotators": annotators,
        "arrived": len(took_s),
        "wait_p50_s": float(np.median(took_s)) if took_s else None,
        **_compared("push", pushed, items, bare_pushed, items),
        **_compared("pull", pulled, report.new_labels, before + after, first + second),
        "lost": exact["lost"],
        "duplicated": exact["doubled"],
        "load": os.getloadavg(),
    }


def _require_all(items: int, read: Sequence[int], arrived: int) -> None:
    """Refuse readings that miss an annotation, or that do not grow as those of the annotators arrive."""
    if [items, *read, items + arrived] != sorted([items, *read, items + arrived]):
        raise IntegrityError(f"{items} annotations and {arrived} more were made, and {list(read)} were read")


def _push_for_annotators(
    store: Store, client: LabelStudioClient, settings: LabelingSettings, annotators: int
) -> list[int]:
    """Push tasks that annotators annotate during the measurement; return their ids."""
    add_review_items(store, annotators * _TASKS_EACH, seed=TURNS)
    push(store, client, settings)
    with store.ledger.read() as tx:
        return [item.task_id or 0 for item in tx.find(ReviewItem)]


def _compared(name: str, took: "_Took", number: int, bare: "_Took", bare_number: int) -> dict[str, float]:
    """Return rates a second, their ratio, and processor time of one task or annotation, of Relook and of the client."""
    per_s, bare_per_s = number / took.wall_s, bare_number / bare.wall_s
    return {
        f"{name}_s": per_s,
        f"bare_{name}_s": bare_per_s,
        f"{name}_over_bare": per_s / bare_per_s,
        f"{name}_cpu_ms": 1e3 * took.cpu_s / number,
        f"bare_{name}_cpu_ms": 1e3 * bare.cpu_s / bare_number,
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

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sent: list[Sequence[Mapping[str, Any]]] = []

    def import_tasks(self, project_id: int, tasks: Sequence[Mapping[str, Any]]) -> list[int]:
        self.sent.append(tasks)
        return super().import_tasks(project_id, tasks)


@dataclass(frozen=True)
class _Took:
    """Wall time, and processor time of this process and of Label Studio together, seconds."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    def __add__(self, other: "_Took") -> "_Took":
        return _Took(self.wall_s + other.wall_s, self.cpu_s + other.cpu_s)


@dataclass(frozen=True)
class _Clock:
    """Times work by the wall clock and by the processor, which other load on the machine disturbs less."""

    server: psutil.Process

    def timed(self, work: Callable[[], Any]) -> tuple[_Took, Any]:
        """Do the work; return what it took, and its result."""
        began, cpu_s = time.perf_counter(), self._cpu_s()
        result = work()
        return _Took(time.perf_counter() - began, self._cpu_s() - cpu_s), result

    def _cpu_s(self) -> float:
        used = self.server.cpu_times()
        return time.process_time() + float(used.user + used.system)


def _push_in_turns(
    store: Store,
    client: _Recording,
    bare: LabelStudioClient,
    settings: LabelingSettings,
    items: int,
    clock: _Clock,
) -> tuple[_Took, _Took]:
    """Return what the push and the bare client took for all tasks."""
    project = {"title": "bare", "label_config": label_config(store.taxonomy)}
    bare_project = int(bare.request("POST", "api/projects/", "make a project", body=project)["id"])
    pushed = bare_pushed = _Took()
    for turn in range(TURNS):
        add_review_items(store, items // TURNS + (turn < items % TURNS), seed=turn)
        client.sent.clear()
        pushed += clock.timed(lambda: push(store, client, settings))[0]
        bare_pushed += clock.timed(lambda: _send_bare(bare, bare_project, client.sent, settings.imports_at_once))[0]
    return pushed, bare_pushed


def _send_bare(
    bare: LabelStudioClient, project_id: int, batches: Sequence[Sequence[Mapping[str, Any]]], at_once: int
) -> None:
    def send(batch: Sequence[Mapping[str, Any]]) -> None:
        bare.request("POST", f"api/projects/{project_id}/import", "import", body=list(batch), repeat=False)

    with in_flight(batches, send, at_once) as sent:
        deque(sent, maxlen=0)


def _read_bare(bare: LabelStudioClient, project_id: int) -> int:
    """Read all annotations of a project page by page, with the fields that a pull reads; return their number."""
    wanted = {"project": project_id, "fields": "all", "page_size": _PAGE_SIZE, "include": _FIELDS}
    found, page = 0, 1
    while True:
        listed = bare.request("GET", "api/tasks/", "read", params={**wanted, "page": page})
        found += sum(len(task["annotations"]) for task in listed["tasks"])
        if page * _PAGE_SIZE >= listed["total"]:
            return found
        page += 1


def _annotate_all(store: Store, client: LabelStudioClient, project_id: int, left_out: Collection[int]) -> None:
    """Annotate every task once: as predictions, which Label Studio then turns into annotations, many at a time."""
    with store.ledger.read() as tx:
        items = tx.find(ReviewItem, where={"project_id": project_id}, order_by=("id",))
    tasks = [item.task_id for item in items if item.task_id not in left_out]
    codes = store.taxonomy.codes
    wanted = [
        {"task": task, "result": annotation_result(codes[number % len(codes)]), "model_version": _PREDICTED}
        for number, task in enumerate(tasks)
    ]
    # In one request: after each, Label Studio counts anew what every task of the project has.
    client.request("POST", f"api/projects/{project_id}/import/predictions", "predict", body=wanted, repeat=False)
    for start in range(0, len(tasks), _PAGE_SIZE):
        some = {"all": False, "included": tasks[start : start + _PAGE_SIZE]}
        client.request(
            "POST", "api/dm/actions/", "annotate", params={"id": "predictions_to_annotations", "project": project_id},
            body={"selectedItems": some, "model_version": _PREDICTED}, repeat=False,
        )  # fmt: skip


def _image(chance: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    coarse = chance.integers(0, 255, (19, 25, 3), dtype=np.uint8)
    smooth = PillowImage.fromarray(coarse).resize((200, 152), PillowImage.Resampling.BICUBIC)
    smooth.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
