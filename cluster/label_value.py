"""What the labels bought: `relook labels value`.

In: a store and a bundle. Out, and kept for the service: a learning curve over the labels so far, what the next 100
would add, the classes that lack labels, and what the last round's annotations changed. Everything is measured on val,
by heads over the bundle's features; the network is not trained again, and gate and test are not read.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from cluster.selection import described
from labeling.learning_curve import (
    Curve,
    Labelled,
    at,
    fitted,
    interval,
    learning_curve,
    recalls_of,
    reduced,
    resampled,
    right,
)
from records.arrays import FloatArray, IntArray
from records.bundles import Bundle
from records.datasets import DatasetVersion, read_manifest
from records.errors import DataError, RefusedError
from records.ids import new_id, utc_now
from records.store import Store
from records.types import DatasetRecord, LabelValueRecord, Split
from vision.inference.loaded import load_model

NEXT = 100
_FEWEST_LABELS = 60
_FEWEST_POINTS = 4


@dataclass(frozen=True)
class Figure:
    """A figure with its 95 % interval; None where there is nothing to measure it on."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class ClassValue:
    """What the labels of one class bought.

    Args:
        code: of the class.
        labels: on train.
        lesions_on_val: that its recall is measured on.
        recall: on val, at equal class shares.
        gain_of_next: of the recall, by 100 more labels of this class; None where its curve has too few points.
        lacks_labels: the interval of that gain lies above 0, or the class has no label.
    """

    code: str
    labels: int
    lesions_on_val: int
    recall: Figure
    gain_of_next: Figure | None
    lacks_labels: bool


@dataclass(frozen=True)
class RoundValue:
    """What the annotations of the last round changed.

    Args:
        number: of the round.
        new: training images that had no label before.
        changed: number of training images by "label before -> label now".
        gain: of balanced accuracy on val, with these labels against without.
        recall_gain: the same by class.
        set_right: images of val that are decided right only with them.
        set_wrong: images of val that are decided right only without them.
    """

    number: int
    new: int
    changed: dict[str, int]
    gain: Figure
    recall_gain: dict[str, Figure]
    set_right: int
    set_wrong: int


@dataclass(frozen=True)
class LabelValue:
    """What the labels of a dataset version bought.

    Args:
        dataset_id: of the version.
        model_id: the bundle whose features were used.
        labels: training images.
        curve: (labels, balanced accuracy on val at equal class shares), growing.
        gain_of_next: of balanced accuracy, by the next 100 labels as they came so far.
        checked: (predicted from half of the labels, found with all of them): how far the curve can be trusted.
        classes: those first whose next labels gain most.
        last_round: None if no label came from an annotator.
    """

    dataset_id: str
    model_id: str
    labels: int
    curve: list[tuple[int, Figure]]
    gain_of_next: Figure
    checked: tuple[Figure, float] | None
    classes: list[ClassValue]
    last_round: RoundValue | None


def value_of_labels(
    store: Store,
    bundle: Bundle,
    version: DatasetVersion,
    *,
    seed: int = 0,
    say: Callable[[str], None] = lambda text: None,
) -> LabelValue:
    """Measure what the labels of a dataset version bought.

    Args:
        store: with the images.
        bundle: gives the features.
        version: its train and val splits are read.
        seed: of the parts of the labels and of the resamples.
        say: is told what is done, which takes minutes with thousands of images.
    Returns:
        The figures.
    Raises:
        DataError: there are too few labels on train, or none on val.
        RefusedError: the model was trained on val.
    """
    if Split.VAL.value in bundle.document.trained_on:
        first = bundle.document.metrics["training"].get("first_fit")
        other = f"--model {first[:12]} is the one of its first training" if first else "name one that was not"
        raise RefusedError(f"model {bundle.id[:12]} was trained on val, which measures what labels bought; {other}")
    model, codes = load_model(bundle), store.taxonomy.codes
    say(f"features of {len(version.split(Split.TRAIN))} training images and {len(version.split(Split.VAL))} of val")
    kept, features = described(store, model, version.rows[version.rows["split"].isin([Split.TRAIN, Split.VAL])])
    is_train = (kept["split"] == Split.TRAIN.value).to_numpy()
    if is_train.sum() < _FEWEST_LABELS or is_train.all():
        raise DataError(
            f"a learning curve needs {_FEWEST_LABELS} labelled images on train and one on val; there are "
            f"{is_train.sum()} and {(~is_train).sum()}: import or annotate more"
        )
    labels = np.array([store.taxonomy.index_of(label) for label in kept["label"]], dtype=np.int64)
    groups = kept["group_id"].to_numpy(dtype=np.str_)
    train, val = reduced(*(Labelled(features[rows], labels[rows], groups[rows]) for rows in (is_train, ~is_train)))
    say("learning curve")
    curve = learning_curve(train, val, len(codes), seed)
    totals, overall = curve.recalls.mean(axis=1, where=np.isfinite(curve.recalls)), _balanced(curve.replicates)
    checked, widened = _checked(curve, totals, overall)
    return LabelValue(
        dataset_id=version.id,
        model_id=bundle.id,
        labels=len(train.labels),
        curve=[(int(n), _figure(totals[i], overall[:, i])) for i, n in enumerate(curve.sizes)],
        gain_of_next=_gain(curve.sizes, totals, overall, widened),
        checked=checked,
        classes=_classes(curve, val, codes, widened),
        last_round=_last_round(store, version, kept[is_train].reset_index(drop=True), train, val, codes, seed),
    )


