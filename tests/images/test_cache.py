"""The pixel cache: decodes only what is missing, gives back the same pixels, survives damage, opens fast."""

import errno
import logging
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest

from images.cache import PixelCache, SegmentWriter, blank_pixels
from images.decode import DECODE_VERSION, decode_frame
from images.importer import import_folder
from images.parallel import chunks_of
from images.synth import synthesize
from records.errors import ContractError, DataError, IntegrityError, UnavailableError, UnknownIdError
from records.frames import Crop, Frame
from records.ids import sha256_hex, utc_now
from records.store import Store, find_images, read_image
from records.types import Image


@pytest.fixture
def imported(store: Store, generated: Path) -> list[str]:
    """Ids of imported images, decoded at 64 px only."""
    import_folder(store, generated)
    with store.ledger.read() as tx:
        return [image.id for image in tx.find(Image, order_by=("id",))]


def fake_ids(count: int, start: int = 0) -> list[str]:
    return [sha256_hex(str(n).encode()) for n in range(start, start + count)]


def fake_rows(count: int, side_px: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, side_px, side_px, 3), dtype=np.uint8)


def test_two_frames_of_a_side_share_no_row(store: Store, imported: list[str]) -> None:
    caches = [PixelCache(store.home.cache, Frame(32, crop)) for crop in Crop]
    for cache in caches:
        assert cache.ensure(store, imported[:2]) == 2
    center, whole = (cache.pixels(imported[0]) for cache in caches)
    assert not np.array_equal(center, whole)
    (image,) = find_images(store, imported[:1])
    assert np.array_equal(whole, decode_frame(read_image(store, image), Frame(32, Crop.WHOLE)))
    assert blank_pixels(store.home.cache, imported[:1]) == 3, "the 64 px of the import, and these two"
    assert all(imported[0] not in PixelCache(store.home.cache, Frame(32, crop)) for crop in Crop)


def test_what_is_missing_is_decoded_once(store: Store, imported: list[str]) -> None:
    cache = PixelCache(store.home.cache, Frame(32))
    assert cache.ensure(store, imported[:20]) == 20
    assert cache.ensure(store, imported[:20]) == 0
    assert cache.ensure(store, imported) == len(imported) - 20
    assert PixelCache(store.home.cache, Frame(32)).ensure(store, imported) == 0


