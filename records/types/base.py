"""The base of all record types: frozen, closed, and declared once.

A record class is the single declaration of its SQL table (`records.ledger.tables`) and of its
arrow schema (`records.schemas`).
"""

import types
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

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


def field_type(annotation: Any) -> tuple[Any, bool]:
    """Split a field's annotation into its plain type and whether it may be empty.

    Args:
        annotation: as pydantic holds it, for example `float | None`.
    Returns:
        (type without `None` and metadata, may be empty).

    >>> field_type(float | None)
    (<class 'float'>, True)
    """
    if get_origin(annotation) is Annotated:
        return field_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        members = [a for a in get_args(annotation) if a is not type(None)]
        optional = len(members) < len(get_args(annotation))
        return (field_type(members[0])[0] if len(members) == 1 else Union[tuple(members)]), optional  # noqa: UP007
    return annotation, False
