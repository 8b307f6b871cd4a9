"""Fixtures that images, vision and trainers share: bundles of networks with random weights, made once."""

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from images.importer import import_folder
from images.synth import synthesize
from records.arrays import UInt8Array
from records.bundles import (
    Architecture,
    Bundle,
    BundleDocument,
    Calibration,
    Geometry,
    OperatingPoints,
    write_bundle,
)
from records.frames import Frame
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.taxonomy import DiagnosisClass, KeyClass, Taxonomy
from trainers.fitting.training_data import TrainingData
from trainers.settings import ModelSettings, OptimizerSettings, TrainersSettings, WorkersSettings
from vision.inference.loaded import reference_logits
from vision.networks import MODELS, build_model

NETWORKS = [
    pytest.param(name, marks=() if name in ("custom_cnn", "mobilenet_v3", "squeezenet") else pytest.mark.soak)
    for name in MODELS
]
"""The catalogue: a test runs ours and two of torchvision's in the suite, and the deep ones with `make soak`."""


@pytest.fixture(scope="session")
def one_thread() -> None:
    """Two threads on a busy machine wait for each other: the same tests took four times as long."""
    torch.set_num_threads(1)


def random_network(name: str, num_classes: int, seed: int) -> nn.Module:
    """A network in evaluation mode; batch norm scales of both signs, as training can leave them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_model(name, num_classes).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, 0.7, generator=generator)
            nn.init.normal_(module.bias, 0.0, 0.5, generator=generator)
            nn.init.normal_(module.running_mean, 0.0, 0.5, generator=generator)
            nn.init.uniform_(module.running_var, 0.3, 2.0, generator=generator)
    classifier = getattr(network.features, "classifier", None)
    if classifier is not None:
        # Random class maps are often below zero everywhere; centred ones leave every class something to show.
        with torch.no_grad():
            classifier.bias -= network.features(torch.randn(8, 3, 64, 64, generator=generator)).mean(dim=(0, 2, 3))
    return network


@pytest.fixture(scope="session")
def make_network() -> Callable[..., nn.Module]:
    return random_network


@pytest.fixture(scope="session")
def model_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store that holds the shared bundles and nothing else."""
    opened = open_store(RecordsSettings(home=tmp_path_factory.mktemp("models") / "home"))
    yield opened
    opened.close()


def write_random_bundle(
    store: Store, name: str, seed: int = 0, side_px: int = 64, arrays: dict | None = None, **changes: object
) -> Bundle:
    taxonomy = store.taxonomy
    network = random_network(name, len(taxonomy.codes), seed)
    geometry = Geometry(side_px=side_px, mean=(0.7, 0.6, 0.5), std=(0.2, 0.25, 0.3))
    pixels = np.random.default_rng(seed).integers(0, 256, size=(4, side_px, side_px, 3), dtype=np.uint8)
    document = BundleDocument(
        taxonomy=taxonomy,
        taxonomy_hash=taxonomy.hash,
        architecture=Architecture(name=name),
        geometry=geometry,
        class_priors=dict.fromkeys(taxonomy.codes, 1 / 7),
        calibration=Calibration(temperature=2.0, bias=[0.1, 0.0, -0.1, 0.2, 0.0, -0.2, 0.0]),
        operating=OperatingPoints(),
        dataset_id="0" * 64,
        config={},
        code_version="test",
        num_threads=torch.get_num_threads(),
    ).model_copy(update=changes)
    weights = {key: value.numpy() for key, value in network.state_dict().items()}
    golden = {"inputs": pixels, "logits": reference_logits(network, pixels, geometry)}
    return write_bundle(store, document, weights, golden, arrays)


@pytest.fixture(scope="session")
def random_bundle(model_store: Store) -> Callable[..., Bundle]:
    """(architecture, seed, side_px) -> a bundle in `model_store`."""
    return lru_cache(maxsize=None)(
        lambda name, seed=0, side_px=64: write_random_bundle(model_store, name, seed, side_px)
    )


@pytest.fixture(scope="session")
def images_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated data folder in HAM10000's layout; not to be changed."""
    folder = tmp_path_factory.mktemp("images") / "data"
    synthesize(folder, lesions=60, seed=3, width_px=80)
    return folder


@pytest.fixture(scope="session")
def filled_store(images_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A store with the generated images imported and decoded at 32 px."""
    opened = open_store(RecordsSettings(home=tmp_path_factory.mktemp("filled") / "home"))
    import_folder(opened, images_folder, frames=(Frame(32),))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., Bundle]:
    """(store, architecture, seed, side_px, **document fields) -> a new bundle."""
    return write_random_bundle


class ArrayRows:
    """Decoded images in memory, for training without a store."""

    def __init__(self, pixels: UInt8Array) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: object) -> UInt8Array:
        return self.pixels[indices]


@pytest.fixture(scope="session")
def three_classes() -> Taxonomy:
    """A taxonomy of three classes, the last one the key class."""
    classes = [DiagnosisClass(code=code, name=code, malignant=code == "blue") for code in ("red", "green", "blue")]
    return Taxonomy(name="colours", version=1, classes=tuple(classes), key_classes=(KeyClass(code="blue"),))


@pytest.fixture(scope="session")
def toy_data() -> TrainingData:
    """72 noisy images of 32 px for training and 24 for validation; the class is the brightest colour."""
    random = np.random.default_rng(5)
    labels = np.arange(96) % 3
    pixels = random.integers(60, 140, size=(96, 32, 32, 3))
    pixels[np.arange(96), :, :, labels] += 60
    ids = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(96)]
    return TrainingData(ArrayRows(pixels.astype(np.uint8)), ids, labels, np.arange(72), np.arange(72, 96))


@pytest.fixture(scope="session")
def toy_settings() -> TrainersSettings:
    """Three short fp32 epochs on one thread."""
    return TrainersSettings(
        model=ModelSettings(name="custom_cnn", side_px=32),
        epochs=3,
        batch_size=24,
        precision="fp32",
        workers=WorkersSettings(threads=1, use_gpu=False),
        optimizer=OptimizerSettings(learning_rate=0.05),
        augmentation="flips",
    )
