"""The base of all record types, and the types of what comes in from outside.

A record class is the only declaration of its SQL table (`records.ledger.tables`) and of its Arrow schema
(`records.schemas`). `Text`, `LongText` and `Moment` are what every entrance accepts: request bodies, headers, tables,
annotations, options. They hold nothing that one of the databases, JSON or a page cannot take.
"""

import re
import types
import unicodedata
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
)
from pydantic_core import CoreSchema, core_schema

Probability = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]
Timestamp = AwareDatetime

EARLIEST = datetime(1900, 1, 1, tzinfo=UTC)
LATEST = datetime(2200, 1, 1, tzinfo=UTC)

# Control characters; line and paragraph separators; characters that reorder the text around them, so that a page
# shows something else than what is stored. PostgreSQL refuses U+0000, and UTF-8 has no surrogates.
_FORBIDDEN = r"\u0000-\u0008\u000b-\u001f\u007f-\u009f\u2028\u2029\u202a-\u202e\u2066-\u2069"
_SURROGATES = r"\ud800-\udfff"
_NOT_IN_A_LINE = re.compile(rf"[\t\n{_FORBIDDEN}{_SURROGATES}]")
_NOT_IN_LINES = re.compile(rf"[{_FORBIDDEN}{_SURROGATES}]")
_NOT_STORABLE = re.compile(rf"[\u0000{_SURROGATES}]")


@dataclass(frozen=True, slots=True)
class Plain:
    """What a text from outside may be: `Annotated[str, Plain(most=50)]` in a pydantic model, or call `check`.

    Args:
        most: largest number of characters.
        least: smallest number of characters.
        lines: whether line breaks and tabs are allowed.
    """

    most: int = 200
    least: int = 0
    lines: bool = False

    def check(self, text: str) -> str:
        """Return the text in Unicode's composed form (NFC), so that equal words are equal texts.

        ValueError is raised for a wrong length, a control character, half a surrogate pair or an override of the
        direction of text. Line breaks come back as `\\n`.
        """
        if self.lines:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        # Before anything that takes longer for a longer text.
        self._require_length(text)
        if not (text.isascii() and text.isprintable()):
            found = (_NOT_IN_LINES if self.lines else _NOT_IN_A_LINE).search(text)
            if found is not None:
                raise ValueError(f"the text holds U+{ord(found[0]):04X}, which is not printable; send plain text")
            # The composed form of a few characters is longer.
            text = unicodedata.normalize("NFC", text)
            self._require_length(text)
        return text

    def keep(self, text: str) -> str:
        """Return a text that must be kept, whatever it holds: what `check` refuses becomes U+FFFD, the rest is cut."""
        pattern = _NOT_IN_LINES if self.lines else _NOT_IN_A_LINE
        text = text[: self.most + 1].replace("\r\n", "\n")
        composed = unicodedata.normalize("NFC", pattern.sub("\ufffd", text))
        return composed if len(composed) <= self.most else composed[: self.most - 1] + "\u2026"

    def _require_length(self, text: str) -> None:
        if not self.least <= len(text) <= self.most:
            raise ValueError(f"the text has {len(text)} characters; send {self.least} to {self.most}")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check every value of the field with `check`."""
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Describe the field; the pattern leaves out surrogates, which JSON in UTF-8 does not have."""
        line = "" if self.lines else r"\t\n"
        least = {"minLength": self.least} if self.least else {}
        return {"type": "string", **least, "maxLength": self.most, "pattern": rf"^[^{line}{_FORBIDDEN}]*$"}


LINE, LINES = Plain(), Plain(2000, lines=True)
Text = Annotated[str, LINE]
"""One line of text from outside, at most 200 characters."""
LongText = Annotated[str, LINES]
"""Lines of text from outside, at most 2000 characters."""


def moment(value: datetime) -> datetime:
    """Return a moment in UTC; ValueError without a time zone, or if it is not from 1900 to 2199."""
    try:
        if value.tzinfo is not None and EARLIEST <= (utc := value.astimezone(UTC)) < LATEST:
            return utc
    except OverflowError:
        pass  # the offset leads out of the years 1 to 9999
    raise ValueError("a moment has a time zone and lies between 1900 and 2199; send one such as 2026-03-01T12:00:00Z")


def _no_bare_number(value: Any) -> Any:
    """Refuse numbers, which pydantic would read as seconds since 1970: a typing error must not become a date."""
    if isinstance(value, (int, float)) or (isinstance(value, str) and value.strip().lstrip("+-").isnumeric()):
        raise ValueError("a number is not a date; send text such as 2026-03-01T12:00:00Z")
    return value


Moment = Annotated[AwareDatetime, BeforeValidator(_no_bare_number), AfterValidator(moment)]
"""A moment from outside, in UTC: RFC 3339 with a time zone; see `moment`."""


def storable(text: str) -> str:
    """Return the text; ValueError if a database cannot hold it."""
    found = _NOT_STORABLE.search(text)
    if found is not None:
        raise ValueError(f"the text holds U+{ord(found[0]):04X}, which no database stores; send plain text")
    return text


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