def test_sixty_new_images_decode_sixty(store: Store, imported: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "more"
    synthesize(folder, lesions=60, seed=99, width_px=80)
    lines = (folder / "HAM10000_metadata.csv").read_text().splitlines()
    (folder / "HAM10000_metadata.csv").write_text("\n".join(lines[:61]) + "\n")
    report = import_folder(store, folder, frames=(Frame(48),))
    assert report.decoded == report.new_images == 60
    with store.ledger.read() as tx:
        everything = [image.id for image in tx.find(Image)]
    assert len(everything) == len(imported) + 60
    assert PixelCache(store.home.cache, Frame(48)).ensure(store, everything) == len(imported)
    assert PixelCache(store.home.cache, Frame(64)).ensure(store, everything) == 0


def test_rows_are_the_decoded_images_in_the_asked_order(store: Store, imported: list[str]) -> None:
    cache = PixelCache(store.home.cache, Frame(40))
    cache.ensure(store, imported[:9])
    cache.ensure(store, imported[9:17])
    order = [imported[i] for i in (12, 3, 16, 0, 9)]
    rows = cache.rows(order)
    expected = [decode_frame(read_image(store, image), Frame(40)) for image in find_images(store, order)]
    assert len(rows) == 5
    assert np.array_equal(rows.take([0, 1, 2, 3, 4]), np.stack(expected))
    assert np.array_equal(rows.take(np.array([4, 4, 1])), np.stack([expected[4], expected[4], expected[1]]))
    assert rows.take([]).shape == (0, 40, 40, 3)
    taken = rows.take([0])
    taken[:] = 0
    assert np.array_equal(rows.take([0])[0], expected[0])


def test_the_key_holds_side_and_decode_version(tmp_path: Path) -> None:
    PixelCache(tmp_path, Frame(4)).append(fake_ids(2), fake_rows(2))
    assert [p.name for p in tmp_path.iterdir()] == [f"4px-v{DECODE_VERSION}"]
    assert len(PixelCache(tmp_path, Frame(8))) == 0


def test_rows_travel_as_paths(tmp_path: Path) -> None:
    cache = PixelCache(tmp_path, Frame(32))
    ids, pixels = fake_ids(50), fake_rows(50, 32)
    cache.append(ids, pixels)
    rows = cache.rows(ids)
    rows.take([0])
    sent = pickle.dumps(rows)
    assert len(sent) < 5_000
    assert np.array_equal(pickle.loads(sent).take(range(50)), pixels)


def test_two_writers_at_worst_store_a_row_twice(tmp_path: Path) -> None:
    ids, pixels = fake_ids(3), fake_rows(3)
    first, second = PixelCache(tmp_path, Frame(4)), PixelCache(tmp_path, Frame(4))
    first.append(ids, pixels)
    second.append(ids, pixels)
    assert second.missing(ids) == []
    assert len(first) == len(second) == len(PixelCache(tmp_path, Frame(4))) == 3
    assert np.array_equal(first.rows(ids).take([2, 0]), pixels[[2, 0]])


def test_ten_thousand_images_open_in_under_a_second(tmp_path: Path) -> None:
    writer = PixelCache(tmp_path, Frame(2))
    for part in range(10):
        writer.append(fake_ids(1000, 1000 * part), fake_rows(1000, 2, seed=part))
    ids = fake_ids(10_000)
    started = time.process_time()
    rows = PixelCache(tmp_path, Frame(2)).rows(ids)
    assert time.process_time() - started < 1.0
    assert np.array_equal(rows.take([9_999])[0], fake_rows(1000, 2, seed=9)[999])


@pytest.mark.parametrize("damage", ["cut off pixels", "longer pixels", "no pixels", "cut off ids", "empty ids"])
def test_a_damaged_segment_is_named_and_decoded_again(
    store: Store, imported: list[str], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = PixelCache(store.home.cache, Frame(16))
    cache.ensure(store, imported[:6])
    cache.ensure(store, imported[6:])
    ids_path = sorted(cache.folder.glob("*.ids"))[0]
    pixels_path = ids_path.with_suffix(".u8")
    if damage == "cut off pixels":
        os.truncate(pixels_path, pixels_path.stat().st_size - 1)
    elif damage == "longer pixels":
        pixels_path.write_bytes(pixels_path.read_bytes() + b"x")
    elif damage == "no pixels":
        pixels_path.unlink()
    else:
        os.truncate(ids_path, 40 if damage == "cut off ids" else 0)
    with caplog.at_level(logging.WARNING):
        damaged = PixelCache(store.home.cache, Frame(16))
    assert ids_path.stem in caplog.text
    assert "decoded again" in caplog.text
    assert damaged.missing(imported) == imported[:6]
    assert damaged.ensure(store, imported) == 6
    caplog.clear()
    assert PixelCache(store.home.cache, Frame(16)).missing(imported) == []
    assert not caplog.text


def test_leftovers_of_a_killed_writer_are_removed_when_old(store: Store, imported: list[str]) -> None:
    cache = PixelCache(store.home.cache, Frame(16))
    cache.ensure(store, imported[:2])
    old, young = cache.folder / "a.u8", cache.folder / ".b.u8.new"
    for path in (old, young):
        path.write_bytes(b"x" * 10)
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    assert PixelCache(store.home.cache, Frame(16)).ensure(store, imported[:3]) == 1
    assert not old.exists()
    assert young.exists()


def test_segments_are_written_while_the_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("images.cache.SEGMENT_BYTES", 10 * 48)
    cache = PixelCache(tmp_path, Frame(4))
    writer = SegmentWriter(cache)
    for n, image_id in enumerate(fake_ids(25)):
        writer.add([image_id], fake_rows(25)[n : n + 1])
    assert len(PixelCache(tmp_path, Frame(4))) == 20
    writer.flush()
    writer.flush()
    assert len(PixelCache(tmp_path, Frame(4))) == 25
    assert len(list(cache.folder.glob("*.u8"))) == 3


def test_what_was_decoded_before_an_error_is_kept(
    store: Store, imported: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("images.cache.chunks_of", lambda images: chunks_of(images, 8))
    store.blobs.delete(imported[20])
    cache = PixelCache(store.home.cache, Frame(24))
    with pytest.raises(UnknownIdError, match=imported[20][:12]):
        cache.ensure(store, imported)
    assert PixelCache(store.home.cache, Frame(24)).missing(imported) == imported[16:]


def test_errors_name_the_image(store: Store, copied: Path) -> None:
    import_folder(store, copied, in_place=True)
    with store.ledger.read() as tx:
        gone, altered = tx.find(Image, order_by=("id",), limit=2)
    cache = PixelCache(store.home.cache, Frame(20))
    path = next(copied.rglob(f"{gone.source_id}.jpg"))
    path.unlink()
    with pytest.raises(DataError, match=f"{gone.id[:12]} was imported in place and cannot be read"):
        cache.ensure(store, [gone.id])
    path = next(copied.rglob(f"{altered.source_id}.jpg"))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(IntegrityError, match=f"{altered.id[:12]}, imported in place, was altered"):
        cache.ensure(store, [altered.id])
    with pytest.raises(UnknownIdError, match="import it first"):
        cache.ensure(store, ["0" * 64])
    with pytest.raises(ContractError, match="call ensure first"):
        cache.rows([gone.id])
    with pytest.raises(ContractError, match="takes uint8"):
        cache.append(fake_ids(2), fake_rows(2, 8))


def test_an_image_that_was_erased_is_not_decoded(store: Store, imported: list[str]) -> None:
    cache = PixelCache(store.home.cache, Frame(20))
    with store.ledger.begin() as tx:
        tx.update(Image, imported[0], erased_at=utc_now())
    with pytest.raises(DataError, match=f"image {imported[0][:12]} was erased; load the dataset again"):
        cache.ensure(store, imported)
    cache.append([], fake_rows(0, 20))
    assert len(cache) == 0


def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PixelCache(tmp_path, Frame(8))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UnavailableError, match=r"pixel cache .*8px-v1 cannot be written \(No space left on device\); free"
    ):
        cache.append(["ab" * 32], np.zeros((1, 8, 8, 3), dtype=np.uint8))
    assert list(cache.folder.iterdir()) == []
    monkeypatch.undo()
    cache.append(["ab" * 32], np.zeros((1, 8, 8, 3), dtype=np.uint8))
    assert len(cache) == 1


def test_only_the_erased_image_is_blanked(tmp_path: Path) -> None:
    ids = [f"{i:064x}" for i in (1, 2, 3)]
    pixels = np.stack([np.full((4, 4, 3), i, dtype=np.uint8) for i in (1, 2, 3)])
    PixelCache(tmp_path, Frame(4)).append(ids, pixels)
    assert blank_pixels(tmp_path, [ids[1], 64 * "f"]) == 1
    assert blank_pixels(tmp_path, [ids[1]]) == 0
    cache = PixelCache(tmp_path, Frame(4))
    assert cache.missing(ids) == [ids[1]]
    assert np.array_equal(cache.rows([ids[0], ids[2]]).take([0, 1]), pixels[[0, 2]])
    assert bytes(pixels[1]) not in next(tmp_path.glob("*/*.u8")).read_bytes()
