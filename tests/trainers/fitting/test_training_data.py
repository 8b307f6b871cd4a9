"""Plans: train and val of a version, in order of id, and the pixels that belong to them."""

import pickle

import numpy as np
import pytest

from records.datasets import DatasetVersion, build_version
from records.errors import TaxonomyError
from records.store import Store
from records.stored import find_images, read_picture
from records.taxonomy import Taxonomy
from records.types import Side
from trainers.data.decode import decode_square
from trainers.fitting.training_data import plan_data


@pytest.fixture(scope="module")
def dataset(filled_store: Store) -> DatasetVersion:
    return build_version(filled_store).version


def test_a_plan_holds_train_and_val_and_nothing_else(filled_store: Store, dataset: DatasetVersion) -> None:
    plan = plan_data(dataset, filled_store.taxonomy)
    train, val = dataset.side(Side.TRAIN), dataset.side(Side.VAL)
    assert plan.image_ids == [*train["image_id"], *val["image_id"]]
    assert plan.num_train == len(train)
    assert [filled_store.taxonomy.codes[label] for label in plan.labels] == [*train["label"], *val["label"]]


def test_opening_a_plan_gives_the_pictures_of_its_rows(filled_store: Store, dataset: DatasetVersion) -> None:
    plan = pickle.loads(pickle.dumps(plan_data(dataset, filled_store.taxonomy)))
    data = plan.open(filled_store, 32)
    assert np.array_equal(np.sort(np.r_[data.train_index, data.val_index]), np.arange(len(plan.image_ids)))
    for row in (0, len(plan.image_ids) - 1):
        (image,) = find_images(filled_store, [plan.image_ids[row]])
        assert np.array_equal(data.pixels.take([row])[0], decode_square(read_picture(filled_store, image), 32))


def test_a_version_of_another_taxonomy_is_refused(dataset: DatasetVersion, three_classes: Taxonomy) -> None:
    with pytest.raises(TaxonomyError, match=f"dataset version {dataset.id[:12]} was made with taxonomy"):
        plan_data(dataset, three_classes)
