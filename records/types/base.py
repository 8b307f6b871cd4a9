"""The base of all record types: frozen, closed, and declared once.

A record class is the single declaration of its SQL table (`records.ledger.tables`) and of its
arrow schema (`records.schemas`).
"""

from typing import Annotated, ClassVar

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Timestamp = AwareDatetime


class Record(BaseModel):
    """A row. Fields named in `mutable` may change after it was written; all others never do."""

    # A number that is not finite has no place in SQL or JSON (SQLite would store NaN as empty).
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    table: ClassVar[str]
    key: ClassVar[str] = "id"
    mutable: ClassVar[frozenset[str]] = frozenset()
    indexed: ClassVar[tuple[tuple[str, ...], ...]] = ()
    unique: ClassVar[tuple[tuple[str, ...], ...]] = ()
