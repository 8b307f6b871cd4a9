"""The settings of the records room, and what the settings of all rooms share.

The shared parts are the base class, validators, the conversion of a pydantic error into a field and a reason, and a
context manager that sets environment variables for a block.
"""

import os
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from records.errors import ConfigError

_MEMBER = re.compile(r"(int|float|str|bool|none|literal|constrained|function|nullable|lax-or-strict)([\[-].*)?")
"""How pydantic names the member of a union that refused a value."""


class RoomSettings(BaseModel):
    """Base of a room's settings: frozen, closed, every field documented with unit and range."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


def checked_by(check: Callable[[str], object]) -> AfterValidator:
    """Return a validator that refuses what `check` refuses with a ConfigError, for example an unregistered name."""

    def validate(value: str) -> str:
        try:
            check(value)
        except ConfigError as error:
            # pydantic collects ValueErrors and adds the field; any other error would lose it.
            raise ValueError(str(error)) from error
        return value

    return AfterValidator(validate)


class RecordsSettings(RoomSettings):
    """Where things are kept."""

    home: Path = Field(default=Path(".relook"), description="folder that holds everything; made absolute on opening")
    database: str | None = Field(
        default=None,
        description="SQLAlchemy URL, sqlite:///FILE or postgresql+psycopg://...; default: ledger.db in home",
        repr=False,
    )
    blobs: str | None = Field(default=None, description="fsspec URL of the blob store; default: blobs/ in home")
    taxonomy: str | None = Field(
        default=None,
        description="a built-in taxonomy's name, or the path of a YAML file; null is the one that the home remembers "
        "since its first import, else ham10000",
    )
    split_salt: str = Field(
        default="relook", min_length=1, description="salt of the hash that draws splits; another salt changes them"
    )
    durability: Literal["normal", "full"] = Field(
        default="normal",
        description="what was acknowledged survives: normal a kill -9; full a power cut too, since SQLite and the "
        "files of blobs wait for the disk (about 7x slower)",
    )
    busy_timeout_s: float = Field(
        default=30.0, gt=0, le=600, description="how long a writer waits for another writer, seconds"
    )
    audit_key_file: Path | None = Field(
        default=None,
        description="absolute path of the keys of the audit chain, one a line, the newest last; default: "
        "keys/audit-key in home",
    )
    audit_anchor: str | None = Field(
        default=None,
        description="second store for heads of the audit chain, which this machine's operator cannot rewrite: the path "
        "or file:// URL of an append-only log, or an s3:// or gs:// prefix with object lock; null is none",
    )
    trace_endpoint: str | None = Field(
        default=None,
        description="URL of an OpenTelemetry collector that takes traces as OTLP over HTTP, such as "
        "http://127.0.0.1:4318/v1/traces; null records none",
    )
    trace_share: float = Field(default=1.0, ge=0, le=1, description="share of requests and rounds that are traced")
    keep_images_days: int | None = Field(
        default=None,
        ge=1,
        le=36_500,
        description="for `relook retention`: served images that nothing refers to are deleted this long after they "
        "were last sent; null keeps them, days",
    )
    keep_predictions_days: int | None = Field(
        default=None,
        ge=1,
        le=36_500,
        description="for `relook retention`: predictions that nothing refers to are deleted this long after they were "
        "made, together with the caller's context; at least keep_images_days; null keeps them, days",
    )

    @model_validator(mode="after")
    def _predictions_outlast_images(self) -> Self:
        images, predictions = self.keep_images_days, self.keep_predictions_days
        # Retention reads from its predictions when an image was last sent, so they must outlive it.
        if images is not None and predictions is not None and predictions < images:
            raise ValueError(
                f"keep_predictions_days is {predictions} and keep_images_days {images}; a prediction has to be "
                "kept at least as long as its image"
            )
        return self

    @field_validator("trace_endpoint")
    @classmethod
    def _is_a_url(cls, value: str | None) -> str | None:
        found = urlsplit(value or "")
        if value is not None and (found.scheme not in ("http", "https") or not found.hostname or found.username):
            raise ValueError("it is not a URL such as http://127.0.0.1:4318/v1/traces, without a name or password")
        return value

    @field_validator("audit_key_file")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        # Ray changes the working folder, so each process would resolve it differently.
        if path is not None and not path.is_absolute():
            raise ValueError(f"{str(path)!r} is a relative path; use an absolute one such as /etc/relook/audit-key")
        return path

    def apart(self, home: Path) -> "RecordsSettings":
        """Return settings of a separate home whose ledger and blobs are inside it; this store is not touched."""
        apart = {"home": home, "blobs": None, "database": None, "audit_key_file": None, "audit_anchor": None}
        return self.model_copy(update=apart)


def first_problem(error: ValidationError) -> tuple[str, str]:
    """Return the dotted name of the first field that pydantic refused, empty for the whole document, and the reason."""
    # Only the first field: the errors after it are often consequences.
    found = [(field_name(one["loc"]), one["msg"].removeprefix("Value error, ")) for one in error.errors()]
    name = found[0][0]
    # A union has an error per member: 'auto', or a number of 2 or more.
    reasons = list(dict.fromkeys(reason for field, reason in found if field == name))
    return name, " or ".join([reasons[0], *(reason.removeprefix("Input should be ") for reason in reasons[1:])])


def field_name(loc: Sequence[int | str]) -> str:
    """Return the dotted name of a field out of pydantic's location, which also names the member of a union."""
    parts = [str(part) for part in loc]
    while len(parts) > 1 and _MEMBER.fullmatch(parts[-1]):
        parts.pop()
    return ".".join(parts)


@contextmanager
def environment(variables: Mapping[str, str]) -> Generator[None]:
    """Set environment variables while the block runs, for this process and those it starts; then restore them."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
