"""Make a data folder that shares nothing with HAM10000: nine classes, its own columns, patients and its own split.

    python tests/e2e/nine_classes.py DIR        writes DIR/photos, DIR/register.csv and DIR/shapes.yaml

Classes are three shapes in three colours. Patients have one or two spots, spots one to three images, and the
split follows the patients. Three rows cannot be used: a file is missing, one is cut off, one class is unknown.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

SHAPES = ("disk", "ring", "cross")
COLOURS = {"red": (190, 40, 40), "green": (40, 150, 60), "blue": (50, 60, 190)}
CLASSES = [f"{colour}_{shape}" for colour in COLOURS for shape in SHAPES]
KEY_CLASS = "blue_cross"
COLUMNS = "image=file,dx=finding,lesion=spot,patient=person,split=fold,site=clinic"
COLUMN_NAMES = tuple(part.split("=")[1] for part in COLUMNS.split(","))
PATIENTS = 72
UNUSABLE = {"missing": "unknown_file", "unreadable": "cut_off", "unknown_class": "other_class"}


def make_folder(folder: Path, seed: int = 11) -> dict[str, str]:
    """Write the folder.

    Args:
        folder: to write into.
        seed: equal seeds give equal bytes.
    Returns:
        Name of every usable image to the split that the table gives.
    """
    random = np.random.default_rng(seed)
    photos = folder / "photos"
    photos.mkdir(parents=True)
    rows, spot = [], 0
    for person in range(PATIENTS):
        fold = ("train", "train", "train", "train", "val", "test")[person // len(CLASSES) % 6]
        for _ in range(1 + int(person % 3 == 0)):
            code = CLASSES[spot % len(CLASSES)] if person % 3 else CLASSES[person % len(CLASSES)]
            for view in range(int(random.integers(1, 4))):
                name = f"p{person:03d}_s{spot:03d}_{view}"
                paint(code, random).save(photos / f"{name}.png")
                rows.append((f"{name}.png", code, f"s{spot}", f"person {person}", fold, f"clinic {person % 2}"))
            spot += 1
    splits = {row[0]: row[4] for row in rows}
    first = rows[0][0]
    (photos / f"{UNUSABLE['unreadable']}.png").write_bytes((photos / first).read_bytes()[:200])
    for name, code in (("unknown_file", CLASSES[0]), ("cut_off", CLASSES[1]), ("other_class", "yellow_star")):
        rows.append((f"{name}.png", code, f"s_{name}", f"person {name}", "train", "clinic 0"))
    (photos / "other_class.png").write_bytes((photos / first).read_bytes())
    with (folder / "register.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMN_NAMES)
        writer.writerows(rows)
    (folder / "shapes.yaml").write_text(yaml.safe_dump(taxonomy(), sort_keys=False), encoding="utf-8")
    return splits


def taxonomy() -> dict[str, object]:
    """Return the document of the nine classes."""
    return {
        "name": "shapes",
        "version": 1,
        "classes": [
            {"code": code, "name": code.replace("_", " "), "malignant": code.startswith("blue"), "miss_cost": 1.0}
            for code in CLASSES
        ],
        "key_classes": [{"code": KEY_CLASS, "sensitivity_floor": 0.8}],
    }


def paint(code: str, random: np.random.Generator) -> Image.Image:
    """Paint a shape of a colour somewhere on a noisy ground, 96 x 72 px."""
    colour, shape = code.split("_")
    ground = random.normal(200, 12, size=(72, 96, 3)).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(ground)
    pen = ImageDraw.Draw(image)
    x, y = 48 + random.integers(-8, 9), 36 + random.integers(-6, 7)
    r = int(random.integers(18, 26))
    ink = tuple(int(v) for v in np.clip(np.array(COLOURS[colour]) + random.integers(-20, 21, 3), 0, 255))
    if shape == "disk":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
    elif shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), outline=ink, width=6)
    else:
        pen.line((x - r, y, x + r, y), fill=ink, width=8)
        pen.line((x, y - r, x, y + r), fill=ink, width=8)
    return image


if __name__ == "__main__":
    made = make_folder(Path(sys.argv[1]))
    sys.stdout.write(f"{len(made)} images; relook data import {sys.argv[1]} --columns {COLUMNS}\n")
