"""The taxonomy: which classes exist, in which order, and which of them must not be missed.

A taxonomy is a YAML document. Class order is declared there and never derived from data. Its hash is stored in every
dataset version and model bundle, and a mismatch raises.
"""

import unicodedata
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from records.context import ContextColumn
from records.errors import TaxonomyError
from records.ids import hash_of
from records.settings import first_problem
from records.types.base import Plain

_SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""In C where PyYAML was built with it: every opening of a store reads the taxonomy, and Python's took 13 ms of it."""


class DiagnosisClass(BaseModel):
    """One class of the taxonomy."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str = Field(pattern=r"^[a-z0-9][a-z0-9_]{0,31}$", description="short code used in tables and predictions")
    name: Annotated[str, Plain(least=1)] = Field(description="name for people")
    aliases: tuple[Annotated[str, Plain(least=1)], ...] = Field(
        default=(),
        # Left out where there are none, so that documents and bundles without aliases stay as they were.
        exclude_if=lambda aliases: not aliases,
        description="other ways in which tables write the class; compared without case",
    )
    malignant: bool = Field(description="True if missing it harms the patient")
    miss_cost: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="relative cost of missing one case")


class KeyClass(BaseModel):
    """A class whose sensitivity has a floor that no served model may fall under."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    code: str
    sensitivity_floor: float = Field(default=0.90, gt=0, le=1, description="lesion-level sensitivity, 0 to 1")


class Taxonomy(BaseModel):
    """An ordered set of classes. See `load_taxonomy`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Plain(least=1)]
    version: int = Field(ge=1, lt=2**63)
    classes: tuple[DiagnosisClass, ...] = Field(min_length=2)
    key_classes: tuple[KeyClass, ...] = ()
    context: tuple[ContextColumn, ...] = Field(
        default=(),
        exclude_if=lambda columns: not columns,
        description="columns that models may use beside the image",
    )

    @model_validator(mode="after")
    def _codes_fit_together(self) -> "Taxonomy":
        codes = [c.code for c in self.classes]
        doubled = sorted({code for code in codes if codes.count(code) > 1})
        if doubled:
            raise ValueError(f"class {doubled[0]!r} is declared twice; each code must be unique")
        for key in self.key_classes:
            if key.code not in codes:
                raise ValueError(f"key class {key.code!r} is not among the classes {', '.join(codes)}")
        named = [column.name for column in self.context]
        if len(named) != len(set(named)):
            raise ValueError(f"context names a column twice; each of {', '.join(dict.fromkeys(named))} once")
        return self

    @cached_property
    def codes(self) -> tuple[str, ...]:
        """Class codes in declared order."""
        return tuple(c.code for c in self.classes)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the document without aliases and context, 64 hex characters."""
        # An alias changes how tables are read, and context how models to come are made: neither changes a decision of a
        # model that serves, so both may be added meanwhile.
        excluded: Any = {"classes": {"__all__": {"aliases"}}, "context": True}
        return hash_of(self.model_dump(mode="json", exclude=excluded))

    @cached_property
    def malignant_codes(self) -> tuple[str, ...]:
        """Codes of the malignant classes, in declared order."""
        return tuple(c.code for c in self.classes if c.malignant)

    @property
    def key_class(self) -> KeyClass | None:
        """The first key class, which reports show first; None if none is declared."""
        return self.key_classes[0] if self.key_classes else None

    def index_of(self, code: str) -> int:
        """Return the 0-based position of a class code in class order; TaxonomyError if it is unknown."""
        try:
            return self.codes.index(code)
        except ValueError:
            known = ", ".join(self.codes)
            raise TaxonomyError(f"unknown class {code!r}; taxonomy {self.name!r} has {known}") from None

    def class_of(self, text: str) -> str | None:
        """Return the code of the class that a table means: by code, else by code, name or alias without case.

        None if no class is written like this; TaxonomyError if more than one is.
        """
        if text in self.codes:
            return text
        # Names of folders and columns are often written with `_` or `-` for a space.
        found = self._classes_by_text.get(folded(text)) or self._classes_by_words.get(_words(text), ())
        if len(found) > 1:
            raise TaxonomyError(f"the class {text!r}, which could be {' or '.join(found)}; write the code of the class")
        return found[0] if found else None

    @cached_property
    def _classes_by_text(self) -> dict[str, tuple[str, ...]]:
        """Code, name and alias, folded, to the codes of the classes that are written like this."""
        found: dict[str, tuple[str, ...]] = {}
        for one in self.classes:
            for text in dict.fromkeys(folded(text) for text in (one.code, one.name, *one.aliases)):
                found[text] = (*found.get(text, ()), one.code)
        return found

    @cached_property
    def _classes_by_words(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, dict[str, None]] = {}
        for text, codes in self._classes_by_text.items():
            found.setdefault(_words(text), {}).update(dict.fromkeys(codes))
        return {text: tuple(codes) for text, codes in found.items()}

    def require_same(self, other_hash: str, owner: str) -> None:
        """Raise TaxonomyError if the hash that `owner` carries is not the hash of this taxonomy."""
        # Compared by hash, not by codes: costs and key classes change decisions as well.
        if other_hash != self.hash:
            raise TaxonomyError(
                f"{owner} was made with taxonomy {other_hash[:12]}, this service uses {self.name!r} "
                f"({self.hash[:12]}); use the taxonomy it was made with"
            )


def folded(text: str) -> str:
    """Return a text as it is compared: without case, outer or repeated spaces, and the `.0` of a whole number."""
    # Copied text may hold characters that nobody sees, such as a zero-width space.
    seen = "".join(one for one in unicodedata.normalize("NFKC", text) if unicodedata.category(one) != "Cf")
    folded = " ".join(seen.casefold().split())
    # pandas and spreadsheets write a column of whole numbers with gaps as 0.0, 1.0.
    number, _, zeros = folded.partition(".")
    return number if number.isdecimal() and zeros and not zeros.strip("0") else folded


def _words(text: str) -> str:
    return " ".join(folded(text).replace("_", " ").replace("-", " ").split())


def load_taxonomy(name_or_path: str) -> Taxonomy:
    """Load a built-in taxonomy by name (`ham10000`), or one from a YAML file.

    An unknown name or a malformed document raises TaxonomyError, which names the field.
    """
    text = _read(name_or_path)
    try:
        document = yaml.load(text, Loader=_SAFE_LOADER)
    except yaml.YAMLError as error:
        raise TaxonomyError(f"{name_or_path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return Taxonomy.model_validate(document)
    except ValidationError as error:
        field, reason = first_problem(error)
        first = error.errors(include_url=False)[0]
        # The code of a class is the one field with a pattern.
        if first["type"] == "string_pattern_mismatch":
            reason = (
                f"{first['input']!r} is no code: one has 1 to 32 characters a to z, 0 to 9 and _; a name may be longer"
            )
        raise TaxonomyError(f"taxonomy {name_or_path}: {field or 'the document'}: {reason}") from error


def _read(name_or_path: str) -> str:
    # A name without a slash is a built-in one first, so a stray file cannot replace `ham10000`.
    built_in = resources.files("records") / "taxonomies" / f"{name_or_path}.yaml"
    if "/" not in name_or_path and built_in.is_file():
        return built_in.read_text(encoding="utf-8")
    path = Path(name_or_path)
    if not path.is_file():
        raise TaxonomyError(f"no taxonomy {name_or_path!r}: give a built-in name (ham10000) or the path of a YAML file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaxonomyError(f"taxonomy {name_or_path!r} cannot be read: {error}") from error
