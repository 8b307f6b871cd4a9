"""Foreign images are refused and images like the training ones are not, on real dermatoscopic images."""

from pathlib import Path

import numpy as np
import pytest

from images.decode import decode_frame
from records.frames import Frame
from trainers.fitting.suitability import reference_outputs
from vision.calibration.suitability import Described, fit_suitability
from vision.inference.loaded import load_model, plain_network
from vision.inference.suitability import assess

from .foreign import foreign_images

SIDE_PX = 64
NUM_TRAIN, NUM_VAL, NUM_UNSEEN, NUM_FOREIGN = 800, 400, 400, 200


@pytest.fixture(scope="module")
def lesions(ham10000: Path):
    files = sorted(ham10000.rglob("ISIC_*.jpg"))
    chosen = np.random.default_rng(0).permutation(len(files))[: NUM_TRAIN + NUM_VAL + NUM_UNSEEN]
    return np.stack([decode_frame(files[index].read_bytes(), Frame(SIDE_PX)) for index in chosen])


@pytest.fixture(scope="module")
def model(lesions, model_store, make_bundle):
    bare = make_bundle(model_store, "custom_cnn", seed=3)
    described = [
        Described(part, answers.pooled, answers.early)
        for part in (lesions[:NUM_TRAIN], lesions[NUM_TRAIN : NUM_TRAIN + NUM_VAL])
        for answers in [reference_outputs(plain_network(bare), part, bare.document.geometry)]
    ]
    document, arrays = fit_suitability(*described, smallest_side_px=150)
    return load_model(make_bundle(model_store, "custom_cnn", seed=3, arrays=arrays, suitability=document))


def refused(model, pixels):
    judged = assess(model.checks, model.predict(pixels), pixels)
    return np.array([one.is_out_of_distribution or one.quality_reason is not None for one in judged])


def test_nineteen_of_twenty_foreign_images_are_refused(model):
    images, kinds = foreign_images(SIDE_PX, NUM_FOREIGN)
    is_refused = refused(model, images)
    by_kind = {kind: float(is_refused[np.array(kinds) == kind].mean()) for kind in set(kinds)}
    assert len(by_kind) == 10
    assert is_refused.mean() >= 0.95, by_kind


def test_one_in_twenty_of_val_is_refused_at_most(model, lesions):
    assert refused(model, lesions[NUM_TRAIN : NUM_TRAIN + NUM_VAL]).mean() <= 0.05
    # Unseen images are refused about as often: twice the share would be 4 standard errors away.
    assert refused(model, lesions[-NUM_UNSEEN:]).mean() <= 0.10
