"""A classifier with scikit-learn's interface, for people who compare: the network, training loop and calibration here.

In: images (paths, bytes, Pillow images or arrays) and labels. Out: classes and calibrated probabilities. It needs no
home, imports nothing into one and splits off its own validation images, whole groups at a time. What a home adds is
not here: the gate, triage, near-duplicates and dataset versions.

    scores = cross_val_score(RelookClassifier(epochs=5), paths, labels, groups=lesions, cv=GroupKFold(5))
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import assert_all_finite, check_is_fitted, column_or_1d

from images.decode import decode_frame
from images.given import GivenImage, given_list, given_name, image_bytes
from records.arrays import FloatArray, IntArray, UInt8Array
from records.bundles import Architecture, BundleDocument, OperatingPoints, read_bundle, write_bundle_in
from records.durable import make_folders
from records.errors import ArgumentError, ConfigError, ImageError, RefusedError
from records.frames import Frame
from records.ids import hash_of, sha256_hex
from records.settings import first_problem
from records.taxonomy import DiagnosisClass, Taxonomy
from trainers.fitting.loop import train
from trainers.fitting.training_data import TrainingData
from trainers.fitting.workers import compute_threads
from trainers.settings import TrainersSettings
from vision.calibration.decision import decision_rule, labels_of
from vision.calibration.scaling import apply_calibration, fit_calibration
from vision.inference.golden import golden_arrays
from vision.inference.loaded import plain_network, reference_logits
from vision.networks import MODELS

_BATCH = 64
_KIND = "scikit-learn"


class RelookClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc] # scikit-learn has no annotations
    """An image classifier for scikit-learn's tools.

    Args:
        network: name of the network, see `relook catalog models`.
        side_px: side of the squares that it sees.
        epochs: passes over the training images.
        batch_size: images per optimizer step.
        validation_share: share of each class's groups that is split off to choose the epoch and to calibrate.
        random_state: of everything random.
        settings: further settings of `trainers` by dotted names, such as `{"optimizer.momentum": 0.9}`.
    """

    def __init__(
        self,
        network: str = "custom_cnn",
        side_px: int = 64,
        epochs: int = 12,
        batch_size: int = 64,
        validation_share: float = 0.2,
        random_state: Any = 0,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.network = network
        self.side_px = side_px
        self.epochs = epochs
        self.batch_size = batch_size
        self.validation_share = validation_share
        self.random_state = random_state
        self.settings = settings

    def fit(self, X: Iterable[GivenImage], y: Any, groups: Any = None) -> Self:  # noqa: N803
        """Train the network and calibrate it.

        Args:
            X: N images: paths, bytes of files, Pillow images, or arrays uint8 [H, W, 3]; or one array [N, H, W, 3].
            y: [N] labels of any type that scikit-learn takes.
            groups: [N] lesion or patient of each image: no group is on both sides of the validation split.
        Returns:
            The classifier.
        Raises:
            ArgumentError: lengths differ, there is one class, or nothing is left to validate with.
            ConfigError: a parameter cannot work.
            ImageError: an image cannot be read.
        """
        images = given_list(X)
        targets = _targets(y)
        members = np.arange(len(images)) if groups is None else column_or_1d(groups)
        if not len(images) == len(targets) == len(members):
            raise ArgumentError(f"{len(images)} images, {len(targets)} labels and {len(members)} groups do not match")
        classes, labels = np.unique(targets, return_inverse=True)
        if len(classes) < 2:
            raise ArgumentError(f"a classifier needs images of two classes, and y has {len(classes)} class")
        random = check_random_state(self.random_state)
        settings = self._trainers_settings(int(random.randint(2**31 - 1)))
        val = _validation_rows(labels, members, self.validation_share, random)
        pixels = _decode(images, settings.model.frame)
        ids = [sha256_hex(str(number).encode()) for number in range(len(images))]
        data = TrainingData(_Pixels(pixels), ids, labels, np.setdiff1d(np.arange(len(images)), val), val)
        taxonomy = _taxonomy_of(classes)
        trained = train(settings, data, taxonomy)
        self.classes_ = classes
        self.network_, self.geometry_, self.taxonomy_ = trained.network, trained.geometry, taxonomy
        self.num_threads_, self.settings_ = trained.num_threads, settings
        self.priors_ = (np.bincount(labels[data.train_index], minlength=len(classes)) / len(data.train_index)).tolist()
        logits = self._logits(pixels[val]).astype(np.float64)
        self.calibration_ = fit_calibration(logits, labels[val], taxonomy)
        self.decision_ = decision_rule(settings.decision.rule, taxonomy, self.calibration_.priors)
        return self

    def predict_proba(self, X: Iterable[GivenImage]) -> FloatArray:  # noqa: N803
        """Return calibrated probabilities, [N, C], in the order of `classes_`; NotFittedError before `fit`."""
        check_is_fitted(self)
        logits = self._logits(_decode(given_list(X), self.geometry_.frame))
        return apply_calibration(logits, self.calibration_)

    def predict(self, X: Iterable[GivenImage]) -> NDArray[Any]:  # noqa: N803
        """Return the label of each image, [N], by the setting `decision.rule`; NotFittedError before `fit`."""
        probabilities = self.predict_proba(X)
        found: NDArray[Any] = self.classes_[labels_of(probabilities, self.decision_)]
        return found

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the fitted classifier as a bundle, with safetensors and JSON, into a folder.

        Args:
            folder: gets a folder named by the bundle's id; it is made if it is missing.
        Returns:
            The bundle's folder, for `load`, or `relook.load_model`.
        Raises:
            ConfigError: labels or parameters are of a type that JSON does not have.
        """
        check_is_fitted(self)
        taxonomy, geometry = self.taxonomy_, self.geometry_
        kept = {"classes": self.classes_.tolist(), "dtype": self.classes_.dtype.str, "parameters": self.get_params()}
        try:
            kept = json.loads(json.dumps(kept))
        except TypeError as error:
            raise ConfigError(f"the classifier cannot be saved: {error}; use texts or numbers") from error
        with compute_threads(self.num_threads_):
            golden = golden_arrays(self.network_, geometry, self.settings_.views)
        document = BundleDocument(
            taxonomy=taxonomy,
            taxonomy_hash=taxonomy.hash,
            architecture=Architecture(name=self.settings_.model.name, options=self.settings_.model.options),
            geometry=geometry,
            class_priors=dict(zip(taxonomy.codes, self.priors_, strict=True)),
            calibration=self.calibration_,
            views=self.settings_.views,
            operating=OperatingPoints(decision=self.decision_),
            dataset_id=hash_of([_KIND]),
            config=self.settings_.model_dump(mode="json"),
            code_version=version("relook"),
            num_threads=self.num_threads_,
            metrics={_KIND: kept},
            explanation={"target_layer": MODELS[self.settings_.model.name].target_layer},
        )
        make_folders(Path(folder))
        weights = {name: value.numpy() for name, value in self.network_.state_dict().items()}
        return write_bundle_in(Path(folder), document, weights, golden).path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a classifier that `save` wrote; nothing is unpickled.

        UnknownIdError is raised if it is not a bundle, IntegrityError if its files were altered, ConfigError if it is
        the bundle of another kind of model.
        """
        bundle = read_bundle(Path(path))
        document = bundle.document
        kept = document.metrics.get(_KIND)
        if kept is None:
            raise ConfigError(f"{os.fspath(path)!r} is a model of a home; open it with relook.load_model")
        found = cls(**kept["parameters"])
        found.classes_ = np.array(kept["classes"], dtype=kept["dtype"])
        found.network_, found.geometry_, found.taxonomy_ = plain_network(bundle), document.geometry, document.taxonomy
        found.num_threads_, found.calibration_ = document.num_threads, document.calibration
        found.decision_ = document.operating.decision
        found.settings_ = TrainersSettings.model_validate(document.config)
        found.priors_ = list(document.class_priors.values())
        return found

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "calibration_")

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        # Images are no table of features, so scikit-learn's own checks on tables do not apply.
        tags.input_tags.two_d_array = False
        return tags

    def __getstate__(self) -> Any:
        # Workers of scikit-learn get estimators that are not fitted, which hold nothing but parameters.
        if self.__sklearn_is_fitted__():
            raise RefusedError(
                "a fitted RelookClassifier is not pickled, since reading a pickle runs code of whoever wrote it; use "
                "save(folder) and RelookClassifier.load(path)"
            )
        return super().__getstate__()

    def _trainers_settings(self, seed: int) -> TrainersSettings:
        values = {
            "model.name": self.network,
            "model.side_px": self.side_px,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "seed": seed,
            **(self.settings or {}),
        }
        try:
            settings = TrainersSettings().with_values(values)
        except ValidationError as error:
            field, reason = first_problem(error)
            raise ConfigError(f"{field or 'a parameter'} of RelookClassifier cannot be used: {reason}") from error
        if settings.needs_ray:
            raise ConfigError("RelookClassifier trains in one process; leave workers.count at 1 and data in the cache")
        if settings.context:
            raise ConfigError("RelookClassifier is given images alone; leave context at false")
        return settings

    def _logits(self, pixels: UInt8Array) -> NDArray[np.float32]:
        parts = [pixels[start : start + _BATCH] for start in range(0, len(pixels), _BATCH)]
        with compute_threads(self.num_threads_):
            found = [reference_logits(self.network_, part, self.geometry_, self.settings_.views) for part in parts]
        return np.concatenate(found) if found else np.empty((0, len(self.classes_)), dtype=np.float32)


def _targets(y: Any) -> NDArray[Any]:
    """Return the labels as an array, [N]; a ValueError says why they are none."""
    if y is None:
        raise ArgumentError("RelookClassifier requires y to be passed, but the target y is None")
    targets: NDArray[Any] = column_or_1d(y, warn=True)
    if targets.dtype.kind == "f":
        assert_all_finite(targets, input_name="y")
    if targets.dtype == np.object_ and len({type(label) for label in targets.tolist()}) > 1:
        raise ArgumentError("y has labels of several types, or missing ones; take texts or numbers")
    check_classification_targets(targets)
    return targets


@dataclass(frozen=True)
class _Pixels:
    """Decoded images in memory, as the training loop reads them."""

    pixels: UInt8Array

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, indices: Any) -> UInt8Array:
        found: UInt8Array = self.pixels[indices]
        return found


def _decode(images: Sequence[GivenImage], frame: Frame) -> UInt8Array:
    pixels = np.empty((len(images), frame.side_px, frame.side_px, 3), dtype=np.uint8)
    for number, image in enumerate(images):
        try:
            pixels[number] = decode_frame(image_bytes(image), frame)
        except ImageError as error:
            raise ImageError(f"{given_name(image, number)}: {error}", error.code) from error
    return pixels


def _taxonomy_of(classes: NDArray[Any]) -> Taxonomy:
    # Codes of a taxonomy are short and plain, and labels may be numbers or long texts.
    named = tuple(
        DiagnosisClass(code=f"c{number}", name=str(label).strip() or f"c{number}", malignant=False)
        for number, label in enumerate(classes.tolist())
    )
    return Taxonomy(name=_KIND, version=1, classes=named)


def _validation_rows(labels: IntArray, groups: NDArray[Any], share: float, random: Any) -> IntArray:
    """Draw the rows of about `share` of each class's groups, at least one group and never all of them."""
    if not 0.0 < share < 1.0:
        raise ConfigError(f"validation_share is {share}; it must be above 0 and below 1")
    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    chosen: list[int] = []
    for label in np.unique(labels):
        # A group of two classes counts for that of its first image.
        own = np.flatnonzero(labels[first] == label)
        wanted = min(max(1, round(share * len(own))), len(own) - 1)
        chosen += random.permutation(own)[: max(0, wanted)].tolist()
    if not chosen:
        raise ArgumentError("there is nothing to validate with: some class needs images of at least two groups")
    return np.flatnonzero(np.isin(group_of, chosen))
