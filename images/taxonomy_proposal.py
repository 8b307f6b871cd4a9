"""A taxonomy file proposed from the labels of a folder: what can be read is filled in, what harms is left to people."""

import difflib
import re
import tempfile
import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import yaml

from images.layouts import read_source
from images.source_table import is_blank
from images.unpack import is_archive, opened
from records.errors import DataError
from records.taxonomy import folded

_MAX_CODE = 32
_ALIKE = 0.85
"""Similarity of two labels, 0 to 1, from which they may be two spellings of one class (difflib's ratio)."""
_HEAD = """\
# Proposed from {source}: {images} labelled images. Complete it before the first import:
# - malignant: true for every class whose miss harms the patient; miss_cost: the relative cost of missing one case;
# - key_classes: classes whose sensitivity has a floor, such as  - {{code: mel, sensitivity_floor: 0.90}};
# - two labels of one class: keep one entry and list the other under aliases, such as  aliases: [Melanoma in situ].
"""


@dataclass(frozen=True)
class Proposal:
    """A proposed taxonomy file.

    Args:
        text: the YAML document, with comments.
        counts: code to the number of images.
        notes: sentences about labels that look alike or have to be decided by people.
    """

    text: str
    counts: dict[str, int]
    notes: list[str]


def propose_taxonomy(place: Path, *, name: str | None = None, columns: dict[str, str] | None = None) -> Proposal:
    """Propose the classes of a folder of images, or of a table beside its images.

    Args:
        place: a folder in any layout that the import takes, its archive, or a table.
        name: of the taxonomy; default: the folder's.
        columns: `--columns` of the import.
    Returns:
        The proposal, in alphabetical order of the codes.
    Raises:
        DataError: nothing can be read, or there are fewer than two classes.
    """
    is_table = place.is_file() and not is_archive(place)
    with opened(place.parent if is_table else place, Path(tempfile.gettempdir())) as read:
        rows = read_source(read.folder, columns, place if is_table else None).rows
    found = Counter(row.label.strip() for row in rows if row.label)
    folder = place.parent if is_table else place
    labels = Counter({label: count for label, count in found.items() if not is_blank(label)})
    spellings: dict[str, Counter[str]] = {}
    for label, count in labels.items():
        spellings.setdefault(folded(label), Counter())[label] = count
    if len(spellings) < 2:
        named = f"the one class {next(iter(labels))!r}" if labels else "no label"
        raise DataError(f"{place} has {named}; a classifier needs images of at least two classes")
    codes: dict[str, str] = {}
    for text in sorted(spellings):
        codes[_code(text, codes)] = text
    lines = [_HEAD.format(source=folder.resolve().name, images=labels.total()).rstrip()]
    lines += [_plain("name", name or folder.resolve().name), "version: 1", "classes:"]
    for code, text in codes.items():
        shown = spellings[text].most_common(1)[0][0]
        entry = yaml.safe_dump(
            {"code": code, "name": shown, "malignant": False, "miss_cost": 1.0},
            default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000,
        ).strip()  # fmt: skip
        lines.append(f"  - {entry}  # {spellings[text].total()} images")
    notes = [
        f"{codes[one]!r} and {codes[other]!r} look alike; if they are one class, make one an alias of the other"
        for one, other in combinations(codes, 2)
        if difflib.SequenceMatcher(None, codes[one], codes[other]).ratio() >= _ALIKE
    ]
    if blank := {label: count for label, count in found.items() if is_blank(label)}:
        named = ", ".join(f"{label!r} ({count} images)" for label, count in sorted(blank.items()))
        notes.append(f"{named}: taken as no diagnosis; add a class of that name if it is one")
    counts = {code: spellings[text].total() for code, text in codes.items()}
    return Proposal("\n".join([*lines, "key_classes: []", ""]), counts, notes)


def _plain(key: str, value: str) -> str:
    return yaml.safe_dump({key: value}, allow_unicode=True, width=10_000).strip()


def _code(text: str, taken: dict[str, str]) -> str:
    """Return a code for a class that no other has: letters a to z, digits and `_`."""
    letters = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    base = re.sub(r"[^a-z0-9]+", "_", letters.lower()).strip("_")[: _MAX_CODE - 4] or "class"
    number, code = 1, base
    while code in taken:
        number += 1
        code = f"{base}_{number}"
    return code
