"""What the tags of DICOM files add to the rows of an import, where its table says nothing.

Patients are hashed as those of tables are. Studies and lesions are stored as hashes under the same key, and so is each
part of a file's path that quotes the patient or an identifier, so that neither is stored.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from images.dicom import DicomTags
from images.files import shown
from images.import_plan import Entry
from images.source_table import SourceRow, is_blank
from records.home import Home
from records.keys import patient_hash

_NOBODY = frozenset({"0", "anon", "anonymous", "anonymised", "anonymized", "deidentified", "patient", "removed"})
"""What programs write instead of a patient; all who are called so would be one person."""

_SHORTEST_IDENTIFIER = 4
_SLASHES = re.compile(r"([/\\])")
_WORDS = re.compile(r"[\^=\s_.,-]+")


def with_tags(home: Home, entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Fill what the table leaves open from the tags of DICOM files.

    Args:
        home: its key hashes identifiers.
        entries: of an import.
    Returns:
        The entries without tags, and sentences about what was read.
    """
    tagged = [(entry, entry.taken.tags) for entry in entries if entry.taken.tags is not None]
    if not tagged:
        return list(entries), []
    labels: dict[str, set[str | None]] = {}
    for entry, tags in tagged:
        labels.setdefault(tags.study_uid, set()).add(entry.row.label)
    mixed = {uid for uid, found in labels.items() if uid and len(found - {None}) > 1}
    notes = [
        f"{len(tagged)} DICOM files: patient, lesion or study, age, sex and body site are read from their tags where "
        "the table does not say them; no other tag is kept"
    ]
    if mixed:
        notes.append(f"{len(mixed)} studies hold images of several classes, which count as different lesions")
    if unknown := sum(tags.unknown_site and entry.row.context["localization"] is None for entry, tags in tagged):
        notes.append(f"{unknown} body sites of DICOM files are on none of DICOM's lists and were left out")
    if nobody := sum(_patient(tags) is None and not entry.row.context["patient_id"] for entry, tags in tagged):
        notes.append(f"{nobody} DICOM files name no patient; images of one study count as one patient's")
    return [_filled(home, entry, mixed) for entry in entries], notes


def _filled(home: Home, entry: Entry, mixed: set[str]) -> Entry:
    tags, row = entry.taken.tags, entry.row
    if tags is None:
        return entry
    of_study = f"study {tags.study_uid}" if tags.study_uid else None
    lesion = f"lesion {tags.lesion_id}" if tags.lesion_id else None if tags.study_uid in mixed else of_study
    found = {
        "patient_id": _patient(tags) or of_study,
        "lesion_id": lesion and f"dicom-{patient_hash(home, lesion)[:16]}",
        "sex": tags.sex,
        "localization": tags.localization,
    }
    context = {name: value or found.get(name) for name, value in row.context.items()}
    row = replace(
        row,
        source_id=_name(home, row, tags),
        context=context,
        age_years=tags.age_years if row.age_years is None else row.age_years,
    )
    return Entry(row, replace(entry.taken, tags=None))


def _patient(tags: DicomTags) -> str | None:
    nobody = is_blank(tags.patient_id) or tags.patient_id.casefold() in _NOBODY
    return None if nobody else tags.patient_id


def _name(home: Home, row: SourceRow, tags: DicomTags) -> str:
    """Return the image's name; each part of its path that quotes the patient or an identifier is a hash."""
    by_uid = isinstance(row.path, Path) and row.source_id == tags.sop_uid
    name = shown(row.path.name) if by_uid and row.path is not None else row.source_id
    texts = {tags.sop_uid, tags.study_uid, tags.patient_id, *_WORDS.split(tags.patient_name)}
    texts = {text.casefold() for text in texts if text}
    parts = _SLASHES.split(name)
    return "".join(f"dicom-{patient_hash(home, part)[:16]}" if _quotes(part, texts) else part for part in parts)


def _quotes(part: str, texts: set[str]) -> bool:
    folded = part.casefold()
    # A short text may be part of any name by chance.
    return not texts.isdisjoint({folded, *_WORDS.split(folded)}) or any(
        len(text) >= _SHORTEST_IDENTIFIER and text in folded for text in texts
    )
