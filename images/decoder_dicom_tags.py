"""The few tags of a DICOM file that an import uses; all others are read by nobody.

Patient, study and SOP instance leave this process only to be hashed and compared. The body site is a word of DICOM's
own lists: a text that is not in them may be anything, a name included, and is left out.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import date
from functools import lru_cache
from typing import Any, cast

from pydicom.dataset import Dataset
from pydicom.sr._concepts_dict import concepts

_AGE = re.compile(r"0*([0-9]{1,3})([DWMY])")
_DAYS = {"D": 1.0, "W": 7.0, "M": 365.25 / 12, "Y": 365.25}
_DATES = ("AcquisitionDate", "ContentDate", "SeriesDate", "StudyDate")
_SEX = {"M": "male", "F": "female", "O": "other"}
# Lists of body sites: of endoscopy, dermatology, radiography and microscopy, and those common to all.
_CONTEXT_GROUPS = frozenset({4, 4009, 4029, 4030, 4031, 4040, 8134})
_BODY_PARTS = ("arm", "ear", "extremity", "finger", "leg", "neck", "toe", "torso")
"""Further words of Body Part Examined."""
_SKIN_OF = re.compile(r"^skin (structure )?of (the )?")
_MAX_TEXT = 64


def tags_of(dataset: Dataset) -> dict[str, Any]:
    """Return the tags that are kept, as `images.dicom.DicomTags` has them."""
    written, site = _body_site(dataset)
    return {
        "patient_id": _text(dataset, "PatientID"),
        "patient_name": _text(dataset, "PatientName"),
        "study_uid": _text(dataset, "StudyInstanceUID"),
        "sop_uid": _text(dataset, "SOPInstanceUID"),
        "lesion_id": _text(dataset, "TrackingUID") or _text(dataset, "TrackingID"),
        "age_years": _age_years(dataset),
        "sex": _SEX.get(_text(dataset, "PatientSex").upper()),
        "localization": site,
        "unknown_site": bool(written) and site is None,
    }


def _text(dataset: Dataset, keyword: str) -> str:
    # A broken tag is no reason to refuse an image whose pixels are intact.
    with suppress(Exception):
        return str(dataset.get(keyword) or "").strip(" \x00")[:_MAX_TEXT]
    return ""


def _age_years(dataset: Dataset) -> float | None:
    """Return whole years, or parts of the first two; a date would lead back to the date of birth."""
    found = _AGE.fullmatch(_text(dataset, "PatientAge").upper())
    if found:
        years = int(found[1]) * _DAYS[found[2]] / 365.25
    else:
        born = _date(_text(dataset, "PatientBirthDate"))
        taken = next(filter(None, (_date(_text(dataset, name)) for name in _DATES)), None)
        if born is None or taken is None or taken < born:
            return None
        years = (taken - born).days / 365.25
    years = round(years, 1) if years < 2 else float(int(years + 1e-6))
    return years if years <= 130 else None


def _date(text: str) -> date | None:
    with suppress(ValueError):
        return date.fromisoformat(text.replace(".", ""))
    return None


def _body_site(dataset: Dataset) -> tuple[str, str | None]:
    """Return what the file says, and the word of DICOM's lists for it."""
    written = ""
    with suppress(Exception):
        for item in list(dataset.get("AnatomicRegionSequence") or [])[:1]:
            for keyword in ("CodeValue", "CodeMeaning"):
                written = _text(item, keyword)
                if site := _sites().get(_folded(written)):
                    return written, site
    body_part = _text(dataset, "BodyPartExamined")
    return written or body_part, _sites().get(_folded(body_part))


def _folded(text: str) -> str:
    return "".join(_SKIN_OF.sub("", text.lower()).replace("_", " ").split())


@lru_cache(maxsize=1)
def _sites() -> dict[str, str]:
    """Return body sites by code, and by name without case and spaces."""
    found = {part: part for part in _BODY_PARTS}
    for codes in cast(Mapping[str, Mapping[str, tuple[str, list[int]]]], concepts["SCT"]).values():
        for code, (meaning, groups) in codes.items():
            if not _CONTEXT_GROUPS.isdisjoint(groups):
                site = _SKIN_OF.sub("", meaning.lower())
                found.setdefault(_folded(code), site)
                found.setdefault(_folded(meaning), site)
    return found
