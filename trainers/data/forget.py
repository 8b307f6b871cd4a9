"""Forget the decoded pixels of a picture that was erased.

The rows of a cache's segments are blanked where they lie, so that readers which have the segment
mapped keep running; the id is blanked too, so that nobody finds the empty row.
"""

from pathlib import Path

_ID_BYTES = 32


def forget_pixels(cache: Path, image_id: str) -> int:
    """Blank a picture in every pixel cache of a home.

    Args:
        cache: the cache folder of the home.
        image_id: 64 hex characters.
    Returns:
        How many rows were blanked; 0 if the picture was never decoded here.
    """
    wanted = bytes.fromhex(image_id)
    blanked = 0
    for ids_path in sorted(cache.glob("*px-v*/*.ids")):
        ids = ids_path.read_bytes()
        pixels_path = ids_path.with_suffix(".u8")
        rows = [at for at in range(0, len(ids), _ID_BYTES) if ids[at : at + _ID_BYTES] == wanted]
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
