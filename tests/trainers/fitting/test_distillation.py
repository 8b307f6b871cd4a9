"""Distillation: the loss is what it says, a student follows its teacher, and a run is the same after a kill."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from images.cache import PixelCache
from records.bundles import Bundle
from records.datasets import DatasetVersion, build_version
from records.errors import ConfigError, RefusedError
from records.frames import Frame
from records.ids import sha256_hex
from records.store import Store
from records.taxonomy import Taxonomy
from records.types import Split
from trainers.fitting.fit import fit
from trainers.fitting.loop import train
from trainers.fitting.run import run_folder
from trainers.fitting.training_data import TrainingData
from trainers.fitting.workers import SingleWorker
from trainers.optimization.distillation import Distillation, Lesson
from trainers.settings import LossSettings, ModelSettings, TrainersSettings, WorkersSettings
from vision.inference.loaded import plain_network, reference_logits


def test_the_loss_is_the_formula_and_parts_add_up() -> None:
    random = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 4, generator=random) for _ in range(2))
    labels, rows, partners = torch.tensor([0, 1, 2, 3, 0, 1]), np.arange(6), np.arange(6)[::-1].copy()
    settings = LossSettings(distill_share=0.3, distill_temperature=4.0)
    lesson = Distillation(Lesson("t", teacher.numpy()), settings)
    targets = torch.softmax(teacher / 4.0, 1)

    def by_hand(targets: torch.Tensor) -> torch.Tensor:
        apart = (targets * (targets.log() - torch.log_softmax(student / 4.0, 1))).sum(1).mean()
        return 0.7 * cross_entropy(student, labels) + 0.3 * 16.0 * apart

    whole = lesson.added(cross_entropy(student, labels), student, rows, None, 1.0)
    assert torch.allclose(whole, by_hand(targets))
    mixed = lesson.added(cross_entropy(student, labels), student, rows, partners, 0.25)
    assert torch.allclose(mixed, by_hand(0.25 * targets + 0.75 * targets.flip(0)))
    parts = [
        lesson.added(cross_entropy(student[at], labels[at]), student[at], rows[at], None, 1.0)
        for at in (slice(0, 3), slice(3, 6))
    ]
    assert torch.allclose(sum(parts) / 2, whole)


@pytest.fixture(scope="module")
def taught(toy_data: TrainingData) -> TrainingData:
    """The teacher calls every class by the next one's name."""
    logits = np.full((72, 3), -4.0, dtype=np.float32)
    logits[np.arange(72), (toy_data.labels[:72] + 1) % 3] = 4.0
    return replace(toy_data, lesson=Lesson("a" * 64, logits))


@pytest.fixture(scope="module")
def settings(toy_settings: TrainersSettings, tmp_path_factory: pytest.TempPathFactory) -> TrainersSettings:
    policy = tmp_path_factory.mktemp("policy") / "mixed.yaml"
    policy.write_text("name: mixed\noperations: []\nmixing: {kind: mixup, alpha: 0.4, probability: 0.5}\n")
    return toy_settings.with_values(
        {"loss.distill_share": 1.0, "augmentation": str(policy), "epochs": 6, "best_epoch_by": "even_loss"}
    )


def test_a_student_learns_what_its_teacher_says_and_goes_on_to_the_bit(
    settings: TrainersSettings, taught: TrainingData, three_classes: Taxonomy, tmp_path: Path
) -> None:
    whole = train(settings, taught, three_classes)
    reports = whole.reports
    assert reports[-1].train_loss < reports[0].train_loss
    # The last weights follow the teacher against the labels of val.
    assert reports[-1].val_accuracy < 0.2
    group = SingleWorker(tmp_path, use_gpu=False)
    train(settings, taught, three_classes, workers=group, pause_after=2)
    again = train(settings, taught, three_classes, workers=SingleWorker(tmp_path, use_gpu=False))
    assert [one.train_loss for one in again.reports] == [one.train_loss for one in reports]
    assert taught.lesson is not None
    for lesson in (None, replace(taught.lesson, teacher_id="b" * 64)):
        with pytest.raises(RefusedError, match="with another teacher"):
            train(
                settings, replace(taught, lesson=lesson), three_classes, workers=SingleWorker(tmp_path, use_gpu=False)
            )


FIT = TrainersSettings(
    model=ModelSettings(side_px=32),
    epochs=1,
    batch_size=16,
    precision="fp32",
    workers=WorkersSettings(threads=1, use_gpu=False),
    augmentation="none",
)


def test_a_fit_asks_a_teacher_of_another_side_and_records_it(
    filled_store: Store, make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    dataset = build_version(filled_store).version
    teacher = make_bundle(filled_store, "custom_cnn", 5, 48, dataset_id=dataset.id, views=4)
    bundle = fit(filled_store, FIT, dataset, run_dir=tmp_path, use_ray=False, distill_from=teacher)
    said = bundle.document.teacher
    assert said is not None
    assert (said.model_id, said.dataset_id) == (teacher.id, dataset.id)
    # Without the teacher's views, on the training images as they are.
    ids = [str(image_id) for image_id in dataset.split(Split.TRAIN)["image_id"]]
    pixels = PixelCache(filled_store.home.cache, Frame(48)).rows(ids).take(np.arange(len(ids)))
    parts = [
        reference_logits(plain_network(teacher), pixels[start : start + 64], teacher.document.geometry)
        for start in range(0, len(ids), 64)
    ]
    assert said.logits_sha256 == sha256_hex(np.concatenate(parts).tobytes())
    alone = run_folder(filled_store, FIT, dataset)
    assert run_folder(filled_store, FIT, dataset, distill_from=teacher) != alone
    _refusals(filled_store, dataset, teacher, tmp_path / "other")


def _refusals(store: Store, dataset: DatasetVersion, teacher: Bundle, run_dir: Path) -> None:
    def refused(error: type[Exception], words: str, settings: TrainersSettings, of: DatasetVersion, by: Bundle) -> None:
        with pytest.raises(error, match=words):
            fit(store, settings, of, run_dir=run_dir, use_ray=False, distill_from=by)
        assert not run_dir.exists()

    swapped = dataset.rows.assign(split=dataset.rows["split"].replace({"train": "val", "val": "train"}))
    refused(RefusedError, r"teacher .* holds out \(val\)", FIT, replace(dataset, id="d" * 64, rows=swapped), teacher)
    foreign = replace(teacher, document=teacher.document.model_copy(update={"taxonomy_hash": "0" * 64}))
    refused(Exception, "taxonomy", FIT, dataset, foreign)
    streamed = FIT.with_values({"workers.data_source": "stream"})
    refused(ConfigError, "data_source=cache", streamed, dataset, teacher)
