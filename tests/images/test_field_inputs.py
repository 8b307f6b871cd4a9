"""Small inputs that people really have, one folder per situation, imported whole: labels, splits, counts, sentences."""

import csv
import io
import os
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image as PillowImage

import relook
from images.decode import decode_frame
from images.importer import ImportReport, import_folder
from records.errors import DataError
from records.frames import Frame
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Split

CODES = ["akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"]
HEADER = ["lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization"]
EACH = dict.fromkeys(CODES, 2)


def pixels_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)


def photo(seed: int, kind: str = "JPEG") -> bytes:
    buffer = io.BytesIO()
    PillowImage.fromarray(pixels_of(seed)).save(buffer, kind)
    return buffer.getvalue()


def put(folder: Path, *names: str) -> None:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(photo(seed))


def text(rows: Sequence[Sequence[str]], delimiter: str = ",", end: str = "\n") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter, lineterminator=end).writerows(rows)
    return out.getvalue()


def ham(folder: Path, labels: Sequence[str] = CODES, name: str = "q{}.jpg", said: str = "q{}", count: int = 14) -> list:
    """Images, and the rows of a table in HAM10000's columns."""
    put(folder, *(f"imgs/{name.format(at)}" for at in range(count)))
    rows = [
        [f"L{at}", said.format(at), labels[at % len(labels)], "histo", f"{30 + at}.0", "male", "back"]
        for at in range(count)
    ]
    return [HEADER, *rows]


def simple(folder: Path, said: Sequence[str], count: int) -> None:
    put(folder, *(f"imgs/w{at}.jpg" for at in range(count)))
    rows = [["image_id", "dx"], *([f"w{at}", said[at % len(said)]] for at in range(count))]
    (folder / "t.csv").write_text(text(rows))


