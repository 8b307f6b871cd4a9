"""The plans of the statements that a function really sends, on SQLite and on PostgreSQL."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from cluster.monitor import monitor
from records.ledger import Ledger
from records.lineage import trace
from records.retention import apply_retention, find_due
from records.store import Store
from records.types import (
    Annotation,
    Confirmation,
    DatasetChange,
    Decision,
    EventRecord,
    Flag,
    Image,
    IncidentPrediction,
    Outcome,
    Prediction,
    ReasonCode,
    Record,
    ReviewItem,
    ReviewState,
    SourceLabel,
)
from serving.access.keys import LOCAL, Caller
from serving.metrics import Metrics
from serving.responses import read_page

LARGE: tuple[type[Record], ...] = (
    Prediction, Image, ReviewItem, Annotation, Flag, Outcome, EventRecord, SourceLabel, IncidentPrediction,
    DatasetChange,
)  # fmt: skip
"""Types that may have millions of rows."""
TABLES = {record_type.table for record_type in LARGE}
FEW_VALUES = {"state", "stage", "status", "decision", "provenance", "stale", "organisation", "caller", "blind"}
"""Columns that begin an index, and that a large part of a table may share."""
NAMED = r"(\w+)\.(?:id|image_id|prediction_id) (?:= (?:\?|\w+\.)|IN \((?:\?|SELECT \w+\.value))"
"""The condition that rows have given ids, or those of a row that was found before."""
LATER = datetime(2030, 1, 1, tzinfo=UTC)
OF_A_CLINIC = Caller("key", "clinic", frozenset())


@contextmanager
def sent(ledger: Ledger) -> Iterator[list[tuple[str, Any]]]:
    """Collect the statements, with their parameters, that are sent during the block."""
    statements: list[tuple[str, Any]] = []

    def remember(_: object, __: object, statement: str, parameters: Any, ___: object, many: bool) -> None:
        if statement.lstrip().startswith(("SELECT", "DELETE", "UPDATE")):
            statements.append((statement, parameters[0] if many else parameters))

    sa.event.listen(ledger.engine, "before_cursor_execute", remember)
    yield statements
    sa.event.remove(ledger.engine, "before_cursor_execute", remember)


def scanned(ledger: Ledger, statements: list[tuple[str, Any]]) -> list[str]:
    """Return the statements that go over all rows of a large table, each with the step that does."""
    found = []
    with ledger.read() as tx:
        if tx.connection.dialect.name != "sqlite":
            # Of a small table the planner reads everything whatever the indexes are; without this it uses them.
            tx.connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        for statement, parameters in statements:
            steps = _sqlite_steps if tx.connection.dialect.name == "sqlite" else _postgresql_steps
            found += [f"{step}: {statement}" for step in steps(tx.connection, statement, parameters)]
    return found


def _sqlite_steps(connection: sa.Connection, statement: str, parameters: Any) -> list[str]:
    rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
    steps = [str(row[-1]) for row in rows]
    # In order of an index and with a limit, a scan ends after the rows that are wanted.
    ends = "LIMIT" in statement
    return [
        step for step in steps
        if step.startswith("SCAN") and step.split()[1] in TABLES and not (ends and "USING" in step)
    ]  # fmt: skip


def led_astray(ledger: Ledger, statements: list[tuple[str, Any]]) -> list[str]:
    """Return the statements that name rows by their ids and read all rows of a state instead, with that step.

    On SQLite only, which has no statistics here; PostgreSQL knows how many rows share a state.
    """
    found = []
    with ledger.read() as tx:
        for statement, parameters in statements:
            rows = tx.connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
            named = set(re.findall(NAMED, statement))
            for step in (str(row[-1]) for row in rows):
                search = re.match(r"SEARCH (\w+) USING (?:COVERING )?INDEX \w+ \((\w+)", step)
                if search and search[1] in named and search[2] in FEW_VALUES:
                    found.append(f"{step}: {statement}")
    return found


def _postgresql_steps(connection: sa.Connection, statement: str, parameters: Any) -> list[str]:
    (plan,) = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) {statement}", parameters).one()
    ends = "LIMIT" in statement
    return [
        f"{node['Node Type']} of {node['Relation Name']}" for node in _nodes(_parsed(plan)[0]["Plan"])
        if node.get("Relation Name") in TABLES
        and (node["Node Type"] == "Seq Scan" or not (ends or "Index Cond" in node or node["Node Type"] == "ModifyTable"
                                                     or node["Node Type"] == "Bitmap Heap Scan"))
    ]  # fmt: skip


def _parsed(plan: Any) -> Any:
    return json.loads(plan) if isinstance(plan, str) else plan


def _nodes(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from _nodes(child)


def full_scans(store: Store, sample: Callable[..., Any]) -> list[str]:
    """Do what an operator and a caller do all day, and return the statements that went over a whole table."""
    kept = store.settings.model_copy(update={"keep_images_days": 1, "keep_predictions_days": 1})
    store = replace(store, settings=kept)
    audited = {
        "reasons": [ReasonCode.AUDIT_SAMPLE],
        "state": ReviewState.ANSWERED,
        "project_id": 1,
        "overlay_blob": None,
    }
    with store.ledger.begin() as tx:
        for number in range(3):
            image, prediction = sample(Image, number, provenance="served", erased_at=None), f"{number}abc" * 8
            tx.add(
                image,
                sample(
                    Prediction, number, id=prediction, image_id=image.id, organisation="clinic", context_effect=None
                ),
                sample(ReviewItem, number, image_id=image.id, prediction_id=prediction, **audited),
            )
        tx.add(
            sample(Outcome, 0, image_id=image.id, prediction_id=prediction, confirmation=Confirmation.HISTOPATHOLOGY),
            sample(Flag, 0, prediction_id=prediction),
        )
    with sent(store.ledger) as statements:
        trace(store, image.id)
        trace(store, prediction[:12])
        monitor(store, 0.01)
        find_due(store, LATER)
        for caller, decision in ((LOCAL, None), (LOCAL, Decision.URGENT), (OF_A_CLINIC, None)):
            read_page(store, caller, decision, None, 10)
        Metrics(store).text()
        with store.ledger.read() as tx:
            tx.count(ReviewItem, {"project_id": 1, "state": (ReviewState.PUSHED, ReviewState.ANSWERED)})
            tx.find(ReviewItem, where={"project_id": 1}, order_by=("-task_id",), limit=1)
        apply_retention(store, actor="test", forget=len, now=LATER)
    assert len(statements) > 30
    sqlite = store.ledger.engine.dialect.name == "sqlite"
    return [*scanned(store.ledger, statements), *(led_astray(store.ledger, statements) if sqlite else ())]
