"""What an interrupted import fetched is found again, unless it is damaged, and an erasure reaches it."""

from contextlib import suppress
from pathlib import Path

from images.fetched import fetched_for, forget_fetched
from records.ids import sha256_hex
from records.images import strip_metadata
from tests.images.test_layouts import photo


def interrupted(cache: Path, source: str, **kept: bytes) -> None:
    with suppress(KeyboardInterrupt), fetched_for(cache, source) as fetched:
        for key, data in kept.items():
            fetched.keep(key, data)
        raise KeyboardInterrupt


def test_what_was_fetched_is_found_until_the_import_ends(tmp_path: Path) -> None:
    interrupted(tmp_path, "one", a=b"1", b=b"22")
    next(tmp_path.glob("importing/one/b-*")).write_bytes(b"")
    with fetched_for(tmp_path, "one") as fetched:
        assert [fetched.find(key) for key in ("a", "b", "c")] == [b"1", None, None]
        fetched.keep("b", b"22")
    assert list(tmp_path.glob("importing/*")) == []
    interrupted(tmp_path, "one", a=b"1")
    interrupted(tmp_path, "two", a=b"2")
    assert [path.name for path in tmp_path.glob("importing/*")] == ["two"]


def test_an_erasure_reaches_them(tmp_path: Path) -> None:
    mine, other = photo(1), photo(2)
    interrupted(tmp_path, "one", a=mine, b=other, c=b"no image, so that its id cannot be told")
    assert forget_fetched(tmp_path, {sha256_hex(strip_metadata(mine))}) == 2
    with fetched_for(tmp_path, "one") as fetched:
        assert [fetched.find(key) for key in "abc"] == [None, other, None]
