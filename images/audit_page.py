"""The audit as one HTML page with example images: what would go wrong first, then the figures.

The page holds images, so no erasure reaches it; it says so at its end.
"""

import base64
import io
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from PIL import Image as PillowImage

from images.audit import FEW_LESIONS, AuditReport
from images.cache import PixelCache
from images.near_duplicates import HASH_FRAME
from records.datasets import DatasetVersion
from records.durable import make_folders, write_file
from records.store import Store, find_images

_EXAMPLES = 6
_PAIRS = 12


def write_audit_page(store: Store, dataset: DatasetVersion, report: AuditReport, path: Path) -> None:
    """Write an audit as a page; an older page is replaced.

    Args:
        store: its 64 px cache has the images, since the audit read them.
        dataset: the version.
        report: its audit.
        path: of the HTML file.
    """
    images = find_images(store, dataset.rows["image_id"].tolist())
    id_of = {image.source_id or image.id: image.id for image in images}
    cache = PixelCache(store.home.cache, HASH_FRAME)

    def example(image_id: str) -> str:
        buffer = io.BytesIO()
        PillowImage.fromarray(cache.pixels(image_id)).save(buffer, "PNG")
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    by_class = dataset.rows.groupby("label")["image_id"].apply(lambda ids: ids.head(_EXAMPLES).tolist())
    pairs = sorted(report.near_duplicates, key=lambda pair: pair.same_diagnosis)[:_PAIRS]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = resources.files("images").joinpath("audit.html").read_text(encoding="utf-8")
    html = environment.from_string(template).render(
        report=report,
        few=FEW_LESIONS,
        examples={code: [example(image_id) for image_id in by_class.get(code, [])] for code in report.classes},
        pairs=[(pair, example(id_of[pair.first]), example(id_of[pair.second])) for pair in pairs],
        outliers=[(one, example(id_of[one.image])) for one in report.quality_outliers[:_PAIRS]],
    )
    make_folders(path.parent, sync=False)
    write_file(path, html, sync=False)
