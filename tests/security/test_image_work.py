"""What one image file may cost: limits before any pixel is made, and decoder processes that can be killed."""

import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from bench.processes import command_line
from images.decode import decode_frame, decode_image
from images.decoder_pillow import _MAX_TRANSFORM_BYTES, Wanted, _Transforms, decode_here
from images.decoder_pool import DecoderPool, decoder_pool
from images.settings import ImagesSettings, limits_variable
from records.errors import ImageError
from records.frames import Frame
from records.images import MAX_CHUNKS, MAX_SEGMENTS, jpeg_segments, sniff, strip_metadata
from serving.predictor import MAX_COSTLY
from tests import hostile_images as made

SMALL = made.PLAIN["jpeg"]()
PIXELS = made.pattern()
# A pass over all pixels for each of its scans, which takes some seconds where these limits let it pass.
SLOW = made.progressive(3500, 2500, 950)
PASSES_SLOW = {"max_scans": 1000, "max_megasamples": 100_000}


def _many(part: bytes, count: int) -> bytes:
    return made.with_parts(SMALL, part * count)


def _jpeg_profile(size: int) -> bytes:
    body = made.srgb_profile(size)
    parts = [body[at : at + 60_000] for at in range(0, len(body), 60_000)]
    head = b"ICC_PROFILE\x00"
    return made.with_parts(
        SMALL, *(made.segment(0xE2, head + bytes([n + 1, len(parts)]) + part) for n, part in enumerate(parts))
    )


def _png_twice(name: str) -> bytes:
    header = made.chunk(b"IHDR", struct.pack(">IIBBBBB", 13_000, 13_000, 8, 6, 0, 0, 0))
    profile = made.chunk(b"iCCP", b"p\x00\x00" + zlib.compress(made.srgb_profile()))
    return made.png_of(PIXELS, *{"header": [header], "profile": [profile, profile]}[name])


COSTLY: dict[str, Callable[[], bytes]] = {
    "200 empty scans": lambda: made.progressive(64, 64, 200),
    "fewer scans of many pixels": lambda: made.progressive(5000, 5000, 80),
    "empty segments": lambda: _many(made.segment(0xFE), MAX_SEGMENTS),
    "empty tables": lambda: _many(made.segment(0xC4), MAX_SEGMENTS),
    "PNG chunks": lambda: made.png_of(PIXELS, made.chunk(b"IDAT", b"") * MAX_CHUNKS),
    "PNG texts": lambda: made.png_of(PIXELS, made.chunk(b"tEXt", b"a\x00b") * MAX_CHUNKS),
    "WebP chunks": lambda: made.webp(
        made.webp_canvas(8, 8), made.riff_chunk(b"JUNK", b"") * MAX_SEGMENTS, made.webp_still(8, 8)
    ),
    "chunks inside frames of a WebP": lambda: made.webp(
        made.webp_canvas(8, 8, 2),
        *[made.webp_frame(0, 0, 8, 8, made.riff_chunk(b"JUNK", b"") * 17 + made.webp_still(8, 8))],
    ),
    "JPEG profile": lambda: _jpeg_profile(5_000_000),
    "PNG profile that inflates": lambda: made.png_of(PIXELS, made.chunk(b"iCCP", b"p\x00\x00" + made.zeros(64))),
}
CONTRADICTORY: dict[str, Callable[[], bytes]] = {
    "two PNG headers": lambda: _png_twice("header"),
    "two PNG profiles": lambda: _png_twice("profile"),
    "two frame headers": lambda: made.with_parts(
        SMALL, made.segment(0xC0, b"\x08" + struct.pack(">HH", 1, 1) + b"\x01\x01\x11\x00")
    ),
    "a scan of fewer pixels than said": lambda: made.with_size(SMALL, 6000, 6000),
    "rows of fewer pixels than said": lambda: made.png(9000, 9000, b"\x00" * 100),
    "two images in a WebP": lambda: made.webp(made.webp_still(2, 2), made.webp_still(4000, 4000)),
    "a WebP larger than its canvas": lambda: made.webp(made.webp_canvas(2, 2), made.webp_still(4000, 4000)),
    "a frame outside the canvas": lambda: made.webp(
        made.webp_canvas(16, 16, 2), made.webp_frame(8, 0, 16, 16, made.webp_still(16, 16))
    ),
    "a frame with a larger image": lambda: made.webp(
        made.webp_canvas(16, 16, 2), made.webp_frame(0, 0, 16, 16, made.webp_still(4000, 4000))
    ),
}


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ImagesSettings]]:
    """Put limits into force for one test."""
    in_force: list[ImagesSettings] = []

    def put(**changes: float) -> ImagesSettings:
        in_force.append(ImagesSettings(**changes))  # type: ignore[arg-type]
        for name, text in limits_variable(in_force[-1]).items():
            monkeypatch.setenv(name, text)
        return in_force[-1]

    yield put
    for settings in in_force:
        decoder_pool(settings).close()