def write(folder: Path, data: str | bytes, name: str = "t.csv") -> None:
    (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def home(root: Path, codes: Sequence[str] | Mapping[str, Sequence[str]] = ()) -> Iterator[Store]:
    """A home with HAM10000's classes, or with others and their aliases."""
    taxonomy = None
    if codes:
        aliases = codes if isinstance(codes, Mapping) else dict.fromkeys(codes, ())
        classes = [
            {"code": code, "name": f"Class {code}", "malignant": False, "aliases": list(aliases[code])}
            for code in codes
        ]
        taxonomy = str(root / "mine.yaml")
        (root / "mine.yaml").write_text(yaml.safe_dump({"name": "made", "version": 1, "classes": classes}))
    store = open_store(
        RecordsSettings(home=root / "home", taxonomy=taxonomy) if taxonomy else RecordsSettings(home=root / "home")
    )
    yield store
    store.close()


def imported(root: Path, fill: Callable[[Path], object], codes: Sequence[str] = ()) -> ImportReport:
    (root / "data").mkdir()
    fill(root / "data")
    with home(root, codes) as store:
        return import_folder(store, root / "data")


def onehot(folder: Path, codes: Sequence[str], one: str, count: int) -> None:
    put(folder, *(f"imgs/I_{at:04d}.jpg" for at in range(count)))
    zero, places = one.replace("1", "0"), range(len(codes))
    rows = [[f"I_{at:04d}", *(one if at % len(codes) == place else zero for place in places)] for at in range(count)]
    write(folder, text([["image", *codes], *rows]))


def pad_ufes(folder: Path) -> None:
    names = [f"PAT_{at}_{at * 7}_{at * 13}.png" for at in range(12)]
    put(folder, *(f"imgs/{name}" for name in names))
    labels = ["MEL", "NEV", "BCC", "ACK", "SEK", "SCC"]
    rows = [[f"PAT_{at}", str(at * 7), name, labels[at % 6], "True"] for at, name in enumerate(names)]
    write(folder, text([["patient_id", "lesion_id", "img_id", "diagnostic", "biopsed"], *rows]))


ISIC = ["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"]
PETS = ["cat", "dog", "owl"]
FEW = [f"k{place:02d}" for place in range(20)]

# Situation: what fills the folder, the taxonomy, the images of each class, quarantined rows, images without a label.
INPUTS: dict[str, tuple[Callable[[Path], object], Sequence[str], dict[str, int], int, int]] = {
    "onehot": (
        lambda f: onehot(f, ISIC, "1.0", 18), (),
        {"mel": 2, "nv": 2, "bcc": 2, "akiec": 2, "bkl": 2, "df": 2, "vasc": 2}, 2, 2,
    ),
    "folders": (lambda f: put(f, *(f"{c}/{c}{n}.jpg" for c in PETS for n in range(6))), PETS,
                dict.fromkeys(PETS, 6), 0, 0),
    "animals": (lambda f: simple(f, PETS, 60), PETS, dict.fromkeys(PETS, 20), 0, 0),
    "case": (pad_ufes, (), {"mel": 2, "nv": 2, "bcc": 2, "akiec": 2, "bkl": 2}, 2, 0),
    "hamcase": (
        lambda f: write(f, text(ham(f, [[c.upper(), c.title(), f" {c} "][n % 3] for n, c in enumerate(CODES)]))), (),
        EACH, 0, 0,
    ),
    "extcase": (lambda f: write(f, text(ham(f, name="Q{}.JPG", said="Q{}.jpg"))), (), EACH, 0, 0),
    "backslash": (lambda f: write(f, text(ham(f, said="imgs\\q{}.jpg"))), (), EACH, 0, 0),
    "trailing": (lambda f: write(f, text(ham(f), end=",\n").replace("localization,", "localization")), (), EACH, 0, 0),
    "sepline": (lambda f: write(f, "sep=;\r\n" + text(ham(f), ";", "\r\n")), (), EACH, 0, 0),
    "cp1252": (lambda f: write(f, text(ham(f), ";").replace("back", "Rücken", 1).encode("cp1252")), (), EACH, 0, 0),
    "none": (lambda f: simple(f, ["none", "na", "scratch"], 12), ["none", "na", "scratch"],
             {"none": 4, "na": 4, "scratch": 4}, 0, 0),
    "intsfloat": (lambda f: simple(f, ["0.0", "1.0", "2.0"], 12), "012", {"0": 4, "1": 4, "2": 4}, 0, 0),
    "fewshot5": (lambda f: simple(f, FEW, 100), FEW, dict.fromkeys(FEW, 5), 0, 0),
    # Others of the same kinds.
    "labels in words": (
        lambda f: write(f, text(ham(f, ["Melanoma, NOS", "MELANOMA", "nevus", "Dermatofibroma"], count=12))), (),
        {"mel": 6, "nv": 3, "df": 3}, 0, 0,
    ),
    "one-hot of words": (lambda f: onehot(f, ["Cat", "DOG", "owl"], "1", 9), PETS, dict.fromkeys(PETS, 3), 0, 0),
    "null as a class": (lambda f: simple(f, ["NULL", "nan", "unknown"], 9), ["null", "nan", "ok"],
                        {"null": 3, "nan": 3}, 0, 3),
    "wide numbers": (lambda f: simple(f, ["10.00", "7", " 3.0 "], 9), ["3", "7", "10"],
                     dict.fromkeys(["3", "7", "10"], 3), 0, 0),
    "pairs": (lambda f: simple(f, FEW, 40), FEW, dict.fromkeys(FEW, 2), 0, 0),
    "one image per class": (lambda f: simple(f, FEW, 20), FEW, dict.fromkeys(FEW, 1), 0, 0),
    "8 lesions of two classes": (lambda f: simple(f, ["a", "b"], 16), "ab", {"a": 8, "b": 8}, 0, 0),
    "accents in two forms": (
        lambda f: write(f, unicodedata.normalize("NFD", text(ham(f, name="Rücken{}.JPEG", said="Rücken{}.jpg")))), (),
        EACH, 0, 0,
    ),
    "utf-16 with tabs": (lambda f: write(f, text(ham(f), "\t").encode("utf-16")), (), EACH, 0, 0),
    "links and system files": (
        lambda f: (write(f, text(ham(f))), put(f, "__MACOSX/q0.jpg"), (f / "imgs/up").symlink_to(f)), (), EACH, 0, 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_as_people_have_them(tmp_path: Path, kind: str) -> None:
    fill, codes, classes, quarantined, unlabelled = INPUTS[kind]
    report = imported(tmp_path, fill, list(codes))
    assert report.classes == classes
    assert (len(report.quarantined), report.unlabelled, report.unlisted) == (quarantined, unlabelled, [])
    assert report.images == sum(classes.values()) + unlabelled
    # Lesions that can fill every split do so.
    labelled = sum(classes.values())
    assert sum(report.splits.values()) == labelled
    if labelled >= 8:
        assert set(report.splits) == {split.value for split in Split}
    if unlabelled:
        assert any(note.startswith(f"{unlabelled} images have no label: ") for note in report.notes)
    if kind == "cp1252":
        assert report.notes == ["t.csv is not UTF-8 and was read as Windows-1252 (cp1252)"]
    unknown = {row.reason for row in report.quarantined}
    assert all("taxonomy 'ham10000' has akiec, bcc, bkl, df, mel, nv, vasc" in reason for reason in unknown)


def odd_files() -> dict[str, tuple[bytes, str | None]]:
    """One file of each odd kind, and what an import says of it; None takes it."""
    grey, alpha = pixels_of(1)[..., 0].astype(np.uint16) * 257, (np.indices((24, 32)).sum(0) % 2 * 255).astype(np.uint8)
    hidden = np.dstack([pixels_of(2), alpha])
    hidden[alpha == 0, :3] = (250, 0, 250)

    def saved(image: PillowImage.Image, kind: str) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind)
        return buffer.getvalue()

    return {
        "grey16.png": (saved(PillowImage.fromarray(grey), "PNG"), None),
        "hidden_colours.png": (saved(PillowImage.fromarray(hidden), "PNG"), None),
        "cmyk.jpg": (saved(PillowImage.fromarray(pixels_of(3)).convert("CMYK"), "JPEG"), None),
        "palette.png": (saved(PillowImage.fromarray(pixels_of(4)).convert("P"), "PNG"), None),
        "really_png.jpg": (photo(5, "PNG"), None),
        "tiff.tif": (photo(6, "TIFF"), "does not read TIFF files"),
        "bmp.bmp": (photo(7, "BMP"), "does not read BMP files"),
        "cut_off.jpg": (photo(8)[:-300], "cut off"),
        "gif.jpeg": (photo(9, "GIF"), "does not read GIF files"),
        "empty.png": (b"", ""),
        "text.jpg": (b"no image at all", ""),
    }


def test_one_file_of_each_odd_kind(tmp_path: Path) -> None:
    files = odd_files()
    report = imported(tmp_path, lambda f: [put(f, "nv/plain.jpg"), (f / "mel").mkdir(), *(
        (f / "mel" / name).write_bytes(data) for name, (data, _) in files.items())])  # fmt: skip
    refused = {row.source_id.removeprefix("mel/"): row.reason for row in report.quarantined}
    assert set(refused) == {name for name, (_, why) in files.items() if why is not None}
    assert report.classes == {"mel": sum(why is None for _, why in files.values()), "nv": 1}
    for name, (_, why) in files.items():
        assert why is None or why in refused[name]
    # The model sees a grey image in its own brightness, and nothing of the colours under transparent pixels.
    grey = decode_frame(files["grey16.png"][0], Frame(24))
    assert 90 < grey.mean() < 165
    assert not (decode_frame(files["hidden_colours.png"][0], Frame(24)) == (250, 0, 250)).all(axis=-1).any()


def test_folders_of_other_classes_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'cat'; taxonomy 'ham10000' has .*; `relook taxonomy from DIR` proposes one"):
        imported(tmp_path, lambda f: put(f, "cat/1.jpg", "dog/1.jpg"))


def test_images_of_one_class_are_imported_and_said(tmp_path: Path) -> None:
    report = imported(tmp_path, lambda f: simple(f, ["mel"], 9))
    assert report.classes == {"mel": 9}
    assert any("all 9 labelled images are of the one class mel" in note for note in report.notes)


def test_thousands_of_files_in_one_folder(tmp_path: Path) -> None:
    one = photo(0)

    def fill(folder: Path) -> None:
        (folder / "imgs").mkdir()
        (folder / "imgs/i0.jpg").write_bytes(one)
        for at in range(1, 5000):
            os.link(folder / "imgs/i0.jpg", folder / f"imgs/i{at}.jpg")
        write(folder, text([["image_id", "dx"], *([f"i{at}.JPG", "nv"] for at in range(5)), ["i9999", "nv"]]))

    report = imported(tmp_path, fill)
    assert (report.images, len(report.same_bytes), len(report.unlisted)) == (1, 4, 4995)
    assert [row.reason for row in report.quarantined] == [f"there is no image named i9999 in {tmp_path / 'data'}"]
    assert all(len(note) < 300 for note in report.notes)


@pytest.mark.parametrize("layout", [None, "table"])
def test_python_corrects_labels_as_the_command_does(tmp_path: Path, layout: str | None) -> None:
    folder = tmp_path / "data"
    simple(folder, ["mel", "nv"], 8)
    with relook.open_home(tmp_path / "home") as opened:
        first = relook.import_images(opened, folder, layout=layout, frames=(Frame(32),))
        simple(folder, ["nv", "nv"], 8)
        kept = relook.import_images(opened, folder, frames=(Frame(32),))
        taken = relook.import_images(opened, folder, correct=True, layout=layout, frames=(Frame(32),))
    assert first.classes == kept.classes == {"mel": 4, "nv": 4}
    assert taken.classes == {"nv": 8}
    assert [row.code for row in kept.quarantined] == ["label_conflict"] * 4
