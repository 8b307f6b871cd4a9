"""Make a data folder as people have them: drawings of cats, dogs and owls, one folder per class and no table."""

from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

FUR = {"cats": (200, 130, 60), "dogs": (110, 75, 50), "owls": (150, 150, 170)}


def make_folder(folder: Path, per_class: int = 20, seed: int = 0) -> None:
    """Write `folder/cats`, `folder/dogs` and `folder/owls`, each with `per_class` JPEG files."""
    random = np.random.default_rng(seed)
    for kind in FUR:
        (folder / kind).mkdir(parents=True)
        for number in range(per_class):
            draw(kind, random).save(folder / kind / f"{kind[:-1]}_{number:02d}.jpg", quality=92)


def write_taxonomy(path: Path) -> None:
    """Write a taxonomy of the three classes: none is malignant, and none is a key class."""
    classes = [{"code": kind, "name": kind.title(), "malignant": False} for kind in FUR]
    path.write_text(yaml.safe_dump({"name": "pets", "version": 1, "classes": classes}), encoding="utf-8")


def draw(kind: str, random: np.random.Generator) -> Image.Image:
    """Draw a head somewhere on a noisy ground, 160 x 120 px."""
    ground = random.normal(random.integers(120, 220), 10, size=(120, 160, 3)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(ground)
    pen = ImageDraw.Draw(image)
    x, y, r = 80 + int(random.integers(-15, 16)), 62 + int(random.integers(-8, 9)), int(random.integers(26, 38))
    fur = tuple(int(v) for v in np.clip(np.array(FUR[kind]) + random.integers(-25, 26, 3), 0, 255))
    for s in (-1, 1):
        if kind == "cats":
            pen.polygon([(x + s * r, y - r // 4), (x + s * r // 3, y - r), (x + s * r, y - r - r // 2)], fill=fur)
        elif kind == "dogs":
            pen.ellipse((x + s * r - r // 3, y - r // 2, x + s * r + r // 3, y + r), fill=(70, 45, 30))
    pen.ellipse((x - r, y - r, x + r, y + r), fill=fur)
    eye, iris = (r // 2, (250, 220, 90)) if kind == "owls" else (r // 6, (250, 250, 250))
    for s in (-1, 1):
        at = x + s * r // 2
        pen.ellipse((at - eye, y - eye - 2, at + eye, y + eye - 2), fill=iris)
        pen.ellipse((at - eye // 2 - 1, y - eye // 2 - 3, at + eye // 2 + 1, y + eye // 2 - 1), fill=(0, 0, 0))
    if kind == "owls":
        pen.polygon([(x - 4, y + 4), (x + 4, y + 4), (x, y + 14)], fill=(230, 140, 20))
    else:
        pen.ellipse((x - 5, y + r // 3, x + 5, y + r // 3 + 8), fill=(30, 20, 20))
    return image
