"""DICOM files: their pixels as they are to be shown, what is refused, and what stays of their tags."""

import io
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image as PillowImage
from PIL import ImageCms
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_voi_lut
from pydicom.uid import DeflatedExplicitVRLittleEndian, JPEG2000Lossless, RLELossless, generate_uid

from images.decode import CostlyError, decode_frame, decode_if_cheap
from images.decoder_dicom import decode_dicom
from images.dicom import read_dicom
from images.importer import ImportReport, import_folder, open_dataset
from images.settings import VARIABLE, ImagesSettings
from records.datasets import load_dataset
from records.errors import DataError, ImageError
from records.frames import Frame
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.taxonomy import Taxonomy
from records.types import Image, Quarantined
from tests.dicoms import dataset_of, dicom, disk, file_of, item, jpeg_of, shipped, with_jpeg

# A decoder process ignores the warnings of pydicom, too.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOUR = disk((60, 40, 30), 1)
WIDE = np.linspace(0, 4095, 256).astype(np.uint16).reshape(16, 16)
MARK = "MARKERZZ"
COLOURS = {"amber": (230, 160, 40), "green": (60, 160, 70), "plum": (130, 60, 130)}


def shown(data: bytes) -> NDArray[np.int64]:
    """Return the pixels of a DICOM file: [H, W], or [H, W, 3]. Decoded here; a few tests below use the process."""
    pixels, _ = decode_dicom(data, ImagesSettings())
    is_grey = bool((pixels[..., :1] == pixels).all())
    return (pixels[..., 0] if is_grey else pixels).astype(np.int64)


# ---------------------------------------------------------------- pixels


def test_images_are_shown_as_dicom_says() -> None:
    signed = (WIDE.astype(np.int32) - 1024).astype(np.int16)
    expected = np.rint(WIDE / 4095 * 255)
    cases = {
        "grey": (dicom(GREY), GREY),
        "inverted": (dicom(GREY, "MONOCHROME1"), 255 - GREY),
        "colour": (dicom(COLOUR), COLOUR),
        "planar": (
            file_of(dataset_of(COLOUR, PlanarConfiguration=1, PixelData=COLOUR.transpose(2, 0, 1).tobytes())),
            COLOUR,
        ),
        "colour of 16 bits": (dicom(COLOUR.astype(np.uint16) * 257), COLOUR),
        "12 bits without a window": (dicom(WIDE, BitsStored=12, HighBit=11), expected),
        "signed, inverted": (dicom(signed, "MONOCHROME1"), 255 - expected),
        "window of all": (dicom(WIDE, WindowCenter="2048", WindowWidth="4096"), np.rint(WIDE / 4095 * 255)),
        "first of two windows": (
            dicom(GREY, WindowCenter=["128", "10"], WindowWidth=["256", "5"]), GREY,
        ),
        "narrow window": (dicom(GREY, WindowCenter="100", WindowWidth="1"), np.where(GREY > 99.5, 255, 0)),
        "rescaled": (
            dicom(WIDE, RescaleSlope="2", RescaleIntercept="-1000", WindowCenter="3095", WindowWidth="8190",
                  VOILUTFunction="LINEAR_EXACT"),
            np.rint(expected / 255 * 255),
        ),
        "padding": (dicom(np.where(WIDE < 100, 65535, WIDE).astype(np.uint16), PixelPaddingValue=65535), None),
        "one bit": (
            file_of(dataset_of(GREY, BitsAllocated=1, BitsStored=1, HighBit=0,
                               PixelData=np.packbits(GREY.ravel() % 2, bitorder="little").tobytes())),
            GREY % 2 * 255,
        ),
    }  # fmt: skip
    for name, (data, pixels) in cases.items():
        found = shown(data)
        if pixels is not None:
            assert np.abs(found - pixels).max() <= 1, name
    padded = shown(cases["padding"][0])
    assert padded[WIDE >= 100].min() == 0
    assert padded[15, 15] == 255


def test_palettes_and_tables_of_grey() -> None:
    ramp = np.arange(256, dtype=np.uint16) * 257
    names = ("Red", "Green", "Blue")
    tables = {f"{name}PaletteColorLookupTableData": table.tobytes() for name, table in
              zip(names, (ramp, ramp[::-1], np.zeros_like(ramp)), strict=True)}  # fmt: skip
    heads = {f"{name}PaletteColorLookupTableDescriptor": [256, 0, 16] for name in names}
    found = shown(dicom(GREY, "PALETTE COLOR", **tables, **heads))
    assert np.array_equal(found, np.stack([GREY, 255 - GREY, 0 * GREY], axis=2))

    table = item(LUTDescriptor=[256, 0, 16], LUTData=ramp[::-1].tobytes())
    assert np.array_equal(shown(dicom(GREY, VOILUTSequence=table)), 255 - GREY)