def _decoders() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [c for c in children if c.status() == psutil.STATUS_ZOMBIE or "decoder_process" in " ".join(command_line(c))]


@pytest.mark.parametrize("name", COSTLY)
def test_files_that_cost_more_than_their_pixels_are_refused(name: str) -> None:
    data = COSTLY[name]()
    for decode in (decode_image, lambda file: decode_frame(file, Frame(64))):
        with pytest.raises(ImageError, match="too costly to decode") as caught:
            decode(data)
        assert caught.value.code == "too_costly"


@pytest.mark.parametrize("name", CONTRADICTORY)
def test_files_that_contradict_themselves_are_refused(name: str) -> None:
    data = CONTRADICTORY[name]()
    tracemalloc.start()
    for read in (strip_metadata, decode_image):
        with pytest.raises(ImageError) as caught:
            read(data) if read is decode_image or "fewer" not in name else decode_image(data)
        assert caught.value.code == "damaged"
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert held < 16 * 2**20


def test_each_limit_can_be_set(limits: Callable[..., ImagesSettings]) -> None:
    many_scans = made.PLAIN["progressive"]()
    cases = [
        ({"max_megapixels": 0.001}, SMALL, "too_many_pixels"),
        ({"max_scans": 3}, many_scans, "too_costly"),
        ({"max_megasamples": 0.01}, SMALL, "too_costly"),
        ({"max_profile_kb": 1}, _jpeg_profile(2000), "too_costly"),
        ({"decoder_memory_mb": 64}, made.png(6000, 6000, b"".join([b"\x00" * 18_001] * 6000)), "too_costly"),
    ]
    for changes, data, code in cases:
        decode_image(made.PLAIN["webp"]())
        limits(**changes)
        with pytest.raises(ImageError) as caught:
            decode_image(data)
        assert caught.value.code == code
        limits()


@pytest.mark.parametrize("name", ["zTXt", "iTXt", "XMP", "eXIf", "raw profile"])
def test_metadata_that_inflates_or_is_large_is_never_read(name: str) -> None:
    bomb = made.zeros(100)
    block = {
        "zTXt": lambda: made.chunk(b"zTXt", b"Comment\x00\x00" + bomb),
        "iTXt": lambda: made.chunk(b"iTXt", b"Comment\x00\x01\x00\x00\x00" + bomb),
        "XMP": lambda: made.chunk(b"iTXt", b"XML:com.adobe.xmp\x00\x01\x00\x00\x00" + bomb),
        "eXIf": lambda: made.chunk(b"eXIf", b"MM\x00*\x00\x00\x00\x08\xff\xff" + bytes(2**20)),
        "raw profile": lambda: made.chunk(b"zTXt", b"Raw profile type exif\x00\x00" + bomb),
    }[name]()
    data = made.png_of(PIXELS, block)
    tracemalloc.start()
    whole = decode_image(data)
    held = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(whole, PIXELS)
    assert held < 16 * 2**20


