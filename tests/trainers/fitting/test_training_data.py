"""Plans: train and val of a version, in order of id, and the pixels that belong to them."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from images.decode import decode_frame
from records.datasets import DatasetVersion, build_version
from records.errors import ContractError, TaxonomyError
from records.frames import Frame
from records.store import Store, find_images, read_image
from records.taxonomy import Taxonomy
from records.types import Split
from trainers.fitting.training_data import TrainingData, evenly_spaced, pixel_statistics, plan_data
from trainers.optimization.distillation import Lesson


@pytest.fixture(scope="module")
def dataset(filled_store: Store) -> DatasetVersion:
    return build_version(filled_store).version


def test_a_plan_holds_train_and_val_and_nothing_else(filled_store: Store, dataset: DatasetVersion) -> None:
    plan = plan_data(dataset, filled_store.taxonomy)
    train, val = dataset.split(Split.TRAIN), dataset.split(Split.VAL)
    assert plan.image_ids == [*train["image_id"], *val["image_id"]]
    assert plan.num_train == len(train)
    assert [filled_store.taxonomy.codes[label] for label in plan.labels] == [*train["label"], *val["label"]]


def test_opening_a_plan_gives_the_images_of_its_rows(filled_store: Store, dataset: DatasetVersion) -> None:
    plan = pickle.loads(pickle.dumps(plan_data(dataset, filled_store.taxonomy)))
    data = plan.open(filled_store, Frame(32))
    assert np.array_equal(np.sort(np.r_[data.train_index, data.val_index]), np.arange(len(plan.image_ids)))
    for row in (0, len(plan.image_ids) - 1):
        (image,) = find_images(filled_store, [plan.image_ids[row]])
        assert np.array_equal(data.pixels.take([row])[0], decode_frame(read_image(filled_store, image), Frame(32)))


def test_a_version_of_another_taxonomy_is_refused(dataset: DatasetVersion, three_classes: Taxonomy) -> None:
    with pytest.raises(TaxonomyError, match=f"dataset version {dataset.id[:12]} was made with taxonomy"):
        plan_data(dataset, three_classes)


def test_a_limited_plan_has_whole_groups_and_all_of_val(filled_store: Store, dataset: DatasetVersion) -> None:
    plan = plan_data(dataset, filled_store.taxonomy)
    small, smaller = plan.limited(plan.num_train // 2), plan.limited(plan.num_train // 3)
    left_out = set(plan.group_ids[: plan.num_train]) - set(small.group_ids[: small.num_train])

    assert 0 < smaller.num_train < small.num_train <= plan.num_train // 2 + len(filled_store.taxonomy.codes)
    assert set(smaller.image_ids) < set(small.image_ids)
    assert left_out.isdisjoint(small.group_ids)
    assert small.image_ids[small.num_train :] == plan.image_ids[plan.num_train :]
    labels = dict(zip(plan.image_ids, plan.labels, strict=True))
    assert [labels[image_id] for image_id in small.image_ids] == small.labels.tolist()
    assert plan.limited(None) is plan is plan.limited(plan.num_train)


def test_a_plan_without_groups_cannot_be_limited(filled_store: Store, dataset: DatasetVersion) -> None:
    plan = replace(plan_data(dataset, filled_store.taxonomy), group_ids=[])
    with pytest.raises(ContractError, match="a plan without groups cannot be limited"):
        plan.limited(10)


def test_parts_are_disjoint_groups_that_together_are_all_of_train(filled_store: Store, dataset: DatasetVersion) -> None:
    whole = plan_data(dataset, filled_store.taxonomy)
    parts = [whole.part(number, 3) for number in (1, 2, 3)]
    trained = [part.image_ids[: part.num_train] for part in parts]
    assert sorted(image_id for ids in trained for image_id in ids) == sorted(whole.image_ids[: whole.num_train])
    groups = [set(part.group_ids[: part.num_train]) for part in parts]
    assert all(groups)
    assert not groups[0] & groups[1] | groups[1] & groups[2] | groups[0] & groups[2]
    label_of = dict(zip(whole.image_ids, whole.labels, strict=True))
    for part in parts:
        assert part.image_ids[part.num_train :] == whole.image_ids[whole.num_train :]
        assert [label_of[image_id] for image_id in part.image_ids] == list(part.labels)
    assert whole.part(1, 1) is whole


def test_a_plan_keeps_its_teacher_however_it_is_opened(filled_store: Store, dataset: DatasetVersion) -> None:
    plan = plan_data(dataset, filled_store.taxonomy)
    logits = np.zeros((plan.num_train, len(filled_store.taxonomy.codes)), dtype=np.float32)
    taught = replace(plan, lesson=Lesson("a" * 64, logits))
    assert taught.open(filled_store, Frame(32)).lesson is taught.lesson
    assert taught.stream(filled_store, Frame(32)).lesson is taught.lesson
    for smaller in (lambda: taught.limited(10), lambda: taught.part(1, 2)):
        with pytest.raises(ContractError, match="before a teacher is asked"):
            smaller()


def test_statistics_are_those_of_the_training_images(toy_data: TrainingData) -> None:
    mean, std = pixel_statistics(toy_data.pixels, toy_data.train_index)
    values = toy_data.pixels.take(toy_data.train_index).astype(np.float64) / 255.0
    assert mean == pytest.approx(values.mean(axis=(0, 1, 2)), abs=1e-6)
    assert std == pytest.approx(values.std(axis=(0, 1, 2)), abs=1e-6)


def test_order_does_not_matter(toy_data: TrainingData) -> None:
    assert pixel_statistics(toy_data.pixels, np.arange(9)) == pixel_statistics(toy_data.pixels, np.arange(9)[::-1])


def test_one_colour_has_a_deviation_that_can_be_divided_by() -> None:
    class Flat:
        def __len__(self) -> int:
            return 2

        def take(self, indices: object) -> np.ndarray:
            return np.full((2, 4, 4, 3), 51, dtype=np.uint8)

    assert pixel_statistics(Flat(), np.arange(2)) == ((0.2, 0.2, 0.2), (0.001, 0.001, 0.001))


def test_evenly_spaced_rows() -> None:
    assert evenly_spaced(np.array([9, 1, 5]), 8).tolist() == [1, 5, 9]
    assert evenly_spaced(np.arange(101), 3).tolist() == [0, 50, 100]
