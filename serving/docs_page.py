"""The page /docs: Swagger UI, as FastAPI has it, with its files served from here.

The page may load script and style from this service, run the one script that is written into it, and send requests to
this service; it loads nothing from another host. Its files are those of the package swagger-ui-dist, packed.
"""

import base64
import gzip
import hashlib
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources

VERSION = "5.35.0"
SHA256 = {
    "swagger-ui-bundle.js": "e6a898692f2d768e807c3ba4626068a69a2c5dd960dd6c76f3e4d3a3de180af2",
    "swagger-ui.css": "5ed08757e53da3e026d6cbecc61fe5d43585c9560b302d534ad56692519a273d",
}
"""Of the files as published, by name."""
_MEDIA_TYPES = {"js": "text/javascript", "css": "text/css"}
_FOLDER = resources.files("serving") / "swagger_ui"
_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Asset:
    """A file of the page."""

    packed: bytes
    media_type: str

    @property
    def content(self) -> bytes:
        """The file itself, for a caller that takes nothing packed."""
        return gzip.decompress(self.packed)


@cache
def assets() -> dict[str, Asset]:
    """Return the files of the page by name."""
    return {
        name: Asset((_FOLDER / f"{name}.gz").read_bytes(), _MEDIA_TYPES[name.rpartition(".")[2]]) for name in SHA256
    }


@cache
def example_image() -> str:
    """Return a small generated image as base64, with which the examples of the page work."""
    return "".join((_FOLDER / "example_image.txt").read_text().split())


def policy_of(html: str) -> str:
    """Return the Content-Security-Policy of the page: what it needs and no more.

    The script in the page is allowed by its hash. Images are the page's own icons (data:), the heat maps that it shows
    (blob:), and nothing from elsewhere. Swagger UI sets styles of elements by script, which needs no permission.
    """
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in _SCRIPT.findall(html)]
    scripts = " ".join(f"'sha256-{found}'" for found in hashes)
    return (
        f"default-src 'none'; script-src 'self' {scripts}; style-src 'self'; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
