"""Forget the decoded pixels of images that are gone from the store.

The rows of a cache's segments are blanked where they lie, so that readers which have the segment
mapped keep running; the id is blanked too, so that nobody finds the empty row.
"""

from collections.abc import Collection
from pathlib import Path

_ID_BYTES = 32


def forget_pixels(cache: Path, image_ids: Collection[str]) -> int:
    """Blank images in every pixel cache of a home.

    Args:
        cache: the cache folder of the home.
        image_ids: 64 hex characters each.
    Returns:
        How many rows were blanked; 0 if none of the images was ever decoded here.
    """
    wanted = {bytes.fromhex(image_id) for image_id in image_ids}
    blanked = 0
    for ids_path in sorted(cache.glob("*px-v*/*.ids")):
        ids = ids_path.read_bytes()
        pixels_path = ids_path.with_suffix(".u8")
        rows = [at for at in range(0, len(ids), _ID_BYTES) if ids[at : at + _ID_BYTES] in wanted]
        if not rows or not pixels_path.is_file():
            continue
        row_bytes = pixels_path.stat().st_size * _ID_BYTES // len(ids)
        for at in rows:
            _blank(pixels_path, at // _ID_BYTES * row_bytes, row_bytes)
            _blank(ids_path, at, _ID_BYTES)
        blanked += len(rows)
    return blanked


def _blank(path: Path, start: int, length: int) -> None:
    with path.open("r+b") as file:
        file.seek(start)
        file.write(bytes(length))
