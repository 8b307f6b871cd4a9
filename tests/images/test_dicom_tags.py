"""The tags of a DICOM file that an import uses, and the words that it does not take."""

from typing import Any

import numpy as np

from images.decoder_dicom import decode_dicom
from images.settings import ImagesSettings
from tests.dicoms import dicom, item

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def test_what_is_read_of_the_tags() -> None:
    def tags(**values: Any) -> dict[str, Any]:
        return decode_dicom(dicom(GREY, **values), ImagesSettings())[1]

    ages = {
        "045Y": 45,
        "006M": 0.5,
        "18M": 1.5,
        "26W": 0.5,
        "010D": 0.0,
        "": None,
        "45": None,
        "999Y": None,
        "xyz": None,
    }
    for text, years in ages.items():
        assert tags(PatientAge=text)["age_years"] == years, text
    assert tags(PatientBirthDate="19800601", StudyDate="20200531")["age_years"] == 39
    assert tags(PatientBirthDate="20300601", StudyDate="20200531")["age_years"] is None
    assert [tags(PatientSex=text)["sex"] for text in ("M", "F", "O", "", "?")] == [
        "male",
        "female",
        "other",
        None,
        None,
    ]
    sites = {"CHEST": "chest", "LOWER LEG": "lower leg", "ARM": "arm", "Jane Doe": None}
    for text, site in sites.items():
        assert tags(BodyPartExamined=text)["localization"] == site, text
    coded = item(CodeValue="not a code", CodingSchemeDesignator="SCT", CodeMeaning="Skin of lower extremity")
    assert tags(AnatomicRegionSequence=coded, BodyPartExamined="CHEST")["localization"] == "lower extremity"
