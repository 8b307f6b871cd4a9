"""What views and context are worth to one trained model, and its figures over val and test together.

.venv/bin/python -m bench.train.levers MODEL --keep FOLDER [--test]
.venv/bin/python -m bench.train.levers MODEL --keep FOLDER --seeds MODEL ... --against MODEL MODEL ...

The weights stay as they are. For each row of the first table, temperature, bias and the weight of the context are
fitted on val anew, as `relook train` does. Val has chosen the epoch, too: its figures are optimistic. With `--test` the
bundle predicts val and test as it is served, and both are also evaluated together; reading test is audited. What was
computed is kept in FOLDER. The second line compares another recipe with that of the model, seed by seed, on val only.
"""

import argparse
import dataclasses
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.train.gains import Judge
from cluster.sources import load_settings
from images.cache import PixelCache
from images.importer import open_dataset
from records.arrays import Float32Array, FloatArray, IntArray
from records.bundles import Bundle, BundleDocument
from records.context import ContextHead, Known, context_of_image
from records.models import find_bundle
from records.store import Store, find_images, open_store
from records.types import Split
from trainers.evaluation.evaluate import SplitPredictions, evaluate, predict_split
from trainers.evaluation.figures import Evaluation
from trainers.fitting.context import calibrated, probabilities_of
from vision.inference.loaded import plain_network
from vision.metrics.metrics import expected_calibration_error
from vision.preprocess import scale_pixels, to_tensor
from vision.views import MAX_VIEWS, viewed

BATCH, DRAWS = 64, 2000
VIEWS = (1, 2, 4, 8)
ARRAYS = ("labels", "logits", "probabilities", "without_context")


def view_logits(bundle: Bundle, store: Store, image_ids: list[str], kept: Path) -> Float32Array:
    """Return the logits of every view by itself, [8, N, C]; they are computed once."""
    if not kept.is_file():
        geometry, network = bundle.document.geometry, plain_network(bundle)
        pixels = PixelCache(store.home.cache, geometry.frame).rows(image_ids)
        parts = []
        with torch.inference_mode():
            for start in range(0, len(pixels), BATCH):
                batch = pixels.take(np.arange(start, min(start + BATCH, len(pixels))))
                inputs = scale_pixels(to_tensor(batch), geometry)
                parts.append(torch.stack([network(viewed(inputs, view)) for view in range(MAX_VIEWS)]).numpy())
        np.save(kept, np.concatenate(parts, axis=1))
    logits: Float32Array = np.load(kept)
    return logits


def levers(bundle: Bundle, val: SplitPredictions, logits: Float32Array) -> list[dict[str, Any]]:
    """Evaluate val with fewer views, and without context."""
    document, rows = bundle.document, []
    for context in (None, document.context) if document.context else (None,):
        for views in VIEWS:
            mean = logits[:views].mean(axis=0).astype(np.float64)
            rows.append({"context": context is not None, "views": views, **refitted(document, val, mean, context)})
    return rows


