"""Import of a Label Studio project that people labelled before: its images, and each annotation with its annotator.

    tasks -> their images -> consensus of the annotations -> the import of images.importer
          -> one `Annotation` row per revision of every annotation

The label of an image is the consensus of all its annotations; an image without one comes without a label. Run again,
it adds what is new and repeats nothing. After an interruption it fetches only the images that are still missing.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from images.fetched import Fetched, fetched_for
from images.files import Listing
from images.import_plan import Reading
from images.importer import ImportReport, import_source
from images.source_table import COLUMNS, source_of
from images.table_file import Table
from labeling.client import LabelStudioClient
from labeling.consensus import ConsensusMethod, resolve
from labeling.existing.annotations import NOBODY, ForeignTask, read_annotations, without_own, write_annotations
from labeling.existing.files import TaskFiles, file_name
from labeling.existing.page import LabelPage, read_page
from labeling.rows import TaskRow
from labeling.servers import server_name
from records.errors import DataError, ImageError, UnknownIdError
from records.frames import Frame
from records.ids import canonical_json, sha256_hex
from records.images import strip_metadata
from records.lease import hold
from records.store import Store
from records.types.base import LINE

LEASE = "labeling.import"
_PAGE = 25  # tasks with embedded images, of about a megabyte each
_FETCHED_AT_ONCE = 4


@dataclass(frozen=True)
class ProjectImport:
    """What came of a project.

    Args:
        report: of the images and their labels.
        annotations: rows added for new and edited annotations.
        withdrawn: rows added for annotations that are gone.
        annotators: who made the annotations.
        not_understood: one sentence per annotation that is kept and names no class.
        notes: sentences about what the project has and was not taken.
    """

    report: ImportReport
    annotations: int
    withdrawn: int
    annotators: tuple[str, ...]
    not_understood: tuple[str, ...]
    notes: tuple[str, ...]


def import_project(
    store: Store,
    client: LabelStudioClient,
    project_id: int,
    *,
    choices: str | None = None,
    labels: Mapping[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
    allowed_hosts: Sequence[str] = (),
    correct: bool = False,
    method: ConsensusMethod = "majority",
    frames: Sequence[Frame] = (),
    progress: Progress | None = None,
) -> ProjectImport:
    """Import the tasks of a project with their images and annotations.

    Args:
        store: gets images, labels and annotations.
        client: connected to the Label Studio that has the project.
        project_id: its number there.
        choices: name of the control whose choices are classes; None takes the only one.
        labels: choice to class, where they are not written alike.
        columns: meaning to key of the tasks' data, as for a table, for example {"lesion": "mole"}.
        allowed_hosts: further hosts that images are fetched from; see `TaskFiles`.
        correct: see `import_folder`.
        method: setting `labeling.consensus`.
        frames: for which the images are decoded into the cache at once.
        progress: gets bars.
    Returns:
        What was imported.
    Raises:
        DataError: the project has no usable page or no usable image.
        RefusedError: another import of a project runs.
        UnknownIdError: there is no such project.
        LabelStudioError: Label Studio cannot be reached.
    """
    project = client.project(project_id)
    if project is None:
        raise UnknownIdError(f"the Label Studio at {client.url} has no project {project_id}")
    page = read_page(project.label_config, store.taxonomy, choices=choices, said=labels)
    with store.ledger.read() as tx:
        server = server_name(tx, client)
    with (
        hold(store.ledger, LEASE),
        fetched_for(store.home.cache, sha256_hex(canonical_json([server, project_id]).encode())[:16]) as fetched,
        TaskFiles(client, allowed_hosts) as files,
    ):
        tasks = _Reading(store, client, project_id, page, files, server, fetched).run(progress)
        report = _import(store, client, project_id, page, tasks, dict(columns or {}), method)(
            correct=correct, frames=frames, progress=progress
        )
        added, withdrawn = write_annotations(store, server, project_id, tasks)
    said = [one for task in tasks for one in task.said if task.image_id]
    odd = [f"annotation {one.annotation_id} of task {one.task_id} by {one.annotator}: {one.other_text}" for one in said
           if one.other_text is not None]  # fmt: skip
    annotators = tuple(sorted({one.annotator for one in said}))
    return ProjectImport(report, added, withdrawn, annotators, tuple(odd), tuple(_notes(page, tasks)))


@dataclass(frozen=True)
class _Reading:
    """Reads the tasks of a project page by page, with their images and annotations."""

    store: Store
    client: LabelStudioClient
    project_id: int
    page: LabelPage
    files: TaskFiles
    server: str
    fetched: Fetched

    def run(self, progress: Progress | None) -> list[ForeignTask]:
        """Return all tasks that this store did not send there itself."""
        names = self.client.users()
        state = self.client.state(self.project_id)
        bar = progress.add_task("Reading tasks", total=state.total) if progress else None
        tasks: list[ForeignTask] = []
        listed = self.client.list_tasks(self.project_id, with_annotations=True, with_data=True, page_size=_PAGE)
        with ThreadPoolExecutor(_FETCHED_AT_ONCE) as pool:
            for rows in listed:
                for task in pool.map(self._fetched, without_own(self.store, rows)):
                    read_annotations(task, self.page, self.store.taxonomy, names, self.server, self.project_id)
                    tasks.append(task)
                if progress and bar is not None:
                    progress.advance(bar, len(rows))
        if not tasks:
            others = "only tasks that Relook sent there; `relook label pull` reads them" if state.total else "no tasks"
            raise DataError(f"project {self.project_id} of the Label Studio at {self.client.url} has {others}")
        return tasks

    def _fetched(self, row: TaskRow) -> ForeignTask:
        """Fetch the image of a task into the folder, or say why it is not taken."""
        value = row.data.get(self.page.image_key)
        name = LINE.keep("/".join(filter(None, (str(self.project_id), str(row.id), file_name(value)))))
        # A page of tasks with embedded images is held in memory, and no more.
        rest = {key: one for key, one in row.data.items() if key not in self.page.keys or not _is_long(one)}
        task = ForeignTask(replace(row, data=rest), name)
        key = f"{row.id}-{sha256_hex(canonical_json([value]).encode())[:16]}"
        data = self.fetched.find(key)
        task.was_kept = data is not None
        try:
            data = self.files.read(value) if data is None else data
        except DataError as error:
            task.problem = f"task {row.id} is not taken: {error}"
            return task
        task.path = self.fetched.keep(key, data)
        with suppress(ImageError):  # the import says what is wrong with it
            task.image_id = sha256_hex(strip_metadata(data))
        return task


def _is_long(value: Any) -> bool:
    return not isinstance(value, (int, float)) and len(str(value)) > 1000


def _import(
    store: Store,
    client: LabelStudioClient,
    project_id: int,
    page: LabelPage,
    tasks: Sequence[ForeignTask],
    columns: Mapping[str, str],
    method: ConsensusMethod,
) -> "partial[ImportReport]":
    """Return the import of the tasks' images, with the consensus of their annotations as labels."""
    said = [one for task in tasks for one in task.said if task.image_id]
    resolved = {one.image_id: (one.label, one.confirmation.value) for one in resolve(said, method=method)}
    cells = _cells(tasks, resolved, columns)
    content = canonical_json([client.url, project_id, sorted(cells.columns)]).encode()
    layout = f"layout: project {project_id} of the Label Studio at {client.url}, classes by {page.from_name!r}"
    mapping = {what: key for what, key in COLUMNS.items() if key in cells.columns}
    at = Path(f"project {project_id}")
    source = source_of(at, content, cells, mapping, layout, Listing([], [], 0), at, _Found(tasks))
    return partial(import_source, store, source, Reading(sha256_hex(content), dict(columns), None, layout))


