"""The classifier for scikit-learn: what `check_estimator` asks of classifiers, asked with images.

`check_estimator` itself feeds tables of numbers, so its checks that need no data run as they are, and the others are
written for images here.
"""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, GroupKFold, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import estimator_checks

import relook
from records.errors import ArgumentError, ConfigError, ImageError, IntegrityError, RefusedError, UnknownIdError
from trainers.classifier import RelookClassifier

SMALL = {"side_px": 32, "epochs": 2, "batch_size": 12, "settings": {"workers.threads": 1, "augmentation": "flips"}}
LABELS = np.array(["blue", "green", "red"])


def small(**changes: Any) -> RelookClassifier:
    return RelookClassifier(**{**SMALL, **changes})


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """[48, 32, 32, 3]: two noisy images of each of 24 lesions; the class is the brightest colour."""
    random = np.random.default_rng(5)
    pixels = random.integers(60, 120, size=(48, 32, 32, 3))
    pixels[np.arange(48), :, :, (np.arange(48) // 2) % 3] += 100
    return pixels.astype(np.uint8)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return LABELS[(np.arange(48) // 2) % 3]


@pytest.fixture(scope="module")
def lesions() -> np.ndarray:
    return np.arange(48) // 2


@pytest.fixture(scope="module")
def fitted(images: np.ndarray, labels: np.ndarray, lesions: np.ndarray) -> RelookClassifier:
    return small(epochs=6).fit(images, labels, groups=lesions)


@pytest.mark.parametrize(
    "check",
    [
        estimator_checks.check_estimator_cloneable,
        estimator_checks.check_estimator_repr,
        estimator_checks.check_estimator_tags_renamed,
        estimator_checks.check_get_params_invariance,
        estimator_checks.check_mixin_order,
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_parameters_default_constructible,
        estimator_checks.check_set_params,
        estimator_checks.check_valid_tag_types,
        estimator_checks.check_do_not_raise_errors_in_init_or_set_params,
    ],
    ids=lambda check: check.__name__,
)
def test_checks_of_scikit_learn_that_need_no_data(check: Callable[[str, Any], None]) -> None:
    check("RelookClassifier", RelookClassifier())


def test_it_learns_and_says_how_sure_it_is(
    fitted: RelookClassifier, images: np.ndarray, labels: np.ndarray, lesions: np.ndarray
) -> None:
    assert list(fitted.classes_) == ["blue", "green", "red"]
    probabilities = fitted.predict_proba(images)
    assert probabilities.shape == (48, 3)
    assert np.allclose(probabilities.sum(axis=1), 1)
    assert np.array_equal(fitted.predict(images), fitted.classes_[probabilities.argmax(axis=1)])
    assert fitted.score(images, labels) == np.mean(fitted.predict(images) == labels) > 0.9


def test_fitting_leaves_its_inputs_and_parameters_alone(images: np.ndarray, labels: np.ndarray) -> None:
    classifier, given, parameters = small(epochs=1), images.copy(), small(epochs=1).get_params()
    assert classifier.fit(images, labels) is classifier
    assert classifier.get_params() == parameters
    assert np.array_equal(images, given)
    state = {name for name in vars(classifier) if name not in parameters}
    assert all(name.endswith("_") for name in state), state


def test_equal_seeds_fit_equally_and_others_do_not(images: np.ndarray, labels: np.ndarray) -> None:
    first, again = (small(epochs=1).fit(images, labels).predict_proba(images) for _ in range(2))
    assert np.array_equal(first, again)
    # A second fit forgets the first one.
    used = small(epochs=1).fit(images[::-1], labels).fit(images, labels)
    assert np.array_equal(used.predict_proba(images), first)
    other = clone(used).set_params(random_state=1).fit(images, labels)
    assert not np.array_equal(other.predict_proba(images), first)


def test_a_prediction_depends_on_its_image_alone(fitted: RelookClassifier, images: np.ndarray) -> None:
    whole = fitted.predict_proba(images)
    assert fitted.predict_proba(images[::-1])[::-1] == pytest.approx(whole, abs=1e-5)
    assert np.concatenate([fitted.predict_proba(images[i : i + 1]) for i in range(5)]) == pytest.approx(
        whole[:5], abs=1e-5
    )
    assert fitted.predict_proba([]).shape == (0, 3)


def test_images_come_in_any_form(fitted: RelookClassifier, images: np.ndarray, tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for path, pixels in zip(paths, images, strict=False):
        Image.fromarray(pixels).save(path)
    expected = fitted.predict_proba(images[:4])
    forms = [
        paths, [str(path) for path in paths], np.array(paths, dtype=object), [path.read_bytes() for path in paths],
        [Image.fromarray(pixels) for pixels in images[:4]], list(images[:4]),
    ]  # fmt: skip
    for form in forms:
        assert np.array_equal(fitted.predict_proba(form), expected)


@pytest.mark.parametrize("kind", [np.int64, np.float64, np.bool_, object], ids=str)
def test_labels_may_be_of_any_type(kind: Any, images: np.ndarray) -> None:
    labels = (
        np.array(["x y", "Ü"], dtype=object)[np.arange(12) % 2] if kind is object else (np.arange(12) % 2).astype(kind)
    )
    classifier = small(epochs=1).fit(images[:12], labels)
    assert set(classifier.predict(images[:4]).tolist()) <= set(labels.tolist())
    assert classifier.predict(images[:4]).dtype == classifier.classes_.dtype


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, y: (x, None), "requires y to be passed"),
        (lambda x, y: (x[:5], y), "do not match"),
        (lambda x, y: (x, np.zeros(48)), "1 class"),
        (lambda x, y: (x[:1], y[:1]), "1 class"),
        (lambda x, y: (x, np.linspace(0, 1, 48)), "Unknown label type"),
        (lambda x, y: (x, np.array([np.nan, *np.zeros(47)])), "NaN"),
        (lambda x, y: (x, np.array([None, *y[1:]], dtype=object)), "label"),
        (lambda x, y: (x, np.stack([y, y], axis=1)), "1d array"),
        (lambda x, y: (x[[0, 2]], y[[0, 2]]), "nothing to validate with"),
    ],
)
def test_what_cannot_be_fitted_is_a_value_error(
    change: Callable[[Any, Any], tuple[Any, Any]], sentence: str, images: np.ndarray, labels: np.ndarray
) -> None:
    with pytest.raises(ValueError, match=sentence):
        small().fit(*change(images, labels))


def test_other_mistakes_are_errors_of_relook(images: np.ndarray, labels: np.ndarray) -> None:
    assert issubclass(ArgumentError, ValueError)
    for wrong in ({"epochs": 0}, {"network": "resnet1"}, {"validation_share": 1.5}, {"settings": {"epoch": 3}}):
        with pytest.raises(ConfigError):
            small(**wrong).fit(images, labels)
    with pytest.raises(ConfigError, match="one process"):
        small(settings={"workers.count": 2}).fit(images, labels)
    with pytest.raises(ImageError, match="image 1: "):
        small().fit([images[0], b"broken", *images[2:]], labels)
    with pytest.raises(ImageError, match=r"uint8 \[H, W, 3\]"):
        small().fit(np.random.default_rng(0).random((48, 4)), labels)
    for call in (small().predict, small().predict_proba):
        with pytest.raises(NotFittedError):
            call(images)


def test_no_lesion_is_on_both_sides_of_its_own_split(
    images: np.ndarray, labels: np.ndarray, lesions: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[set[int], set[int]]] = []

    def watched(settings: Any, data: Any, taxonomy: Any) -> Any:
        seen.append((set(lesions[data.train_index]), set(lesions[data.val_index])))
        return train(settings, data, taxonomy)

    from trainers.classifier import train

    monkeypatch.setattr("trainers.classifier.train", watched)
    small(epochs=1).fit(images, labels, groups=lesions)
    ((train_lesions, val_lesions),) = seen
    assert train_lesions.isdisjoint(val_lesions)
    assert (len(train_lesions), len(val_lesions)) == (18, 6)


def test_it_works_in_the_tools_of_scikit_learn(images: np.ndarray, labels: np.ndarray, lesions: np.ndarray) -> None:
    scores = cross_val_score(
        small(epochs=1), list(images), labels, groups=lesions, cv=GroupKFold(2), params={"groups": lesions}
    )
    assert scores.shape == (2,)
    brighter = FunctionTransformer(lambda x: np.minimum(np.asarray(x, dtype=np.int64) + 10, 255).astype(np.uint8))
    chain = make_pipeline(brighter, small(epochs=1)).fit(images, labels, relookclassifier__groups=lesions)
    assert chain.predict(images[:3]).shape == (3,)
    search = GridSearchCV(small(), {"epochs": [1], "settings": [SMALL["settings"]]}, cv=GroupKFold(2))
    assert search.fit(images, labels, groups=lesions).best_params_["epochs"] == 1
    both = cross_validate(small(epochs=1), images, labels, cv=2, scoring=["balanced_accuracy", "neg_log_loss"])
    assert np.isfinite(both["test_neg_log_loss"]).all()


def test_it_is_saved_without_pickle(fitted: RelookClassifier, images: np.ndarray, tmp_path: Path) -> None:
    path = fitted.save(tmp_path / "kept")
    assert sorted(file.suffix for file in path.iterdir()) == [".json", ".safetensors", ".safetensors"]
    found = RelookClassifier.load(path)
    assert np.array_equal(found.predict_proba(images), fitted.predict_proba(images))
    assert found.get_params() == fitted.get_params()
    assert found.classes_.dtype == fitted.classes_.dtype
    assert found.save(tmp_path / "again").name == path.name
    # The rest of Relook reads it, too.
    model = relook.load_model(path)
    assert [one.confidence for one in model.predict(images[:3])] == pytest.approx(
        fitted.predict_proba(images[:3]).max(axis=1), abs=0.02
    )
    assert relook.explain(model, images[0]).heat_map.shape == (512, 512)


def test_a_fitted_one_is_not_pickled_and_others_are(fitted: RelookClassifier) -> None:
    with pytest.raises(RefusedError, match=r"save\(folder\)"):
        pickle.dumps(fitted)
    assert pickle.loads(pickle.dumps(small(epochs=9))).epochs == 9


def test_a_foreign_or_altered_bundle_is_refused(fitted: RelookClassifier, tmp_path: Path) -> None:
    path = fitted.save(tmp_path)
    with pytest.raises(UnknownIdError, match="not a model bundle"):
        RelookClassifier.load(tmp_path)
    document = json.loads((path / "bundle.json").read_text())
    document["metrics"] = {}
    (path / "bundle.json").write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match="was altered"):
        RelookClassifier.load(path)
    with pytest.raises(ConfigError, match=r"relook\.load_model"):
        RelookClassifier.load(path.rename(tmp_path / "other"))