def keep_value(store: Store, found: LabelValue) -> None:
    """Store what was measured; what was measured earlier stays."""
    figures = asdict(found)
    about = {name: figures.pop(name) for name in ("dataset_id", "model_id", "labels")}
    with store.ledger.begin() as tx:
        tx.add(LabelValueRecord(id=new_id(), created_at=utc_now(), figures=figures, **about))


def _balanced(recalls: FloatArray) -> FloatArray:
    return np.asarray(np.nanmean(recalls, axis=-1))


def _figure(value: float, replicates: FloatArray) -> Figure:
    if not np.isfinite(value):
        return Figure(None, None, None)
    low, high = interval(replicates)
    return Figure(float(value), min(low, float(value)), max(high, float(value)))


def _gain(sizes: FloatArray | IntArray, values: FloatArray, replicates: FloatArray, widened: float) -> Figure:
    """Predict what 100 more labels add to the last point of a curve."""
    last = float(sizes[-1])
    value, *_ = at(fitted(sizes, values[None]), last + NEXT) - at(fitted(sizes, values[None]), last)
    parameters = fitted(sizes, replicates)
    return _figure(value, value + widened * (at(parameters, last + NEXT) - at(parameters, last) - value))


def _checked(curve: Curve, totals: FloatArray, overall: FloatArray) -> tuple[tuple[Figure, float] | None, float]:
    """Predict the last point from those up to half of the labels.

    Returns:
        (predicted, found), and by how much intervals have to be wider, so that this one would have held.
    """
    early = np.flatnonzero(curve.sizes <= curve.sizes[-1] // 2 + 1)
    if len(early) < _FEWEST_POINTS:
        return None, 1.0
    sizes, last = curve.sizes[early], float(curve.sizes[-1])
    (value,) = at(fitted(sizes, totals[None, early]), last)
    predicted = _figure(value, at(fitted(sizes, overall[:, early]), last))
    missed = abs(totals[-1] - value)
    edge = predicted.high if totals[-1] > value else predicted.low
    reach = abs((edge or 0.0) - value)
    return (predicted, float(totals[-1])), max(1.0, missed / max(reach, 1e-9))


def _classes(curve: Curve, val: Labelled, codes: tuple[str, ...], widened: float) -> list[ClassValue]:
    found = []
    for c, code in enumerate(codes):
        recall = _figure(curve.recalls[-1, c], curve.replicates[:, -1, c])
        points = np.flatnonzero(curve.class_sizes[:, c] >= 1)
        gain = None
        if recall.value is not None and len(points) >= _FEWEST_POINTS:
            values, replicates = curve.recalls[points, c], curve.replicates[:, points, c]
            gain = _gain(curve.class_sizes[points, c], values, replicates, widened)
        labels, lesions = int(curve.class_sizes[-1, c]), len(set(val.groups[val.labels == c]))
        lacks = not labels or (gain is not None and gain.low is not None and gain.low > 0)
        found.append(ClassValue(code, labels, lesions, recall, gain, lacks))
    return sorted(found, key=lambda one: -(one.gain_of_next.value or 0.0) if one.gain_of_next else 0.0)


def _last_round(
    store: Store,
    version: DatasetVersion,
    rows: pd.DataFrame,
    train: Labelled,
    val: Labelled,
    codes: tuple[str, ...],
    seed: int,
) -> RoundValue | None:
    """Compare a head with the labels of the last round that has any with one without them."""
    number = int(rows["round"].max())
    if number == 0:
        return None
    before = _labels_before(store, version, number)
    earlier = rows["image_id"].map(before)
    changed = (rows["round"] == number) & earlier.notna() & (earlier != rows["label"])
    new = (rows["round"] == number) & earlier.isna()
    kept = (~new).to_numpy()
    labels = train.labels.copy()
    for row in np.flatnonzero(changed):
        labels[row] = store.taxonomy.index_of(str(earlier[row]))
    without = right(Labelled(train.features[kept], labels[kept], train.groups[kept]), val, len(codes))
    with_them = right(train, val, len(codes))
    weights = np.concatenate([np.ones((1, len(val.labels))), resampled(val, len(codes), seed)])
    gain = recalls_of(with_them, val.labels, weights, len(codes)) - recalls_of(without, val.labels, weights, len(codes))
    flips = Counter(f"{earlier[row]} -> {rows['label'][row]}" for row in np.flatnonzero(changed))
    return RoundValue(
        number=number,
        new=int(new.sum()),
        changed=dict(flips.most_common()),
        gain=_figure(_balanced(gain[:1])[0], _balanced(gain[1:])),
        recall_gain={code: _figure(gain[0, c], gain[1:, c]) for c, code in enumerate(codes)},
        set_right=int((with_them & ~without).sum()),
        set_wrong=int((without & ~with_them).sum()),
    )


def _labels_before(store: Store, version: DatasetVersion, number: int) -> dict[str, str]:
    """Return the labels of the newest version before a round, by image; empty if there was none."""
    with store.ledger.read() as tx:
        record_of = {record.id: record for record in tx.find(DatasetRecord)}
    record = record_of.get(version.id)
    while record is not None and record.round >= number:
        record = record_of.get(record.parent_id or "")
    if record is None:
        return {}
    rows = read_manifest(store, record.id).to_pandas()
    return dict(zip(rows["image_id"], rows["label"], strict=True))