@pytest.mark.parametrize("kind", ["too many rows", "other frames"])
def test_pixels_behind_the_image_are_not_decoded(kind: str, limits: Callable[..., ImagesSettings]) -> None:
    """Decoded with 64 MB at most, of which 256 MB of rows, or frames of a huge animation, would need a multiple."""
    if kind == "too many rows":
        rows = b"".join(b"\x00" + row.tobytes() for row in PIXELS)
        packer = zlib.compressobj(9)
        packed = packer.compress(rows) + b"".join(packer.compress(bytes(2**20)) for _ in range(256)) + packer.flush()
        header = made.chunk(b"IHDR", struct.pack(">IIBBBBB", PIXELS.shape[1], PIXELS.shape[0], 8, 2, 0, 0, 0))
        data = made.PNG_HEAD + header + made.chunk(b"IDAT", packed) + made.chunk(b"IEND", b"")
    else:
        frame = made.webp_frame(0, 0, 512, 512, made.webp_still(512, 512))
        data = made.webp(made.webp_canvas(512, 512, 2), made.riff_chunk(b"ANIM", bytes(6)), frame * 3000)
    limits(inline_megasamples=0, decoder_memory_mb=64, decoder_time_s=5)
    assert decode_image(data).shape == ((64, 96, 3) if kind == "too many rows" else (512, 512, 3))


def test_a_walk_stops_at_its_limit_and_lets_others_run() -> None:
    data = _many(made.segment(0xFE), 4_900_000)
    padded = made.with_parts(SMALL, b"\xff" * 20_000_000)
    ticks, ended = [0], threading.Event()

    def count() -> None:
        while not ended.wait(0.001):
            ticks[0] += 1

    with ThreadPoolExecutor(1) as pool:
        counting = pool.submit(count)
        walked = itertools.count()
        with pytest.raises(ImageError, match="more than"):
            list(zip(jpeg_segments(data), walked, strict=False))
        assert next(walked) == MAX_SEGMENTS
        before = ticks[0]
        for _ in range(20):
            with pytest.raises(ImageError, match="more than"):
                decode_frame(data, Frame(64))
        assert np.array_equal(decode_frame(padded, Frame(64)), decode_frame(SMALL, Frame(64)))
        assert ticks[0] > before
        ended.set()
        counting.result()


def test_colour_transforms_are_kept_up_to_a_number_of_bytes() -> None:
    kept = _Transforms()
    for padding in range(0, 3_000_000, 60_000):
        assert kept.find(made.srgb_profile(padding), "RGB") is not None
    assert kept._bytes <= _MAX_TRANSFORM_BYTES
    assert sum(size for _, size in kept._kept.values()) == kept._bytes
    assert 0 < len(kept._kept) < 20


@pytest.mark.parametrize("name", made.PLAIN)
def test_a_decoder_process_returns_the_same_pixels(name: str, limits: Callable[..., ImagesSettings]) -> None:
    data = made.PLAIN[name]()
    here = decode_image(data), decode_frame(data, Frame(24))
    pool = decoder_pool(limits(inline_megasamples=0))
    there = decode_image(data), decode_frame(data, Frame(24))
    assert pool.process_ids(), "nothing was decoded apart"
    assert all(np.array_equal(one, other) for one, other in zip(here, there, strict=True))
    broken = made.PNG_HEAD + made.png_of(PIXELS)[8:33] + made.chunk(b"IDAT", b"x\x9c" + bytes(200))
    with pytest.raises(ImageError) as caught:
        decode_image(broken + made.chunk(b"IEND", b""))
    assert caught.value.code == "damaged"