def _cells(
    tasks: Sequence[ForeignTask], labels: Mapping[str, tuple[str | None, str]], columns: Mapping[str, str]
) -> Table:
    """Return the tasks as a table: image, class, how it was established, and what else the tasks say."""
    own = ("image", "dx", "confirmation")
    kept = {what: columns.get(what, key) for what, key in COLUMNS.items() if what not in own}
    for what, key in columns.items():
        if what not in kept:
            raise DataError(f"--columns does not take {what!r} of a project; it takes {', '.join(kept)}")
        if not any(key in task.row.data for task in tasks):
            have = ", ".join(sorted({key for task in tasks for key in task.row.data})) or "nothing but images"
            raise DataError(f"no task has {key!r} for {what}; tasks have {LINE.keep(have)}")
    said = [labels.get(task.image_id, (None, "")) for task in tasks]
    cells = {
        COLUMNS["image"]: [task.name for task in tasks],
        COLUMNS["dx"]: [label or "" for label, _ in said],
        COLUMNS["confirmation"]: [how if label else "" for label, how in said],
    }
    for what, key in kept.items():
        if any(key in task.row.data for task in tasks):
            cells[COLUMNS[what]] = [_text(task.row.data.get(key)) for task in tasks]
    return Table(cells, {}, [], len(tasks))


def _text(value: Any) -> str:
    return str(value).strip() if isinstance(value, (str, int, float)) else ""


class _Found:
    """Finds the fetched image of a task by the task's name."""

    def __init__(self, tasks: Sequence[ForeignTask]) -> None:
        self._tasks = {task.name: task for task in tasks}

    def find(self, name: str) -> tuple[Path | None, str | None]:
        """Return (where it is, None), or (None, why there is none)."""
        task = self._tasks[name]
        return task.path, task.problem


def _notes(page: LabelPage, tasks: Sequence[ForeignTask]) -> list[str]:
    """Return sentences about what the project has and was not taken."""
    skips = sum(task.skips for task in tasks)
    predicted = sum(task.row.predictions > 0 for task in tasks)
    nobody = sum(one.annotator == NOBODY for task in tasks for one in task.said)
    kept = sum(task.was_kept for task in tasks)
    found = {
        f"{kept} images were there from a run that was interrupted and were not fetched again": kept,
        f"{skips} annotations are skips, which say no class": skips,
        f"{predicted} tasks have predictions of a model, which are no labels; their annotations are not blind reads":
            predicted,
        f"{nobody} annotations have no annotator; those of one image count as one, the newest": nobody,
        f"not read: {', '.join(page.unread)}": len(page.unread),
    }  # fmt: skip
    return [sentence for sentence, count in found.items() if count]
