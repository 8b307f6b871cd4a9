"""The base of all record types: frozen, without unknown fields.

A record class is the only declaration of its SQL table (`records.ledger.tables`) and of its Arrow schema
(`records.schemas`).
"""

import types
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

Probability = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Timestamp = AwareDatetime


class Record(BaseModel):
    """A row. Fields named in `mutable` may change after it was written; all others never do."""

    # NaN and infinities are neither SQL nor JSON values (SQLite would store NaN as NULL).
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    table: ClassVar[str]
    key: ClassVar[str] = "id"
    mutable: ClassVar[frozenset[str]] = frozenset()
    indexed: ClassVar[tuple[tuple[str, ...], ...]] = ()
    unique: ClassVar[tuple[tuple[str, ...], ...]] = ()


def field_type(annotation: Any) -> tuple[Any, bool]:
    """Split an annotation, as pydantic holds it, into its plain type and whether it may be None.

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