def test_a_colour_profile_is_applied() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # The same profile with the primaries of red and blue exchanged.
    swapped = srgb.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")
    red = np.full((8, 8, 3), (255, 0, 0), np.uint8)
    assert np.abs(shown(dicom(red, ICCProfile=srgb)) - (255, 0, 0)).max() <= 1
    assert np.abs(shown(dicom(red, ICCProfile=swapped)) - (0, 0, 255)).max() <= 3


def test_the_same_image_in_each_encoding_of_pydicoms_files() -> None:
    mr = [shown(shipped(f"MR_small{name}.dcm")) for name in
          ("", "_RLE", "_bigendian", "_expb", "_implicit", "_jp2klossless", "_padded")]  # fmt: skip
    assert all(np.array_equal(mr[0], other) for other in mr[1:])
    reference = shown(shipped("SC_rgb_rle.dcm"))
    for name in ("SC_rgb_rle_16bit", "SC_rgb_gdcm_KY", "SC_ybr_full_422_uncompressed", "SC_rgb_dcmtk_+eb+cr",
                 "SC_rgb_dcmtk_+eb+cy+np", "SC_rgb_jpeg_dcmtk"):  # fmt: skip
        assert np.abs(shown(shipped(f"{name}.dcm")) - reference).mean() < 4, name
    assert shown(shipped("image_dfl.dcm")).shape == (512, 512)
    assert shown(shipped("examples_palette.dcm")).shape == (350, 800, 3)


def test_a_window_equals_pydicoms() -> None:
    for function in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        dataset = dataset_of(WIDE, BitsStored=12, HighBit=11, WindowCenter="1500", WindowWidth="900",
                             VOILUTFunction=function)  # fmt: skip
        expected = apply_voi_lut(WIDE, dataset) / 4095 * 255
        assert np.abs(shown(file_of(dataset)) - expected).max() <= 0.51, function


def test_what_is_decoded_from_a_file_is_what_is_decoded_from_its_png() -> None:
    data = dicom(COLOUR)
    assert np.array_equal(decode_frame(data, Frame(24)), decode_frame(read_dicom(data).png, Frame(24)))
    with pytest.raises(CostlyError):
        decode_if_cheap(data, [Frame(24)])


# ---------------------------------------------------------------- refusals


