"""Transfer syntaxes that nothing here decodes: each is refused by its name, with what would decode it."""

import numpy as np
import pytest
from pydicom.encaps import encapsulate

from images.decoder_dicom import decode_dicom
from images.settings import ImagesSettings
from records.errors import ImageError
from tests.dicoms import dataset_of, file_of

GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    ("syntax", "words"),
    [
        ("1.2.840.10008.1.2.4.57", r"JPEG Lossless, .*\(Process 14\); save .* pip install python-gdcm$"),
        ("1.2.840.10008.1.2.4.70", r"JPEG Lossless, .* \(Process 14 .*; save .* pip install python-gdcm$"),
        ("1.2.840.10008.1.2.4.81", "JPEG-LS Lossy .*; save .* pip install pyjpegls$"),
        ("1.2.840.10008.1.2.4.202", "High-Throughput JPEG 2000 .* pip install pylibjpeg pylibjpeg-openjpeg$"),
        ("1.2.840.10008.1.2.4.92", "JPEG 2000 Part 2 .*; save it in Explicit VR Little Endian, JPEG Baseline, .* RLE$"),
        ("1.2.840.10008.1.2.4.100", r"is a video \(MPEG2 Main Profile .*export the frame that matters"),
        ("1.2.840.10008.1.2.4.102", r"is a video \(MPEG-4 AVC/H.264 High Profile .*export the frame that matters"),
        ("1.2.840.10008.1.2.4.107", r"is a video \(HEVC/H.265 Main Profile .*export the frame that matters"),
        ("1.2.840.10008.1.2.7.1", r"is a video \(SMPTE ST 2110-20 .*export the frame that matters"),
    ],
)
def test_a_syntax_that_nothing_here_decodes_is_refused_by_its_name(syntax: str, words: str) -> None:
    made = dataset_of(GREY, NumberOfFrames="30" if "is a video" in words else "1")
    made.file_meta.TransferSyntaxUID = syntax
    made.PixelData = encapsulate([b"\x00\x01" * 40])
    made["PixelData"].is_undefined_length = True
    with pytest.raises(ImageError, match=words) as raised:
        decode_dicom(file_of(made), ImagesSettings())
    assert raised.value.code == "not_an_image"
