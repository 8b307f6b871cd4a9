"""What a decoder process and its parent tell each other, and what neither takes on trust."""

import socket
import struct
import time
from collections.abc import Iterator

import numpy as np
import pytest

from images.decode import decode_frame
from images.decoder_pillow import Wanted, decode_here
from images.decoder_pool import DecoderPool, _arrays
from images.decoder_process import FAILED, PIXELS, _work, receive, send
from images.settings import ImagesSettings
from records.errors import UnavailableError
from records.frames import Crop, Frame
from records.images import strip_metadata
from tests import hostile_images as made
from tests.dicoms import dicom

SMALL = made.PLAIN["jpeg"]()
IMAGE = made.pattern()


def test_decoders_that_end_at_once_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("images.decoder_pool._BOOT", "raise SystemExit(1)")
    with pytest.raises(UnavailableError, match="decoder processes end before they get an image"):
        DecoderPool(ImagesSettings()).decode(strip_metadata(SMALL), Wanted(), 96 * 64)


def test_replies_of_a_decoder_that_was_taken_over_are_refused() -> None:
    body = memoryview(bytes(2 * 2 * 3))
    assert [part.shape for part in _arrays({"shapes": [[2, 2]]}, body, Wanted((Frame(2),)))] == [(2, 2, 3)]
    shown = Frame(2, Crop.WHOLE).shown(2)
    assert [part.shape for part in _arrays({"shapes": [[1, 2]]}, body[:6], Wanted((shown,)))] == [(1, 2, 3)]
    for shapes, frames in (
        ([[2, 2]], (Frame(3),)),
        ([[1, 2]], (Frame(2, Crop.WHOLE),)),
        ([[2, 3]], (shown,)),
        ([[2, 2]], (shown, shown)),
        ([[2, 2], [2, 2]], ()),
        ([[0, 2]], ()),
        ([], ()),
    ):
        with pytest.raises(UnavailableError, match="pixels of another size than asked for"):
            _arrays({"shapes": shapes}, body, Wanted(frames))
    with pytest.raises(UnavailableError, match="another number of pixels than it said"):
        _arrays({"shapes": [[2, 3]]}, body, Wanted())


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def test_messages_of_another_form_are_refused(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = ends
    send(one, b"X", {"name": "value"}, [b"abc", b"def"])
    kind, document, body = receive(other, 6)
    assert (kind, document, bytes(body)) == (b"X", {"name": "value"}, b"abcdef")
    for head, words in (
        (struct.pack("<cIQ", b"X", 2**17, 0), "larger than it may be"),
        (struct.pack("<cIQ", b"X", 2, 7), "larger than it may be"),
        (struct.pack("<cIQ", b"X", 2, 0) + b"{]", "cannot be read"),
    ):
        one.sendall(head)
        with pytest.raises(EOFError, match=words):
            receive(other, 6)
    with pytest.raises(TimeoutError, match="did not reply in time"):
        receive(other, 6, time.monotonic() - 1)
    one.close()
    with pytest.raises(EOFError, match="the other process ended"):
        receive(other, 6)


def test_what_a_decoder_replies(ends: tuple[socket.socket, socket.socket]) -> None:
    one, other = ends
    as_dicom = {"dicom": ImagesSettings().model_dump(mode="json")}
    squares = {"frames": [(8, "center", True)], "max_side_px": None}
    _work(one, decode_here, squares, strip_metadata(SMALL))
    kind, document, body = receive(other, 8 * 8 * 3)
    assert (kind, document) == (PIXELS, {"shapes": [[8, 8]], "tags": {}})
    assert np.array_equal(np.frombuffer(body, np.uint8).reshape(8, 8, 3), decode_frame(SMALL, Frame(8)))
    _work(one, decode_here, as_dicom, dicom(IMAGE[:8, :8], PatientAge="045Y"))
    kind, document, body = receive(other, 8 * 8 * 3)
    assert (kind, document["shapes"], document["tags"]["age_years"]) == (PIXELS, [[8, 8]], 45)
    assert bytes(body) == IMAGE[:8, :8].tobytes()
    _work(one, decode_here, as_dicom, dicom(IMAGE, BurnedInAnnotation="YES"))
    kind, document, _ = receive(other, 0)
    assert (kind, document["code"]) == (FAILED, "not_an_image")
    assert "text about the patient" in document["message"]

    def without_memory(*_: object) -> None:
        raise MemoryError

    _work(one, without_memory, squares, b"")
    assert receive(other, 0)[:2] == (FAILED, {"message": "", "code": "memory"})
