"""`--labels` and `--columns`: names with commas, equal signs and quotation marks, as tables and pages have them."""

import csv
from pathlib import Path

import pytest

from images.importer import import_folder
from images.pairs import label_pair, parse_columns, parse_labels
from records.errors import DataError
from records.settings import RecordsSettings
from records.store import open_store
from tests.images.test_layouts import put, write


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NEV=nv, MEL = mel", {"NEV": "nv", "MEL": "mel"}),
        ('"Melanoma, NOS=mel"', {"Melanoma, NOS": "mel"}),
        ('"Melanoma, NOS"=mel,NEV=nv', {"Melanoma, NOS": "mel", "NEV": "nv"}),
        ('NEV=nv,"Carcinoma, basal cell, ""nodular"""=bcc', {"NEV": "nv", 'Carcinoma, basal cell, "nodular"': "bcc"}),
        ("grade=3=mel,T<=1=nv", {"grade=3": "mel", "T<=1": "nv"}),
        ('5" nevus=nv', {'5" nevus': "nv"}),
        ("Näevus · gutartig=nv", {"Näevus · gutartig": "nv"}),
        ('""=mel', {'""': "mel"}),
        (" =nv, ", None), ("mel", None), ('"Melanoma, NOS=mel', None), ('"a, b"', None), ("a=mel,", None),
    ],
)  # fmt: skip
def test_labels_are_pairs(text: str, expected: dict[str, str] | None) -> None:
    if expected is None:
        with pytest.raises(DataError, match=r"--labels cannot read .*; write label=class"):
            parse_labels(text)
        return
    assert parse_labels(text) == expected
    assert parse_labels(",".join(label_pair(*pair) for pair in expected.items())) == expected


def test_columns_are_pairs() -> None:
    assert parse_columns(None) == parse_columns("") == {}
    assert parse_columns(" dx = a , lesion=b") == {"dx": "a", "lesion": "b"}
    assert parse_columns('dx="diagnosis, final",image=file=name') == {"dx": "diagnosis, final", "image": "file=name"}
    for text in ("dx", "dx=", "=a", "dx=a,,"):
        with pytest.raises(DataError, match=r"--columns cannot read .*; write what=column"):
            parse_columns(text)


def test_a_label_with_a_comma_is_imported(tmp_path: Path) -> None:
    data = tmp_path / "data"
    names = [f"{number}.jpg" for number in range(4)]
    put(data, *names)
    labels = ["Carcinoma, Merkel cell", "NEV", "Carcinoma, Merkel cell", "NEV"]
    write(data, "t.csv", "")
    with (data / "t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image_id", "final, dx"], *zip(names, labels, strict=True)])
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    said = parse_labels('"Carcinoma, Merkel cell"=bcc')
    report = import_folder(store, data, columns=parse_columns('dx="final, dx"'), labels=said)
    store.close()
    assert report.classes == {"bcc": 2, "nv": 2}
    assert report.quarantined == []
