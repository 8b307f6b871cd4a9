"""Registries of frozen records: the choices for a setting, such as optimizers, with their tunable settings.

A registry maps a name to a record with a one-line description and its tunable settings. Search space, command line,
catalogue and docs are derived from it, never written a second time. The key of a tunable is a field of the settings
that are declared next to the registry. Records import torch inside their factories, so looking something up is cheap.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from records.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Args:
        low: smallest value.
        high: largest value.
        log: sample evenly in the logarithm.
        integer: whole numbers only.
    """

    low: float
    high: float
    log: bool = False
    integer: bool = False

    def __contains__(self, value: object) -> bool:
        """Return whether the value lies in the range."""
        # bool is a subclass of int, and True is no number of layers.
        whole = not self.integer or (isinstance(value, int) and not isinstance(value, bool))
        return isinstance(value, int | float) and whole and self.low <= value <= self.high

    def as_dict(self) -> dict[str, Any]:
        """Return the range as plain values."""
        return {"low": self.low, "high": self.high, "log": self.log, "integer": self.integer}


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[Any, ...]

    def __contains__(self, value: object) -> bool:
        """Return whether the value may be chosen."""
        return value in self.values

    def as_dict(self) -> dict[str, Any]:
        """Return the choice as plain values."""
        return {"values": list(self.values)}


Tunable = Range | Choice


@dataclass(frozen=True, kw_only=True)
class Registered:
    """What every record of a registry has.

    Args:
        name: how settings name it.
        description: one line for people.
        tunable: field of the settings beside the registry to the values that a search may try.
    """

    name: str
    description: str
    tunable: Mapping[str, Tunable] = field(default_factory=dict, repr=False, hash=False)

    def facts(self) -> dict[str, Any]:
        """Return what a catalogue shows beside name, description and tunables; plain values."""
        return {}


R = TypeVar("R", bound=Registered)


class Registry(Generic[R]):
    """Records of one kind, in declared order; iterating gives names, as a mapping does.

    Args:
        kind: what the records are, in the singular, for messages.
        records: with unique names.
    """

    def __init__(self, kind: str, records: tuple[R, ...]) -> None:
        self.kind = kind
        # Read-only, so that every process sees the same records.
        self._records = MappingProxyType({record.name: record for record in records})

    def __getitem__(self, name: str) -> R:
        """Return the record of that name; an unknown name raises ConfigError, which lists those that exist."""
        try:
            return self._records[name]
        except KeyError:
            raise ConfigError(f"unknown {self.kind} {name!r}; there are {', '.join(self._records)}") from None

    def __contains__(self, name: object) -> bool:
        """Return whether a record has that name."""
        return name in self._records

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._records)

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._records)

    @property
    def names(self) -> tuple[str, ...]:
        """The names in declared order."""
        return tuple(self._records)

    @property
    def records(self) -> tuple[R, ...]:
        """The records in declared order."""
        return tuple(self._records.values())

    def catalogue(self) -> list[dict[str, Any]]:
        """Return one dict of plain values per record: name, its facts, description, tunables."""
        return [
            {
                "name": record.name,
                **record.facts(),
                "description": record.description,
                "tunable": {name: tunable.as_dict() for name, tunable in record.tunable.items()},
            }
            for record in self.records
        ]
