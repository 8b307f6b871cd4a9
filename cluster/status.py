"""`relook status`: counts from the ledger; nothing is created or changed.

In: settings of the records. Out: a `Survey`. It contacts no server; `relook doctor` does.
"""

from pathlib import Path

from pydantic import BaseModel
from rich.table import Table

from records.redaction import without_secrets
from records.settings import RecordsSettings
from records.store import open_store
from records.types import (
    Annotation,
    DatasetRecord,
    Image,
    ModelRecord,
    ModelStatus,
    Prediction,
    ReviewItem,
    ReviewState,
    RoundRecord,
)


class Survey(BaseModel):
    """What a home holds."""

    home: str
    exists: bool
    images: int = 0
    datasets: int = 0
    predictions: int = 0
    annotations: int = 0
    models: dict[str, int] = {}
    review_items: dict[str, int] = {}
    serving: str | None = None
    serving_status: str | None = None
    last_round: int | None = None
    last_verdict: str | None = None


def survey(settings: RecordsSettings) -> Survey:
    """Count the rows of the ledger; all counts are zero if the home does not exist.

    UnavailableError if the database cannot be reached.
    """
    # Opening a store creates its home and migrates the ledger, which a status must not do to an empty folder.
    home = Path(settings.home)
    if not home.exists() and settings.database is None:
        return Survey(home=str(home), exists=False)
    store = open_store(settings)
    try:
        with store.ledger.read() as tx:
            served = tx.find(ModelRecord, where={"status": [ModelStatus.CHAMPION, ModelStatus.PROVISIONAL]}, limit=1)
            rounds = tx.find(RoundRecord, order_by=("-number",), limit=1)
            return Survey(
                home=str(home) if settings.database is None else f"{home}, {without_secrets(settings.database)}",
                exists=True,
                images=tx.count(Image),
                datasets=tx.count(DatasetRecord),
                predictions=tx.count(Prediction),
                annotations=tx.count(Annotation),
                models={s.value: n for s in ModelStatus if (n := tx.count(ModelRecord, where={"status": s}))},
                review_items={s.value: n for s in ReviewState if (n := tx.count(ReviewItem, where={"state": s}))},
                serving=served[0].id if served else None,
                serving_status=served[0].status.value if served else None,
                last_round=rounds[0].number if rounds else None,
                last_verdict=rounds[0].verdict if rounds else None,
            )
    finally:
        store.close()


def report(found: Survey) -> Table:
    """Return the survey as a table for people."""
    table = Table.grid(padding=(0, 2))
    table.add_row("home", found.home)
    if not found.exists:
        table.add_row(
            "", "nothing here yet; `relook demo` runs the whole loop, `relook data import DIR` imports your images"
        )
        return table
    table.add_row("images", f"{found.images} in {found.datasets} dataset versions")
    table.add_row("models", _counts(found.models))
    table.add_row("in use", f"{found.serving[:12]} ({found.serving_status})" if found.serving else "no model yet")
    table.add_row("predictions", str(found.predictions))
    table.add_row("review items", _counts(found.review_items))
    table.add_row("annotations", str(found.annotations))
    verdict = f"{found.last_round}: {found.last_verdict or 'not finished'}" if found.last_round else "none yet"
    table.add_row("last round", verdict)
    return table


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items()) or "none"