def frozen(
    bundle: Bundle, store: Store, val: SplitPredictions, logits: Float32Array, path: Path
) -> list[dict[str, Any]]:
    """Evaluate a logistic regression on frozen features, and one view of the bundle, on the same images of val.

    Args:
        bundle: whose dataset it is.
        store: with the images.
        val: predictions of val.
        logits: [8, N, C] of val.
        path: file of `bench.label.acquisition_features`; images that it lacks are left out.
    Returns:
        Rows without and with context for each of the two.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    document, codes = bundle.document, bundle.document.taxonomy.codes
    with np.load(path) as file:
        row_of, features = {str(name): row for row, name in enumerate(file["ids"])}, file["features"]
    train = open_dataset(store, document.dataset_id).split(Split.TRAIN)
    names = [str(image.source_id) for image in find_images(store, [str(one) for one in train["image_id"]])]
    labels = np.array([codes.index(str(label)) for label in train["label"]])
    there = np.array([name in row_of for name in names])
    scaler = StandardScaler().fit(features[[row_of[name] for name in names if name in row_of]])
    head = LogisticRegression(C=0.01, max_iter=5000)
    head.fit(scaler.transform(features[[row_of[name] for name in names if name in row_of]]), labels[there])
    val_names = [str(image.source_id) for image in find_images(store, val.image_ids)]
    kept = np.array([at for at, name in enumerate(val_names) if name in row_of])
    found = head.decision_function(scaler.transform(features[[row_of[val_names[at]] for at in kept]]))
    part = chosen(val, kept)
    rows = []
    for name, values in (("frozen", found), ("trained", logits[0, kept])):
        for context in (None, document.context) if document.context else (None,):
            figures = refitted(document, part, np.asarray(values, dtype=np.float64), context)
            rows.append({"features": name, "train": int(there.sum()), "context": context is not None, **figures})
    return rows


def chosen(predictions: SplitPredictions, rows: IntArray) -> SplitPredictions:
    """Return the predictions of some rows."""
    return SplitPredictions(
        model_id=predictions.model_id,
        image_ids=[predictions.image_ids[row] for row in rows],
        group_ids=[predictions.group_ids[row] for row in rows],
        lesion_ids=[predictions.lesion_ids[row] for row in rows],
        labels=predictions.labels[rows],
        logits=predictions.logits[rows],
        probabilities=predictions.probabilities[rows],
        known=[(predictions.known or ())[row] for row in rows],
    )


def refitted(
    document: BundleDocument, val: SplitPredictions, logits: FloatArray, context: ContextHead | None
) -> dict[str, Any]:
    """Calibrate logits on val, and evaluate val; thresholds are left out, as they are those of the bundle."""
    known = list(val.known or ())
    calibration, head = calibrated(logits, val.labels, document.taxonomy, context, known)
    one = dataclasses.replace(
        val, probabilities=probabilities_of(logits, calibration, head, known), without_context=None
    )
    found = figures_of(evaluate(one, document.taxonomy, document.operating, priors=calibration.priors), one)
    return {name: value for name, value in found.items() if name not in ("answered", "target")}


def as_served(store: Store, bundle: Bundle, split: Split, keep: Path) -> SplitPredictions:
    """Return the predictions of the bundle for a split; they are computed once."""
    dataset, kept = open_dataset(store, bundle.document.dataset_id), keep / f"{bundle.id[:12]}_{split.value}.npz"
    rows = dataset.split(split)
    image_ids = [str(image_id) for image_id in rows["image_id"]]
    if not kept.is_file():
        found = predict_split(store, bundle, dataset, split, "bench")
        arrays = {name: getattr(found, name) for name in ARRAYS if getattr(found, name) is not None}
        np.savez(kept, image_ids=np.array(image_ids), **arrays)
    with np.load(kept) as file:
        if list(file["image_ids"]) != image_ids:
            raise SystemExit(f"{kept} is of other images; remove it")
        arrays = {name: file[name] for name in ARRAYS if name in file}
    images = find_images(store, image_ids)
    return SplitPredictions(
        model_id=bundle.id,
        image_ids=image_ids,
        group_ids=[str(group_id) for group_id in rows["group_id"]],
        lesion_ids=[image.lesion_id for image in images],
        known=[context_of_image(image) for image in images],
        **arrays,
    )


def compared(store: Store, bundles: list[Bundle], others: list[Bundle], keep: Path) -> list[dict[str, Any]]:
    """Return the figures of one recipe on val, and of another one with what it gains, as they are served."""
    judge = Judge.of(store, open_dataset(store, bundles[0].document.dataset_id))
    return [
        judge.row(name, [as_served(store, one, Split.VAL, keep).probabilities for one in part])
        for name, part in (("base", bundles), ("against", others))
    ]


def joined(parts: list[SplitPredictions]) -> SplitPredictions:
    """Return the predictions of several splits as those of one; no group is in two of them."""

    def lists(name: str) -> list[Any]:
        return [item for part in parts for item in getattr(part, name)]

    known: list[Known] = lists("known")
    without = [part.without_context for part in parts if part.without_context is not None]
    return SplitPredictions(
        model_id=parts[0].model_id,
        image_ids=lists("image_ids"),
        group_ids=lists("group_ids"),
        lesion_ids=lists("lesion_ids"),
        labels=np.concatenate([part.labels for part in parts]),
        logits=np.concatenate([part.logits for part in parts]),
        probabilities=np.concatenate([part.probabilities for part in parts]),
        without_context=np.concatenate(without) if without else None,
        known=known,
    )


def figures_of(found: Evaluation, predictions: SplitPredictions) -> dict[str, Any]:
    """Return what the tables hold."""
    even, target = found.by_rule["even"], found.points.get("target")
    return {
        "images": found.images,
        "natural": round(found.by_rule["natural"].balanced_accuracy, 4),
        "equal_prevalence": round(even.balanced_accuracy, 4),
        "interval": [round(float(end), 3) for end in even.balanced_accuracy_ci],
        "macro_auc": None if found.macro_auc is None else round(found.macro_auc, 4),
        "ece": round(found.ece, 4),
        "ece_if_perfect": [round(value, 4) for value in ece_if_perfect(predictions.probabilities)],
        "answered": found.answered_share,
        **({} if target is None else {"target": target.model_dump(mode="json")}),
    }


def ece_if_perfect(probabilities: FloatArray, seed: int = 0) -> tuple[float, float]:
    """Return mean and 95 % quantile of the calibration error, were the labels drawn from the probabilities."""
    random, edges = np.random.default_rng(seed), np.cumsum(probabilities, axis=1)
    drawn = [
        expected_calibration_error(
            (random.random((len(edges), 1)) > edges).sum(axis=1).clip(max=edges.shape[1] - 1), probabilities
        )
        for _ in range(DRAWS)
    ]
    return float(np.mean(drawn)), float(np.quantile(drawn, 0.95))


def main() -> None:
    """Print a table as lines of text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="id prefix, path of a bundle, or champion")
    parser.add_argument("--keep", type=Path, required=True, help="folder for what was computed")
    parser.add_argument("--test", action="store_true", help="also val and test together, as served")
    parser.add_argument("--frozen", type=Path, help="features.npz: also a linear head on these, on the same images")
    parser.add_argument("--seeds", nargs="+", default=[], help="the same recipe with other seeds")
    parser.add_argument("--against", nargs="+", default=[], help="another recipe with the same seeds: compare, no more")
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    with closing(open_store(load_settings(environ=os.environ).records)) as store:
        bundle = find_bundle(store, options.model)
        if options.against:
            bundles, others = ([find_bundle(store, one) for one in part] for part in (options.seeds, options.against))
            for row in compared(store, [bundle, *bundles], others, options.keep):
                print(row)
            return
        document = bundle.document
        val = as_served(store, bundle, Split.VAL, options.keep)
        logits = view_logits(bundle, store, val.image_ids, options.keep / f"{bundle.id[:12]}_views.npy")
        for row in levers(bundle, val, logits):
            print(row)
        for row in frozen(bundle, store, val, logits, options.frozen) if options.frozen else ():
            print(row)
        if options.test:
            test = as_served(store, bundle, Split.TEST, options.keep)
            for name, part in (("val", val), ("test", test), ("val + test", joined([val, test]))):
                for context, probabilities in ((True, part.probabilities), (False, part.without_context)):
                    if probabilities is None:
                        continue
                    one = dataclasses.replace(part, probabilities=probabilities)
                    found = evaluate(one, document.taxonomy, document.operating, priors=document.calibration.priors)
                    print({"split": name, "context": context, **figures_of(found, one)})


if __name__ == "__main__":
    main()