TIGHT = ImagesSettings(max_megapixels=1, decoder_memory_mb=64, decoder_time_s=60, max_scans=20)
"""Limits that small files exceed."""


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let decoder processes have the limits `TIGHT`."""
    monkeypatch.setenv(VARIABLE, TIGHT.model_dump_json())


def deflated(inside: bytes) -> bytes:
    """Return a file whose data is compressed with little effort."""
    dataset = dataset_of(GREY)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    head = file_of(dataset_of(GREY)).replace(b"1.2.840.10008.1.2.1\x00", b"1.2.840.10008.1.2.1.99")
    at = head.index(b"1.2.840.10008.1.2.1.99")
    # The length of the transfer syntax stands before it.
    head = head[: at - 2] + struct.pack("<H", 22) + head[at:]
    start = head.index(b"\x08\x00\x16\x00")
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    return head[:start] + packer.compress(inside) + packer.flush()


def _jpeg_2000(pixels: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, format="JPEG2000", no_jp2=True)
    return file.getvalue()


def _encapsulated(announced: NDArray[Any], frame: bytes, syntax: str) -> bytes:
    return with_jpeg(announced, frame).replace(
        b"\x02\x00\x10\x00UI\x16\x001.2.840.10008.1.2.4.50", b"\x02\x00\x10\x00UI\x16\x00" + syntax.encode()
    )


def _runs(count: int) -> bytes:
    dataset = dataset_of(GREY)
    dataset.file_meta.TransferSyntaxUID = RLELossless
    dataset.PixelData = encapsulate([struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\x00" * count])
    dataset["PixelData"].is_undefined_length = True
    return file_of(dataset)


LARGE = np.zeros((200, 300, 3), np.uint8)
REFUSED: dict[str, tuple[Any, str, str]] = {
    "cut off in its pixels": (lambda: dicom(COLOUR)[:-500], "damaged", "is damaged"),
    "cut off in its tags": (lambda: dicom(COLOUR)[:400], "damaged", "holds no pixels"),
    "more pixels than bytes": (lambda: dicom(GREY, Rows=900, Columns=900), "damaged", "fewer pixels"),
    "too many pixels": (lambda: dicom(GREY, Rows=60000, Columns=60000), "too_many_pixels", "60000 x 60000"),
    "no rows": (lambda: dicom(GREY, Rows=0), "damaged", "no pixels"),
    "frames": (lambda: dicom(GREY, NumberOfFrames="1000000"), "not_an_image", "holds 1000000 frames and Relook reads"),
    "tags that do not end": (
        lambda: deflated(b"\x00" * 40_000_000), "too_costly", "inflates to more than 16 MB",
    ),
    "a JPEG of another size": (lambda: with_jpeg(COLOUR, jpeg_of(LARGE)), "damaged", "do not agree how large"),
    "a JPEG 2000 of another size": (
        lambda: _encapsulated(COLOUR, _jpeg_2000(LARGE), JPEG2000Lossless), "damaged", "do not agree how large",
    ),
    "a JPEG 2000 that is cut off": (
        lambda: _encapsulated(COLOUR, _jpeg_2000(COLOUR)[:900], JPEG2000Lossless), "damaged", "cannot be decoded",
    ),
    "a large colour profile": (
        lambda: dicom(COLOUR, ICCProfile=bytes(5_000_000)), "too_costly", "profile is larger than the 4096 kB",
    ),
    "a JPEG of many scans": (
        lambda: with_jpeg(COLOUR, _with_scans(jpeg_of(COLOUR), 30)), "too_costly", "scans and 20 are allowed",
    ),
    "a syntax that takes another package": (
        lambda: shipped("MR_small_jpeg_ls_lossless.dcm"), "not_an_image",
        "JPEG-LS Lossless Image Compression; save .* or install what decodes it: pip install pyjpegls$",
    ),
    "12 bits in a JPEG": (lambda: shipped("JPEG-lossy.dcm"), "not_an_image", r"JPEG Extended \(Process 2 and 4\)"),
    "more runs than pixels": (lambda: _runs(100_000), "damaged", "holds more than its header says"),
    "an unknown syntax": (
        lambda: dicom(GREY).replace(b"1.2.840.10008.1.2.1\x00", b"1.2.840.10008.1.9.9\x00"), "not_an_image",
        r"a transfer syntax that is not known \(1.2.840.10008.1.9.9\); save it in",
    ),
    "a report": (lambda: shipped("reportsi.dcm"), "not_an_image", r"holds no image \(it is a Basic Text SR Storage\)"),
    "text in its pixels": (lambda: dicom(GREY, BurnedInAnnotation="YES"), "not_an_image", "pixels show text about"),
    "an odd colour space": (lambda: dicom(COLOUR, "HSV"), "not_an_image", "of a kind that Relook does not read"),
    "a preamble and nothing": (lambda: bytes(128) + b"DICM", "", "damaged|no image"),
    "noise": (lambda: bytes(128) + b"DICM" + bytes(range(256)) * 20, "", "damaged|no image"),
}  # fmt: skip


def _with_scans(jpeg: bytes, count: int) -> bytes:
    at = jpeg.index(b"\xff\xda")
    return jpeg[:at] + jpeg[at:-2] * count + b"\xff\xd9"


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_used_is_refused_with_a_sentence(name: str) -> None:
    make, code, words = REFUSED[name]
    with pytest.raises(ImageError, match=words) as raised:
        decode_dicom(make(), TIGHT)
    assert code in ("", raised.value.code)
    assert "\n" not in str(raised.value)


def test_a_decoder_process_passes_on_why_it_refuses_a_file(tight: None) -> None:
    for name in ("too many pixels", "text in its pixels", "a JPEG of many scans"):
        make, code, words = REFUSED[name]
        with pytest.raises(ImageError, match=words) as raised:
            read_dicom(make())
        assert raised.value.code == code


def test_tags_without_number_end_the_decoder_process_alone(tight: None) -> None:
    endless = file_of(dataset_of(GREY))[:340] + b"\x11\x00\x10\x00LO\x00\x00" * 3_000_000
    with pytest.raises(ImageError, match=r"processor time|memory|was killed") as raised:
        read_dicom(endless)
    assert raised.value.code == "too_costly"


def test_more_values_than_are_allowed_are_refused() -> None:
    with pytest.raises(ImageError, match=r"takes 1 million values and 0.5 million are allowed") as raised:
        decode_dicom(dicom(np.zeros((600, 600, 3), np.uint8)), ImagesSettings(max_megasamples=0.5))
    assert raised.value.code == "too_costly"


def test_no_error_quotes_a_tag(tight: None) -> None:
    marked = {"PatientName": MARK, "PatientID": MARK}
    for made in (
        dataset_of(GREY, **marked, PhotometricInterpretation=MARK),
        dataset_of(GREY, **marked, NumberOfFrames="7"),
        dataset_of(GREY, WindowCenter="1", WindowWidth="2", PatientID=MARK, Rows=999),
    ):
        with pytest.raises(ImageError) as raised:
            read_dicom(file_of(made))
        assert MARK not in str(raised.value)
    broken = dicom(GREY, PatientName=MARK, WindowCenter="12345", WindowWidth="10").replace(b"12345 ", MARK[:6].encode())
    with pytest.raises(ImageError) as raised:
        read_dicom(broken)
    assert MARK[:6] not in str(raised.value)


def test_without_the_package_a_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImageError, match=r"pip install 'relook\[dicom\]'"):
        read_dicom(dicom(GREY))


# ---------------------------------------------------------------- import


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    classes = [{"code": code, "name": code.title(), "malignant": code == "plum"} for code in COLOURS]
    return Taxonomy.model_validate({"name": "colours", "version": 1, "classes": classes})


@pytest.fixture
def store(tmp_path: Path, taxonomy: Taxonomy) -> Iterator[Store]:
    path = tmp_path / "colours.yaml"
    path.write_text(taxonomy.model_dump_json())
    opened = open_store(RecordsSettings(home=tmp_path / "home", taxonomy=str(path)))
    yield opened
    opened.close()


def images_of(store: Store) -> dict[str, Image]:
    with store.ledger.read() as tx:
        return {str(image.source_id): image for image in tx.find(Image)}


def patients(folder: Path, per_class: int = 8) -> list[tuple[str, str, str]]:
    """Write two images of a lesion for each patient, without suffixes; returns name, class and SOP instance UID."""
    rows = []
    for at, (code, colour) in enumerate(COLOURS.items()):
        for number in range(per_class):
            study = generate_uid()
            for view in "ab":
                name, uid = f"IM{at}{number:02}{view}", generate_uid()
                (folder / "disc" / f"S{number}").mkdir(parents=True, exist_ok=True)
                (folder / "disc" / f"S{number}" / name).write_bytes(
                    dicom(
                        disk(colour, 100 * at + number + 1000 * (view == "b")), PatientID=f"ID-{at}-{number}",
                        StudyInstanceUID=study, SOPInstanceUID=uid, PatientAge=f"{30 + number:03}Y", PatientSex="F",
                        AnatomicRegionSequence=item(CodeValue="x", CodeMeaning="Skin of back"),
                    )
                )  # fmt: skip
                rows.append((name, code, uid))
    return rows


def assert_imported(store: Store, report: ImportReport) -> None:
    assert (report.images, report.lesions, report.unlabelled) == (48, 24, 0)
    assert report.classes == dict.fromkeys(COLOURS, 16)
    assert (report.quarantined, report.unlisted) == ([], [])
    assert all(report.splits.values())
    images = images_of(store)
    assert {(image.format, image.sex, image.localization) for image in images.values()} == {("png", "female", "back")}
    assert len({image.patient_hash for image in images.values()}) == 24
    assert images["IM100a"].lesion_id == images["IM100b"].lesion_id != images["IM101a"].lesion_id
    assert images["IM107a"].age_years == 37
    splits = load_dataset(store, report.dataset_id).rows.groupby("group_id")["split"].nunique()
    assert splits.max() == 1


@pytest.mark.parametrize("key", ["image_id", "SOPInstanceUID", "sop_instance_uid"])
def test_a_folder_of_three_classes_with_a_table(store: Store, tmp_path: Path, key: str) -> None:
    rows = patients(tmp_path / "data")
    named = [(name if key == "image_id" else uid, code) for name, code, uid in rows]
    (tmp_path / "data" / "t.csv").write_text(f"{key},dx\n" + "".join(f"{name},{code}\n" for name, code in named))
    report = import_folder(store, tmp_path / "data")
    assert_imported(store, report)
    assert any("48 DICOM files: patient" in note for note in report.notes)


def test_folders_are_classes_if_they_are_classes_else_nothing_has_a_label(store: Store, tmp_path: Path) -> None:
    for number, (code, colour) in enumerate(COLOURS.items()):
        (tmp_path / "classes" / code).mkdir(parents=True)
        (tmp_path / "visits" / f"PAT{number}" / "ST0").mkdir(parents=True)
        (tmp_path / "visits" / f"PAT{number}" / "ST0" / "IM0").write_bytes(dicom(disk(colour, 500 + number)))
        for view in range(3):
            data = dicom(disk(colour, 10 * number + view), PatientID=f"P{number}-{view}")
            (tmp_path / "classes" / code / f"{view}.dcm").write_bytes(data)
    (tmp_path / "visits" / "DICOMDIR").write_bytes(shipped("DICOMDIR"))
    report = import_folder(store, tmp_path / "classes")
    assert report.classes == dict.fromkeys(COLOURS, 3)
    assert "layout: dicom, because 9 of its images are DICOM files" in report.layout
    assert open_dataset(store, str(tmp_path / "classes")).id == report.dataset_id
    report = import_folder(store, tmp_path / "visits")
    assert (report.images, report.unlabelled, report.quarantined) == (3, 3, [])
    assert any("no classes of taxonomy 'colours', so these images have no label" in note for note in report.notes)


def test_an_archive_of_files_is_read_and_nothing_of_it_stays(store: Store, tmp_path: Path) -> None:
    for number, (code, colour) in enumerate(COLOURS.items()):
        (tmp_path / "data" / code).mkdir(parents=True)
        (tmp_path / "data" / code / "IM1").write_bytes(dicom(disk(colour, number), PatientName=MARK))
    report = import_folder(store, Path(shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path / "data")))
    assert (report.classes, report.quarantined) == (dict.fromkeys(COLOURS, 1), [])
    left = [path for path in store.home.root.rglob("*") if path.is_file() and MARK.encode() in path.read_bytes()]
    assert left == []


def test_files_at_the_top_and_files_that_are_refused_are_listed(store: Store, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    files = {"a.dcm": dicom(disk((1, 2, 3), 1)), "b": dicom(GREY, NumberOfFrames="3"), "c.dcm": shipped("reportsi.dcm"),
             "d.dcm": b"no DICOM"}  # fmt: skip
    for name, data in files.items():
        (tmp_path / "data" / name).write_bytes(data)
    report = import_folder(store, tmp_path / "data")
    assert (report.images, report.unlabelled, len(report.quarantined)) == (1, 1, 3)
    reasons = {refused.source_id: refused.reason for refused in report.quarantined}
    assert "holds 3 frames" in reasons["b"]
    assert "holds no image" in reasons["c.dcm"]
    assert set(reasons) == {"b", "c.dcm", "d.dcm"}
    with pytest.raises(DataError, match="not read in place; leave out --in-place"):
        import_folder(store, tmp_path / "data", in_place=True)


TEXT_TAGS = {
    "PatientName": MARK, "PatientID": f"{MARK}7", "OtherPatientIDs": MARK, "PatientBirthDate": "19440203",
    "PatientAddress": MARK, "InstitutionName": MARK, "ReferringPhysicianName": MARK, "OperatorsName": MARK,
    "AccessionNumber": MARK, "StudyDescription": MARK, "SeriesDescription": MARK, "PatientComments": MARK,
    "ImageComments": MARK, "DeviceSerialNumber": MARK, "StationName": MARK, "Manufacturer": MARK,
    "ManufacturerModelName": MARK, "ProtocolName": MARK, "BodyPartExamined": MARK, "StudyID": MARK,
    "TrackingID": MARK, "TrackingUID": f"1.2.3.{MARK}", "StudyInstanceUID": f"1.2.4.{MARK}",
    "SeriesInstanceUID": f"1.2.5.{MARK}", "IssuerOfPatientID": MARK, "DerivationDescription": MARK,
    "ContentDate": "20200309", "StudyDate": "20200309", "SoftwareVersions": MARK, "EthnicGroup": MARK,
}  # fmt: skip


def test_no_text_of_a_file_is_found_anywhere_in_the_home(
    store: Store, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    uid = "1.2.826.0.1.777777777"
    region = item(CodeValue=MARK, CodingSchemeDesignator=MARK, CodeMeaning=MARK)
    made = dataset_of(disk(COLOURS["plum"], 3), **TEXT_TAGS, SOPInstanceUID=uid, AnatomicRegionSequence=region)
    made.private_block(0x0009, MARK, create=True).add_new(1, "LO", MARK)
    broken = dataset_of(GREY, **TEXT_TAGS, NumberOfFrames="2")
    jpeg = jpeg_of(disk(COLOURS["plum"], 4), comment=MARK.encode())
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "one.dcm").write_bytes(file_of(made))
    (folder / "two.dcm").write_bytes(file_of(broken))
    (folder / "three.dcm").write_bytes(with_jpeg(COLOUR, jpeg, **TEXT_TAGS))
    (folder / f"{uid}.dcm").write_bytes(dicom(disk(COLOURS["amber"], 5), **TEXT_TAGS, SOPInstanceUID=uid))
    (folder / "t.csv").write_text(f"image_id,dx\none,plum\ntwo,plum\nthree,plum\n{uid}.dcm,amber\n")
    report = import_folder(store, folder)
    images = images_of(store)
    assert (report.images, len(report.quarantined)) == (3, 1)
    assert {image.age_years for image in images.values()} == {76}
    assert {image.localization for image in images.values()} == {None}
    assert any("3 body sites of DICOM files" in note for note in report.notes)
    store.ledger.close()
    for path in store.home.root.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            for secret in (MARK, uid, "19440203", "20200309"):
                assert secret.encode() not in data, path
                assert secret not in path.name
    said = "".join([*report.notes, *report.unlisted, report.layout, *(q.reason for q in report.quarantined)])
    assert MARK not in said + "".join(capfd.readouterr())


def test_names_that_quote_the_patient_are_hashed_part_by_part(store: Store, tmp_path: Path) -> None:
    uid = generate_uid()
    paths = {
        "DOE_JANE/visit 1/IM1": "/visit 1/IM1", "x/jane.dcm": "x/", "P7/IM2": "/IM2", "P70/IM3": "P70/IM3",
        f"y/{uid}.dcm": "y/", "z/IM4": "z/IM4",
    }  # fmt: skip
    for number, path in enumerate(paths):
        (tmp_path / "data" / path).parent.mkdir(parents=True, exist_ok=True)
        data = dicom(disk(COLOURS["plum"], number), PatientName="Doe^Jane", PatientID="P7", StudyInstanceUID=uid)
        (tmp_path / "data" / path).write_bytes(data)
    import_folder(store, tmp_path / "data")
    names = sorted(images_of(store))
    for kept in paths.values():
        assert any(kept in name for name in names), kept
    for secret in ("doe", "jane", "p7/", uid):
        assert not any(secret in name.lower() for name in names), names


def test_studies_without_patients_stay_together_and_placeholders_are_nobody(store: Store, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    studies = [generate_uid(), generate_uid()]
    for number in range(6):
        data = dicom(disk(COLOURS["plum"], number), PatientID=["", "ANONYMOUS", "0"][number % 3],
                     StudyInstanceUID=studies[number % 2])  # fmt: skip
        (tmp_path / "data" / f"i{number}.dcm").write_bytes(data)
    rows = "".join(f"i{number},{'plum' if number in (0, 1, 3, 5) else 'amber'}\n" for number in range(6))
    (tmp_path / "data" / "t.csv").write_text("image_id,dx\n" + rows)
    report = import_folder(store, tmp_path / "data")
    images = images_of(store)
    assert len({images[f"i{number}"].group_id for number in (0, 2, 4)}) == 1
    assert images["i0"].group_id != images["i1"].group_id
    # The first study has images of two classes, so it is no lesion; the second one is one.
    assert {images[f"i{number}"].lesion_id for number in (0, 2, 4)} == {None}
    assert len({images[f"i{number}"].lesion_id for number in (1, 3, 5)}) == 1
    assert any("1 studies hold images of several classes" in note for note in report.notes)
    assert any("6 DICOM files name no patient" in note for note in report.notes)


def test_the_table_says_more_than_the_tags(store: Store, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.dcm").write_bytes(
        dicom(disk(COLOURS["plum"], 1), PatientID="P1", PatientAge="050Y", PatientSex="M", BodyPartExamined="HAND")
    )
    (tmp_path / "data" / "t.csv").write_text("image_id,dx,age,sex,lesion_id\na,plum,33,,L1\n")
    import_folder(store, tmp_path / "data")
    image = images_of(store)["a"]
    assert (image.age_years, image.sex, image.localization, image.lesion_id) == (33, "male", "hand", "L1")
    with store.ledger.read() as tx:
        assert tx.find(Quarantined) == []
