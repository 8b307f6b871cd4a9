"""Write the ImageNet features of every picture of a dataset folder, for `acquisition_curves.py`.

.venv/bin/python bench/acquisition_features.py HAM10000_DIR features.npz
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from trainers.models.registry import build_model
from trainers.models.weights import IMAGENET, starting_weights
from trainers.settings import TrainersSettings

MODEL, SIDE_PX, BATCH = "efficientnet_lite0", 112, 64


def network() -> torch.nn.Module:
    """Return the network up to its pooled features: [N, 3, S, S] -> [N, 1280]."""
    start = starting_weights(TrainersSettings(model=MODEL, side_px=SIDE_PX, weights=IMAGENET), 7)
    whole = build_model(MODEL, 7)
    whole.load_state_dict({name: torch.from_numpy(value) for name, value in start.values.items()})
    return torch.nn.Sequential(whole.features, whole.head.pool, whole.head.flatten).eval()


def main() -> None:
    """Read the table and the pictures, write ids, lesions, diagnoses and features [N, 1280] sorted by id."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", type=Path, help="folder with HAM10000_metadata.csv and the JPEG files")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, for a processor that has it")
    options = parser.parse_args()
    with (options.pictures / "HAM10000_metadata.csv").open() as table:
        rows = sorted(csv.DictReader(table), key=lambda row: row["image_id"])
    paths = {path.stem: path for path in options.pictures.rglob("ISIC_*.jpg")}
    steps = [v2.Resize(SIDE_PX), v2.CenterCrop(SIDE_PX), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    # The published weights were trained on pixels from -1 to 1.
    transform = v2.Compose([*steps, v2.Normalize([0.5] * 3, [0.5] * 3)])
    number = torch.bfloat16 if options.bf16 else torch.float32
    features = network().to(dtype=number, memory_format=torch.channels_last)
    found: list[np.ndarray] = []
    with torch.inference_mode():
        for at in range(0, len(rows), BATCH):
            part = [paths[row["image_id"]] for row in rows[at : at + BATCH]]
            pictures = torch.stack([transform(Image.open(path).convert("RGB")) for path in part])
            pooled = features(pictures.to(dtype=number, memory_format=torch.channels_last))
            found.append(pooled.float().numpy())
            print(f"{at + len(part)} of {len(rows)}", file=sys.stderr, flush=True)
    np.savez(
        options.out,
        ids=np.array([row["image_id"] for row in rows]),
        lesions=np.array([row["lesion_id"] for row in rows]),
        labels=np.array([row["dx"] for row in rows]),
        features=np.concatenate(found),
    )


if __name__ == "__main__":
    main()
