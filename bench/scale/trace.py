"""Time of a trace in a ledger of ten million predictions, on a real PostgreSQL.

The rows are synthetic and loaded by COPY, one table at a time, with the indexes of the product's schema (dropped for
the load and recreated after it). Of ten rows five are predictions, 1.5 images and one each a group, a diagnosis, a
review item and an annotation or flag. One dataset version is built by the product, of a tenth of the rows; each of the
others has a file of the same size, linked to it, and names a hundred images as those that it changes. Then
`records.lineage.trace`, which `relook trace` calls, is timed on random ids.

    python -m bench.scale.trace [--rows 20000000] [--versions 200]
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import sqlalchemy as sa

from bench.drills.demo_on_postgres import postgres
from bench.scale.ledger import prediction_rows
from records.datasets import build_version
from records.ids import new_id, sha256_hex
from records.ledger.tables import TABLES
from records.lineage import trace
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import (
    Annotation,
    AnnotationKind,
    Confirmation,
    DatasetChange,
    DatasetRecord,
    Flag,
    FlagReason,
    Group,
    Image,
    ModelRecord,
    Prediction,
    Record,
    ReviewItem,
    ReviewState,
    SourceLabel,
)

AIM_MS = 50.0
START = datetime(2026, 1, 1, tzinfo=UTC)
SHARES: dict[type[Record], float] = {
    Prediction: 0.5, Image: 0.15, Group: 0.1, SourceLabel: 0.1, ReviewItem: 0.1, Annotation: 0.045, Flag: 0.005,
}  # fmt: skip
"""Of the rows. Images with a diagnosis come first, then those without; a group holds one image with a diagnosis."""
MODELS = 10
CHANGES = 100
"""Images whose label a version changes, as the annotations of a round do."""
LINES_AT_ONCE = 5_000


def name(kind: type[Record], number: int) -> str:
    """Return the id of a synthetic row: a hash, spread over the whole index as real ids are."""
    text = sha256_hex(f"{kind.table} {number}".encode())
    return text if kind in (Image, ModelRecord) else text[:32]


def line_of(record: Record, **varying: str) -> str:
    """Return a record as a line of COPY with `%(name)s` in the columns that differ by row."""
    cells = []
    for field, value in record.model_dump(mode="json").items():
        if field in varying:
            cells.append(varying[field])
        elif value is None:
            cells.append(r"\N")
        else:
            cells.append(
                (json.dumps(value) if isinstance(value, (list, dict, bool)) else str(value)).replace("%", "%%")
            )
    return "\t".join(cells) + "\n"


def samples() -> dict[type[Record], Record]:
    """Return one record of each type that the service and Label Studio write."""
    made = prediction_rows(doubtful=True)
    assert made.image is not None
    assert made.review is not None
    image = made.image.model_copy(update={"provenance": "import:bench", "perceptual_hash": "0" * 16, "group_id": "g"})
    pushed = {"state": ReviewState.ANSWERED, "project_id": 1, "pushed_at": START, "answered_at": START, "task_id": 7}
    return {
        Prediction: made.prediction,
        Image: image,
        ReviewItem: made.review.model_copy(update=pushed),
        Group: Group(id="g", created_at=START),
        SourceLabel: SourceLabel(
            id="s", image_id="i", label="nv", confirmation=Confirmation.HISTOPATHOLOGY, source="import:bench",
            created_at=START,
        ),
        Annotation: Annotation(
            id="e", created_at=START, review_item_id="r", image_id="i", kind=AnnotationKind.CLASS, label="nv",
            annotator="anna", annotated_at=START, server="http://127.0.0.1:8080", project_id=1, task_id=7,
            annotation_id=1, revision="r" * 64,
        ),
        Flag: Flag(
            id="f", created_at=START, prediction_id="p", caller="0123456789abcdef", reason=FlagReason.WRONG_LABEL,
            suggested_label="mel", review_item_id="r",
        ),
    }  # fmt: skip


def varying(counts: dict[type[Record], int]) -> dict[type[Record], Callable[[int], dict[str, Any]]]:
    """Return for each type what differs from row to row."""
    images, groups = counts[Image], counts[Group]

    def at(number: int) -> str:
        return (START + timedelta(milliseconds=number)).isoformat()

    def group_of(number: int) -> str:
        return name(Group, number) if number < groups else r"\N"

    return {
        Prediction: lambda n: {
            "id": name(Prediction, n), "request_id": name(Flag, -n - 1), "created_at": at(n),
            "idempotency_key": name(Group, -n - 1), "image_id": name(Image, n % images),
            "model_id": name(ModelRecord, n * MODELS // counts[Prediction]),
        },
        Image: lambda n: {
            "id": name(Image, n), "source_id": f"ISIC_{n:08d}", "lesion_id": f"HAM_{n:07d}", "created_at": at(n),
            "group_id": group_of(n),
        },
        Group: lambda n: {"id": name(Group, n), "created_at": at(n)},
        SourceLabel: lambda n: {"id": name(SourceLabel, n), "image_id": name(Image, n), "created_at": at(n)},
        ReviewItem: lambda n: {
            "id": name(ReviewItem, n), "created_at": at(n), "prediction_id": name(Prediction, n),
            "image_id": name(Image, n % images), "priority": f"{n % 997}", "task_id": f"{n}",
        },
        Annotation: lambda n: {
            "id": name(Annotation, n), "created_at": at(n), "review_item_id": name(ReviewItem, n),
            "image_id": name(Image, n % images), "annotation_id": f"{n}",
        },
        Flag: lambda n: {"id": name(Flag, n), "created_at": at(n), "prediction_id": name(Prediction, n)},
    }  # fmt: skip


def lines(record_type: type[Record], rows: int, counts: dict[type[Record], int]) -> Iterator[str]:
    """Yield lines of COPY, many at once."""
    differs = varying(counts)[record_type]
    template = line_of(samples()[record_type], **{field: f"%({field})s" for field in differs(0)})
    for start in range(0, rows, LINES_AT_ONCE):
        yield "".join(template % differs(number) for number in range(start, min(start + LINES_AT_ONCE, rows)))


def load(database: str, counts: dict[type[Record], int]) -> dict[str, float]:
    """Load all tables; returns the seconds of each, its indexes included."""
    took_s = {}
    dsn = sa.make_url(database).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SET maintenance_work_mem = '512MB'")
        for record_type, rows in counts.items():
            began, table = time.perf_counter(), TABLES[record_type].name
            query = "SELECT indexname, indexdef FROM pg_indexes WHERE tablename = %s AND indexname NOT LIKE '%%_pkey'"
            indexes = connection.execute(query, (table,)).fetchall()
            for index, _ in indexes:
                connection.execute(f'DROP INDEX "{index}"'.encode())
            columns = ", ".join(f'"{column}"' for column in record_type.model_fields)
            with connection.cursor().copy(f"COPY {table} ({columns}) FROM STDIN".encode()) as copy:
                for part in lines(record_type, rows, counts):
                    copy.write(part)
            for _, definition in indexes:
                connection.execute(definition.encode())
            connection.execute(f"VACUUM ANALYZE {table}".encode())
            took_s[table] = round(time.perf_counter() - began, 1)
            print(f"{table}: {rows} rows in {took_s[table]} s", file=sys.stderr)
    return took_s


def add_versions(store: Store, versions: int, images: int) -> list[str]:
    """Build one dataset version, link its file as the others, and add models that were trained on them.

    Args:
        store: its records are written.
        versions: how many, the built one included.
        images: of the built version; those that versions change are drawn from them.
    Returns:
        The models.
    """
    chance = np.random.default_rng(1)
    built = build_version(store).version
    with store.ledger.begin() as tx:
        first = tx.require(DatasetRecord, built.id)
        ids = [built.id, *(sha256_hex(f"version {number}".encode()) for number in range(1, versions))]
        for number, dataset_id in enumerate(ids):
            created = START + timedelta(days=number)
            if number:
                folder = store.home.datasets / dataset_id
                folder.mkdir()
                os.link(store.home.datasets / built.id / "manifest.parquet", folder / "manifest.parquet")
                about = {"parent_id": ids[number - 1], "num_changes": CHANGES, "created_at": created, "round": number}
                changed = [name(Image, int(image)) for image in chance.integers(0, images, CHANGES)]
                tx.add(
                    first.model_copy(update={"id": dataset_id, **about}),
                    *(DatasetChange(id=new_id(), dataset_id=dataset_id, image_id=image) for image in changed),
                )
        models = [
            ModelRecord(
                id=name(ModelRecord, number), created_at=START, status_changed_at=START, path="bundles/m",
                architecture="custom_cnn", dataset_id=ids[number % versions], taxonomy_hash=first.taxonomy_hash,
            )
            for number in range(MODELS)
        ]  # fmt: skip
        tx.add(*models)
    return [model.id for model in models]


def timed(store: Store, subjects: Sequence[str]) -> dict[str, Any]:
    """Trace every subject once; returns milliseconds and how many steps a trace has."""
    took_ms, cpu_ms, steps = [], [], []
    for subject in subjects:
        began, cpu = time.perf_counter(), time.process_time()
        found = trace(store, subject)
        cpu_ms.append((time.process_time() - cpu) * 1e3)
        took_ms.append((time.perf_counter() - began) * 1e3)
        steps.append(len(found.steps))
    return {
        "traces": len(subjects),
        "steps": round(float(np.mean(steps)), 1),
        "first_ms": round(took_ms[0], 1),
        "p50_ms": round(float(np.percentile(took_ms, 50)), 1),
        "p95_ms": round(float(np.percentile(took_ms, 95)), 1),
        "cpu_p50_ms": round(float(np.percentile(cpu_ms, 50)), 1),
        "max_ms": round(max(took_ms), 1),
    }


def measure(store: Store, counts: dict[type[Record], int], models: Sequence[str], traces: int) -> dict[str, Any]:
    """Time the kinds of subjects."""
    chance = np.random.default_rng(0)

    def drawn(kind: type[Record], below: int) -> list[str]:
        return [name(kind, int(number)) for number in chance.integers(0, below, traces)]

    asked = min(counts[Annotation], counts[SourceLabel])
    return {
        "prediction": timed(store, drawn(Prediction, counts[Prediction])),
        "prediction_by_12_characters": timed(store, [i[:12] for i in drawn(Prediction, counts[Prediction])]),
        "image_with_everything": timed(store, drawn(Image, min(counts[Flag], asked))),
        "image": timed(store, drawn(Image, counts[Image])),
        "model": timed(store, models),
    }


def main() -> int:
    """Print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--versions", type=int, default=200)
    parser.add_argument("--traces", type=int, default=200, help="of each kind")
    parser.add_argument("--place", type=Path, help="folder for the database; default: the temporary one")
    options = parser.parse_args()
    counts = {record_type: int(options.rows * share) for record_type, share in SHARES.items()}
    with tempfile.TemporaryDirectory(prefix="relook-scale-", dir=options.place) as scratch:
        os.chmod(scratch, 0o755)
        with postgres(Path(scratch) / "postgres") as database:
            settings = RecordsSettings(home=Path(scratch) / "home", database=database)
            with closing(open_store(settings)) as store:
                load_s = load(database, counts)
                models = add_versions(store, options.versions, counts[SourceLabel])
                with store.ledger.read() as tx:
                    size = tx.connection.execute(sa.text("SELECT pg_database_size(current_database())")).scalar_one()
                found = measure(store, counts, models, options.traces)
    worst = max(kind["p95_ms"] for kind in found.values())
    print(
        json.dumps(
            {
                "rows": {record_type.table: rows for record_type, rows in counts.items()},
                "versions": options.versions,
                "images_of_a_version": counts[SourceLabel],
                "database_gb": round(size / 1e9, 2),
                "load_s": load_s,
                "aim_ms": AIM_MS,
                "p95_ms": worst,
                "held": worst < AIM_MS,
                "trace": found,
                "load": os.getloadavg(),
            },
            indent=2,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