def test_processor_time_is_limited(limits: Callable[..., ImagesSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's limit alone: on a loaded machine a second of processor time may take minutes."""
    monkeypatch.setattr("images.decoder_pool.WALL_FACTOR", 600)
    limits(decoder_time_s=1, **PASSES_SLOW)
    with pytest.raises(ImageError, match="takes more than 1 s of processor time") as caught:
        decode_image(SLOW)
    assert caught.value.code == "too_costly"
    assert not _decoders(), "neither the process nor a zombie of it is left"


def test_wall_time_is_limited(limits: Callable[..., ImagesSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder that uses no processor time, here a stopped one, is ended as well."""
    monkeypatch.setattr("images.decoder_pool.WALL_FACTOR", 0.5)
    limits(decoder_time_s=16, inline_megasamples=0, **PASSES_SLOW)
    # The decoder has started before the image comes: on a loaded machine its imports alone may take longer than 8 s.
    decode_image(SMALL)
    with ThreadPoolExecutor(1) as threads:
        decoding = threads.submit(decode_image, SLOW)
        _working_decoder(decoding).send_signal(signal.SIGSTOP)
        with pytest.raises(ImageError, match="took longer than 8 s") as caught:
            decoding.result()
    assert caught.value.code == "too_costly"
    assert not _decoders(), "neither the process nor a zombie of it is left"


def test_memory_is_limited() -> None:
    """Called below the estimate that refuses such images beforehand: the kernel's limit holds by itself."""
    pool = DecoderPool(ImagesSettings(decoder_memory_mb=64))
    large = made.png(7000, 5000, b"".join([b"\x00" * 21_001] * 5000))
    try:
        with pytest.raises(ImageError, match="needs more than 64 MB of memory"):
            pool.decode(strip_metadata(large), Wanted(), 35_000_000)
        small = strip_metadata(made.PLAIN["png"]())
        assert np.array_equal(pool.decode(small, Wanted(), 96 * 64)[0], PIXELS), "the next image is decoded"
    finally:
        pool.close()


def test_a_killed_decoder_fails_only_its_image(limits: Callable[..., ImagesSettings]) -> None:
    limits(decoder_processes=2, inline_megasamples=0, decoder_time_s=60, **PASSES_SLOW)
    with ThreadPoolExecutor(4) as threads:
        culprit = threads.submit(decode_image, SLOW)
        victim = _working_decoder(culprit)
        others = [threads.submit(decode_frame, SMALL, Frame(24)) for _ in range(20)]
        victim.send_signal(signal.SIGKILL)
        with pytest.raises(ImageError, match="killed") as caught:
            culprit.result()
        assert caught.value.code == "too_costly"
        expected = decode_here(strip_metadata(SMALL), Wanted((Frame(24),)))[0]
        assert all(np.array_equal(other.result(), expected) for other in others)


def test_a_decoder_that_was_killed_while_it_waited_fails_no_image(limits: Callable[..., ImagesSettings]) -> None:
    limits(decoder_processes=1, inline_megasamples=0)
    for _ in range(3):
        decode_image(SMALL)
        (idle,) = _decoders()
        idle.kill()
    assert decode_image(SMALL).shape == (64, 96, 3)
    assert [d.status() != psutil.STATUS_ZOMBIE for d in _decoders()] == [True]


def test_threads_share_the_decoders(limits: Callable[..., ImagesSettings]) -> None:
    limits(decoder_processes=2, inline_megasamples=0)
    files = [made.PLAIN[name]() for name in made.PLAIN]
    expected = [decode_here(strip_metadata(data), Wanted((Frame(24),)))[0] for data in files]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda data: decode_frame(data, Frame(24)), files * 5))
    assert all(np.array_equal(one, other) for one, other in zip(found, expected * 5, strict=True))
    assert len(_decoders()) == 2


def test_a_forked_child_has_decoders_of_its_own(limits: Callable[..., ImagesSettings]) -> None:
    limits(decoder_processes=1, inline_megasamples=0)
    expected = decode_image(SMALL)
    before = [d.pid for d in _decoders()]
    program = os.fork()
    if program == 0:
        same = np.array_equal(decode_image(SMALL), expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]) == 0
    assert np.array_equal(decode_image(SMALL), expected)
    assert [d.pid for d in _decoders()] == before


_PARENT = """
import sys, threading
from pathlib import Path
from images.decode import decode_image
slow, small = (Path(name).read_bytes() for name in sys.argv[1:])
print(decode_image(small).shape, flush=True)
threading.Thread(target=decode_image, args=(slow,), daemon=True).start()
import psutil, time
while not (found := [c for c in psutil.Process().children() if c.cpu_times().user > 0.1]):
    time.sleep(0.05)
print(*(c.pid for c in found), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("end", ["killed", "exits"])
def test_decoders_end_with_their_parent_and_start_in_any_folder(end: str, tmp_path: Path) -> None:
    (tmp_path / "slow.jpg").write_bytes(SLOW)
    (tmp_path / "small.jpg").write_bytes(SMALL)
    # A folder that holds folders and modules named like ours and like those that we import.
    for name in ("images", "records", "numpy", "PIL"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the wrong one')")
    (tmp_path / "json.py").write_text("raise ImportError('the wrong one')")
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", _PARENT, "slow.jpg", "small.jpg"],
        cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **limits_variable(ImagesSettings(inline_megasamples=0, decoder_time_s=60, **PASSES_SLOW))},
    )  # fmt: skip
    assert parent.stdout is not None
    assert parent.stdin is not None
    assert parent.stdout.readline() == "(64, 96, 3)\n"
    decoders = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
    assert decoders
    if end == "killed":
        parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs(decoders, timeout=600)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]


def test_a_decoder_gets_no_secrets(limits: Callable[..., ImagesSettings], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELOOK_DATABASE", "postgresql://relook:secret@host/relook")
    limits(inline_megasamples=0)
    decode_image(SMALL)
    assert all("secret" not in json.dumps(decoder.environ()) for decoder in _decoders())


def test_only_the_decoder_opens_images() -> None:
    root = Path(__file__).resolve().parents[2]
    rooms = ("records", "images", "vision", "trainers", "tuning", "serving", "labeling", "cluster")
    calls = ("Image.open(", "cv2.imread(", "cv2.imdecode(", "decode_here(")
    found = {
        str(path.relative_to(root))
        for room in rooms
        for path in (root / room).rglob("*.py")
        if any(call in path.read_text() for call in calls)
    }
    assert found == {f"images/{name}.py" for name in ("decode", "decoder_dicom", "decoder_pillow", "decoder_process")}
    # The parser of DICOM files is imported in decoder processes only.
    import_it = {path.name for path in (root / "images").glob("*.py") if "decoder_dicom import" in path.read_text()}
    assert import_it == {"decoder_process.py"}


def _working_decoder(*decoding: "Future[Any]") -> psutil.Process:
    """Wait for a decoder process that is amid one of these images, by the processor time that it has used."""
    idle_s: dict[int, float] = {}
    while not all(one.done() for one in decoding):
        for decoder in _decoders():
            used_s = decoder.cpu_times().user
            if decoder.memory_info().rss > 60e6 and used_s > idle_s.setdefault(decoder.pid, used_s) + 0.1:
                return decoder
        time.sleep(0.02)
    raise AssertionError(f"no decoder was seen amid an image: {[one.exception() for one in decoding]}")


def _sent(service: Any, data: bytes) -> httpx.Response:
    headers = {"Content-Type": f"image/{sniff(data)}"}
    return httpx.post(f"{service.url}/v1/predictions", content=data, headers=headers, timeout=500)


@pytest.mark.parametrize("name", ["200 empty scans", "empty segments", "WebP chunks", "PNG profile that inflates"])
def test_the_service_refuses_costly_files_by_name(name: str, service: Any) -> None:
    response = _sent(service, COSTLY[name]())
    assert (response.status_code, response.json()["code"]) == (422, "too_costly")
    assert "too costly to decode" in response.json()["detail"]


@pytest.mark.parametrize("name", ["two PNG headers", "a frame with a larger image"])
def test_the_service_refuses_files_that_say_less_than_they_hold(name: str, service: Any) -> None:
    response = _sent(service, CONTRADICTORY[name]())
    assert (response.status_code, response.json()["code"]) == (422, "damaged")


@pytest.mark.slow
def test_costly_images_wait_for_each_other_and_not_for_others(
    service: Any, make_image: Callable[..., bytes], limits: Callable[..., ImagesSettings]
) -> None:
    limits(decoder_time_s=60, **PASSES_SLOW)
    count, slow = MAX_COSTLY + 2, made.progressive(3500, 2500, 60)
    with ThreadPoolExecutor(count) as threads:
        costly = [threads.submit(_sent, service, slow) for _ in range(count)]
        _working_decoder(*costly)
        honest = [_sent(service, make_image(number)).status_code for number in range(5)]
        still_waiting = sum(not one.done() for one in costly)
        codes = [one.result().status_code for one in costly]
    assert honest == [200] * 5
    assert still_waiting, "other images waited for the costly ones"
    assert set(codes) <= {200, 503}
    assert codes.count(503) <= count - MAX_COSTLY, "as many wait as the queue holds"
