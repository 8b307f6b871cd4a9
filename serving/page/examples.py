"""Example images of the page: generated ones, and of other classes those that an operator says everybody may see.

In: the taxonomy, and a folder with `CODE.jpg` or `CODE/any.jpg` (`serving.page_examples`). Out: one small JPEG per
class, without metadata. No consent in the ledger allows that (`display` is for cases that a prediction is like), so the
folder is the operator's word for it; an image that was erased, or whose consent was lowered, is not shown all the same.
"""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path

from PIL import Image as PillowImage

from images.decode import decode_frame
from images.synth import SHARES
from images.synth import render as render_image
from records.errors import ImageError
from records.frames import Crop, Frame
from records.ids import sha256_hex
from records.images import strip_metadata
from records.progress import say
from records.store import Store
from records.taxonomy import Taxonomy
from records.types import Image

SIDE_PX = 320
_SEED = 2024
_SHOWN = "shown_"


def write_examples(
    folder: Path, taxonomy: Taxonomy, shown: Path | None = None, store: Store | None = None
) -> list[Path]:
    """Write at most one example per class.

    Args:
        folder: is created; a generated image that is there stays.
        taxonomy: its classes.
        shown: images that every visitor may see, for classes that cannot be generated.
        store: knows which images were erased or may not be used any more.
    Returns:
        Paths in class order; empty if there are no examples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # What was taken out of the folder is not shown any more.
    for before in folder.glob(f"{_SHOWN}*.jpg"):
        before.unlink()
    paths = []
    for code in taxonomy.codes:
        if code in SHARES:
            path = folder / f"generated_{code}.jpg"
            if not path.exists():
                path.write_bytes(render_image(code, seed=_SEED, width_px=SIDE_PX))
            paths.append(path)
        elif (image := _shown(shown, code, store)) is not None:
            path = folder / f"{_SHOWN}{code}.jpg"
            path.write_bytes(image)
            paths.append(path)
    return paths


def title_of(paths: list[Path]) -> str:
    """Return the words above the examples."""
    return "Examples" if any(path.name.startswith(_SHOWN) for path in paths) else "Generated examples"


def _shown(folder: Path | None, code: str, store: Store | None) -> bytes | None:
    """Return the first image of a class that can be read and may be shown, as a JPEG whose longer side is `SIDE_PX`."""
    for path in _files(folder, code):
        try:
            data = path.read_bytes()
            if store is not None and _is_withdrawn(store, sha256_hex(strip_metadata(data)), sha256_hex(data)):
                say(f"the example {path} is not shown: the image was erased or its consent was lowered")
                continue
            small = decode_frame(data, Frame(SIDE_PX, Crop.WHOLE).shown(SIDE_PX))
        except (ImageError, OSError) as error:
            say(f"the example {path} is not shown: {error}")
            continue
        file = io.BytesIO()
        # Encoded anew: without metadata, and small, whatever the file is.
        PillowImage.fromarray(small).save(file, "JPEG", quality=90)
        return file.getvalue()
    return None


def _files(folder: Path | None, code: str) -> Iterator[Path]:
    if folder is not None:
        yield from (path for path in sorted(folder.glob(f"{code}.*")) if path.is_file())
        yield from (path for path in sorted(folder.glob(f"{code}/*")) if path.is_file())


def _is_withdrawn(store: Store, *image_ids: str) -> bool:
    with store.ledger.read() as tx:
        found: Mapping[str, Image] = {one.id: one for name in image_ids for one in tx.find(Image, where={"id": name})}
    return any(image.erased_at is not None or image.consent_lowered_at is not None for image in found.values())
