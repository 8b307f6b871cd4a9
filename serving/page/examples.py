"""Generated images to try the page with, one per class."""

from pathlib import Path

from images.synth import render
from records.taxonomy import Taxonomy

_SEED = 2024


def write_examples(folder: Path, taxonomy: Taxonomy) -> list[Path]:
    """Draw one generated image per class, once.

    Args:
        folder: where they are kept.
        taxonomy: images are drawn for the classes that the generator knows.
    Returns:
        Their paths, in class order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for code in taxonomy.codes:
        path = folder / f"generated_{code}.jpg"
        if not path.exists():
            path.write_bytes(render(code, seed=_SEED, width_px=320))
        paths.append(path)
    return paths
