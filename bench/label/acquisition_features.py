"""Compute ImageNet features of all images of a dataset folder, for `acquisition_curves.py`.

.venv/bin/python -m bench.label.acquisition_features HAM10000_DIR features.npz
"""

import argparse
import csv
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from records.arrays import Float32Array
from trainers.fitting.starting import IMAGENET, starting_weights
from trainers.settings import ModelSettings
from vision.networks.registry import build_model

MODEL, SIDE_PX, BATCH, PART = "efficientnet_lite0", 112, 64, 512


def network() -> torch.nn.Module:
    """Return the network up to its pooled features: [N, 3, S, S] -> [N, 1280]."""
    start = starting_weights(ModelSettings(name=MODEL, side_px=SIDE_PX, weights=IMAGENET), 7, seed=0)
    assert start is not None
    whole = build_model(MODEL, 7)
    whole.load_state_dict({name: torch.from_numpy(value) for name, value in start.values.items()})
    return torch.nn.Sequential(*map(whole.get_submodule, ("features", "head.pool", "head.flatten"))).eval()


def features_of(paths: list[Path], bf16: bool) -> Float32Array:
    """Return the features [N, 1280] of some images, computed on one thread: each worker process has one core."""
    torch.set_num_threads(1)
    steps = [v2.Resize(SIDE_PX), v2.CenterCrop(SIDE_PX), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    # The published weights were trained on pixels from -1 to 1.
    transform = v2.Compose([*steps, v2.Normalize([0.5] * 3, [0.5] * 3)])
    number = torch.bfloat16 if bf16 else torch.float32
    features = network().to(number).to(memory_format=torch.channels_last)
    found: list[Float32Array] = []
    with torch.inference_mode():
        for at in range(0, len(paths), BATCH):
            images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths[at : at + BATCH]])
            pooled = features(images.to(dtype=number, memory_format=torch.channels_last))
            found.append(pooled.float().numpy())
    return np.concatenate(found)


def main() -> None:
    """Read the table and the images, write ids, lesions, diagnoses and features [N, 1280] sorted by id."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path, help="folder with HAM10000_metadata.csv and the JPEG files")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, for a processor that has it")
    options = parser.parse_args()
    with (options.images / "HAM10000_metadata.csv").open() as table:
        rows = sorted(csv.DictReader(table), key=lambda row: row["image_id"])
    paths = {path.stem: path for path in options.images.rglob("ISIC_*.jpg")}
    parts = [rows[at : at + PART] for at in range(0, len(rows), PART)]
    found: list[Float32Array] = []
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        parts_done = [
            pool.submit(features_of, [paths[row["image_id"]] for row in part], options.bf16) for part in parts
        ]
        for each in parts_done:
            found.append(each.result())
            print(f"{sum(map(len, found))} of {len(rows)}", file=sys.stderr, flush=True)
    np.savez(
        options.out,
        ids=np.array([row["image_id"] for row in rows]),
        lesions=np.array([row["lesion_id"] for row in rows]),
        labels=np.array([row["dx"] for row in rows]),
        features=np.concatenate(found),
    )


if __name__ == "__main__":
    main()
