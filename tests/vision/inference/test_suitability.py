"""Which images a bundle finds unsuitable, fitted on generated images and on planted features."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from images.appearance import MEASURES, SHARPNESS, appearance
from images.decode import decode_frame
from records.bundles import read_bundle
from records.errors import ContractError, IntegrityError
from records.frames import Frame
from trainers.fitting.suitability import reference_outputs
from vision.calibration.suitability import Described, fit_suitability, refusing_threshold
from vision.inference.loaded import load_model, plain_network
from vision.inference.suitability import NOTHING_KNOWN, QualityReason, assess, image_checks_of

SIDE_PX = 64


@pytest.fixture(scope="module")
def images(images_folder: Path):
    files = sorted(images_folder.rglob("ISIC_*.jpg"))
    return np.stack([decode_frame(path.read_bytes(), Frame(SIDE_PX)) for path in files])


@pytest.fixture(scope="module")
def checked(model_store, make_bundle, images):
    """A bundle whose suitability was fitted on half of the images as train and a quarter as val."""
    bare = make_bundle(model_store, "custom_cnn", seed=3)
    half, most = len(images) // 2, 3 * len(images) // 4
    train, val = (described(bare, part) for part in (images[:half], images[half:most]))
    document, arrays = fit_suitability(train, val, smallest_side_px=60)
    return make_bundle(model_store, "custom_cnn", seed=3, arrays=arrays, suitability=document)


def described(bundle, pixels):
    answers = reference_outputs(plain_network(bundle), pixels, bundle.document.geometry)
    return Described(pixels, answers.pooled, answers.early)


@pytest.fixture(scope="module")
def model(checked):
    return load_model(checked, precision="fp32")


def reasons_of(model, pixels, sides=None):
    return [image.quality_reason for image in assess(model.checks, model.predict(pixels), pixels, sides)]


def test_good_images_pass(model, images):
    unseen = images[3 * len(images) // 4 :]
    judged = assess(model.checks, model.predict(unseen), unseen, [60] * len(unseen))
    assert np.mean([image.quality_reason is not None for image in judged]) <= 0.1
    assert np.mean([image.is_out_of_distribution for image in judged]) <= 0.3
    assert all(image.quality_score <= 1.0 for image in judged)


def test_the_thresholds_refuse_at_most_a_twenty_fifth_of_val(model, images):
    val = images[len(images) // 2 : 3 * len(images) // 4]
    scores = model.predict(val).ood_scores
    assert (scores > 1.0).mean() <= 0.04
    assert scores.max() >= 1.0
    assert refusing_threshold(np.arange(1.0, 101.0), 0.05) == 95.0


def test_the_larger_of_two_distances_counts_and_an_older_bundle_has_one(checked, model, images):
    checks = model.checks
    few = images[-4:]
    answers = described(checked, few)
    late = checks.features.distance(answers.features) / checks.ood_threshold
    early = checks.early.distance(answers.early) / checks.early_threshold
    assert model.predict(few).ood_scores == pytest.approx(np.maximum(late, early), rel=1e-3)
    older = replace(checks, early=None, early_threshold=None)
    assert older.ood_scores(answers.features, None) == pytest.approx(late)
    with pytest.raises(ContractError, match="first convolution"):
        checks.ood_scores(answers.features, None)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda image: cv2.GaussianBlur(image, (0, 0), 4), QualityReason.BLURRED),
        (lambda image: (image * 0.1).astype(np.uint8), QualityReason.TOO_DARK),
        (lambda image: (255 - (255 - image) * 0.05).astype(np.uint8), QualityReason.TOO_BRIGHT),
    ],
)
def test_a_spoiled_image_is_reported_with_its_reason(model, images, spoil, reason):
    spoiled = np.stack([spoil(image) for image in images[-8:]])
    found = reasons_of(model, spoiled)
    assert sum(one is reason for one in found) >= 6, found
    spoiled_scores = [p.quality_score for p in assess(model.checks, model.predict(spoiled), spoiled)]
    good_scores = [p.quality_score for p in assess(model.checks, model.predict(images[-8:]), images[-8:])]
    assert np.mean(spoiled_scores) < 0 < np.mean(good_scores)


def test_noise_a_page_and_grey_are_no_images_of_skin(model, images):
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (SIDE_PX, SIDE_PX, 3)).astype(np.uint8)
    page = np.full((SIDE_PX, SIDE_PX, 3), 250, dtype=np.uint8)
    page[8:-8:4, 8:-8] = random.integers(0, 2, (12, 48, 1)) * 250
    grey = np.full((SIDE_PX, SIDE_PX, 3), 128, dtype=np.uint8)
    strange = np.stack([noise, page, grey, np.repeat(images[:1].mean(axis=3, keepdims=True), 3, axis=3)[0]])
    assert all(reason is not None for reason in reasons_of(model, strange.astype(np.uint8)))


def test_other_colours_are_another_kind_of_image(model, images):
    green = np.ascontiguousarray(images[-12:, :, :, [1, 0, 2]])
    found = reasons_of(model, green)
    assert all(reason is not None for reason in found)
    assert QualityReason.UNLIKE_TRAINING in found


def test_a_small_image_is_told(model, images):
    assert reasons_of(model, images[-2:], [59, 60]) == [QualityReason.TOO_SMALL, None]


def test_an_image_of_another_world_is_out_of_distribution(model):
    random = np.random.default_rng(1)
    noise = random.integers(0, 256, (6, SIDE_PX, SIDE_PX, 3)).astype(np.uint8)
    assert all(image.is_out_of_distribution for image in assess(model.checks, model.predict(noise), noise))


def test_a_batch_gives_what_its_images_give_alone(model, images):
    together = assess(model.checks, model.predict(images[:4]), images[:4], [70, 80, 90, 100])
    for row, side in enumerate((70, 80, 90, 100)):
        alone = images[row : row + 1]
        (single,) = assess(model.checks, model.predict(alone), alone, [side])
        assert single.quality_reason is together[row].quality_reason
        assert single.quality_score == pytest.approx(together[row].quality_score)
        assert single.ood_score == pytest.approx(together[row].ood_score, rel=1e-3)


def test_a_bundle_without_it_says_nothing(random_bundle, images):
    old = load_model(random_bundle("custom_cnn"), precision="fp32")
    output = old.predict(images[:3])
    assert (old.checks, output.ood_scores) == (None, None)
    assert assess(old.checks, output, images[:3]) == [NOTHING_KNOWN] * 3


def test_features_that_are_not_finite_are_out_of_distribution(model, images):
    output = model.predict(images[:2])
    output.ood_scores[0] = np.nan
    first, second = assess(model.checks, output, images[:2])
    assert (first.ood_score, first.is_out_of_distribution) == (None, True)
    assert second.ood_score is not None


def test_lengths_must_fit(model, images):
    with pytest.raises(ContractError, match="one length"):
        assess(model.checks, model.predict(images[:2]), images[:2], [60])


def test_the_bundle_is_whole_or_refused(checked, model_store, tmp_path, make_bundle):
    bundle = checked
    assert image_checks_of(read_bundle(bundle.path)).ood_threshold == bundle.document.suitability.ood_threshold
    import shutil

    cut = tmp_path / bundle.id
    shutil.copytree(bundle.path, cut)
    (cut / "suitability.safetensors").unlink()
    with pytest.raises(IntegrityError, match="was altered"):
        read_bundle(cut)
    renamed = cut.rename(tmp_path / "renamed")
    with pytest.raises(IntegrityError, match="do not belong together"):
        read_bundle(renamed)
    with pytest.raises(ContractError, match="or neither"):
        make_bundle(model_store, "custom_cnn", seed=3, suitability=bundle.document.suitability)


def test_appearance_is_finite_and_falls_with_blur(images):
    flat = np.zeros((1, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    assert np.isfinite(appearance(flat)).all()
    assert appearance(images[:3]).shape == (3, len(MEASURES))
    blurred = np.stack([cv2.GaussianBlur(image, (0, 0), 2) for image in images[:20]])
    assert (appearance(blurred)[:, SHARPNESS] < appearance(images[:20])[:, SHARPNESS]).all()
