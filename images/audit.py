"""Audit of a dataset version: splits and classes, leaks between splits, and how much a random split would have leaked.

Input: a dataset version. Output: an `AuditReport`. The audit only counts images and changes nothing; it computes no
metric on any split.
"""

import difflib
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pandas as pd
import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field
from rich.progress import Progress

from images.cache import PixelCache
from images.grouping import near_pairs
from images.near_duplicates import HASH_FRAME
from images.quality import QualityOutlier, measure, quality_outliers
from records.datasets import DatasetVersion
from records.grouping import SPLIT_SHARES
from records.ledger import Transaction
from records.ledger.tables import TABLES
from records.store import Store, find_images
from records.taxonomy import Taxonomy, folded
from records.types import Image, Quarantined, SourceLabel, Split

RANDOM_SPLIT_SEED = 0
FEW_LESIONS = 10
"""Below this, a class has about one lesion on each of the small splits, and no metric of it says anything."""

METADATA = ("lesion_id", "patient_hash", "age_years", "sex", "localization", "device", "site", "acquired_at")
_SMALL_SIDE_PX = 64
_ALIKE = 0.84
_UNKNOWN = re.compile(r"the class '([^']+)'")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RandomSplit(_Part):
    """The leaks of a random split of the images, with the same shares and a fixed seed."""

    seed: int
    leaked_lesions: int = Field(description="lesions with images on more than one split")
    test_images: int
    leaked_test_images: int = Field(description="test images whose lesion is trained on")
    leaked_test_share: float = Field(ge=0, le=1, description="the same as a share of the test images")


class NearDuplicates(_Part):
    """A pair of images that are nearly the same."""

    first: str = Field(description="the image's name at its source, or its id")
    second: str
    bits: int = Field(ge=0, le=64, description="in how many bits the perceptual hashes differ")
    correlation: float
    same_lesion: bool
    same_diagnosis: bool
    same_group: bool


class Sizes(_Part):
    """Sizes of images in pixels, as stored."""

    smallest: tuple[int, int] = Field(description="width and height of the image with the fewest pixels")
    median: tuple[int, int] = Field(description="median width and median height")
    largest: tuple[int, int]
    small: int = Field(description="images with a side below 64 px")


class AuditReport(_Part):
    """The audit of one dataset version."""

    dataset_id: str
    problems: list[str] = Field(description="what would go wrong, one sentence each, the worst first")
    images: int
    lesions: int = Field(description="an image that names no lesion is its own")
    groups: int
    classes: dict[str, int] = Field(description="images per class, in class order")
    class_lesions: dict[str, int] = Field(description="lesions per class, in class order")
    formats: dict[str, int] = Field(description="images per file format")
    sizes: Sizes
    missing: dict[str, float] = Field(description="share of the images without each kind of metadata, 0 to 1")
    alike: list[str] = Field(description="classes, and labels that no class has, whose names look alike")
    splits: dict[str, int] = Field(description="images per split")
    split_lesions: dict[str, int] = Field(description="lesions per split")
    leaked_lesions: int = Field(description="lesions with images on more than one split")
    near_duplicate_pairs: int
    label_conflicts: int = Field(description="rows refused for it, and lesions with two diagnoses in this version")
    quarantined: int = Field(description="rows of all imports that could not be used and still are not")
    random_split: RandomSplit
    near_duplicates: list[NearDuplicates] = Field(description="all pairs; one of two diagnoses is not joined")
    refused: dict[str, int] = Field(description="quarantined rows per code")
    conflicts: list[str] = Field(
        description="one sentence per label conflict, near-duplicates of two diagnoses included"
    )
    quality_outliers: list[QualityOutlier] = Field(description="images that were taken unlike the rest")


def audit_dataset(store: Store, dataset: DatasetVersion, *, progress: Progress | None = None) -> AuditReport:
    """Audit a dataset version.

    Args:
        store: its ledger and images are read.
        dataset: the version.
        progress: shows decoding, which is needed only if the cache lacks images.
    Returns:
        The report.
    Raises:
        UnknownIdError: an image of the version is not in the ledger.
        DataError: an image's file is gone or does not decode.
    """
    rows = dataset.rows
    images = find_images(store, rows["image_id"].tolist())
    lesions = pd.Series([image.lesion_id or image.id for image in images], index=rows.index)
    labels = dict(zip(rows["image_id"], rows["label"], strict=True))
    with store.ledger.read() as tx:
        open_rows = _open_quarantine(tx)
    refused = Counter(q.code for q in open_rows)
    two_diagnoses = _two_diagnoses(rows, lesions)
    pairs = _near_duplicates(
        store, images, dict(zip(rows["image_id"], rows["group_id"], strict=True)), labels, progress
    )
    counts = rows["label"].value_counts()
    class_lesions = lesions.groupby(rows["label"]).nunique()
    report = AuditReport(
        dataset_id=dataset.id,
        problems=[],
        images=len(rows),
        lesions=int(lesions.nunique()),
        groups=dataset.num_groups,
        classes={code: int(counts.get(code, 0)) for code in store.taxonomy.codes},
        class_lesions={code: int(class_lesions.get(code, 0)) for code in store.taxonomy.codes},
        formats=dict(Counter(image.format for image in images).most_common()),
        sizes=_sizes(images),
        missing={name: round(sum(getattr(i, name) is None for i in images) / len(images), 4) for name in METADATA},
        alike=_alike(store.taxonomy, open_rows),
        splits={split.value: int((rows["split"] == split.value).sum()) for split in Split},
        split_lesions={split.value: int(lesions[rows["split"] == split.value].nunique()) for split in Split},
        leaked_lesions=count_leaked(lesions, rows["split"]),
        near_duplicate_pairs=len(pairs),
        label_conflicts=refused["label_conflict"] + len(two_diagnoses),
        quarantined=sum(refused.values()),
        random_split=split_at_random(lesions),
        near_duplicates=pairs,
        refused=dict(sorted(refused.items())),
        conflicts=[
            # All rows of a lesion are refused for one reason, which is listed once.
            *dict.fromkeys(q.reason for q in open_rows if q.code == "label_conflict"),
            *two_diagnoses,
            *(
                f"{p.first} and {p.second} are nearly the same image with two diagnoses"
                for p in pairs
                if not p.same_diagnosis
            ),
        ],
        quality_outliers=_quality(store, images, progress),
    )
    return report.model_copy(update={"problems": problems_of(report)})


def problems_of(report: AuditReport) -> list[str]:
    """Return what would go wrong with a dataset version, one sentence each, the worst first."""
    empty = [name for name, count in report.splits.items() if not count]
    absent = [code for code, count in report.class_lesions.items() if not count]
    few = [f"{code} ({count})" for code, count in report.class_lesions.items() if 0 < count < FEW_LESIONS]
    apart = sum(not pair.same_diagnosis for pair in report.near_duplicates)
    missing = [f"{name} {share:.0%}" for name, share in report.missing.items() if share > 0]
    said = [
        (report.leaked_lesions, f"{report.leaked_lesions} lesions are on two splits, so test results are too good"),
        (len(empty), f"no image is on the splits {', '.join(empty)}: training or its checks end with an error"),
        (len(absent), f"the taxonomy's classes {', '.join(absent)} have no image and are never learned"),
        (len(few), f"classes under {FEW_LESIONS} lesions, whose metrics say little: {', '.join(few)}"),
        (apart, f"{apart} pairs of images are nearly the same and have two diagnoses; one of each is wrong"),
        (report.label_conflicts, f"{report.label_conflicts} labels contradict others of the same image or lesion"),
        (report.quarantined, f"{report.quarantined} rows of imports were not used: {_counted(report.refused)}"),
        (len(report.alike), f"labels look alike: {'; '.join(report.alike[:5])}"),
        (report.sizes.small, f"{report.sizes.small} images have a side below {_SMALL_SIDE_PX} px"),
        (len(report.quality_outliers), f"{len(report.quality_outliers)} images look unlike the rest"),
        (report.missing["lesion_id"] == 1 and report.missing["patient_hash"] == 1,
         "no image names its lesion or patient, so only near-duplicates keep images of one lesion on one split"),
        (len(missing), f"share of the images without metadata: {', '.join(missing)}"),
    ]  # fmt: skip
    return [sentence for count, sentence in said if count]


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _sizes(images: list[Image]) -> Sizes:
    sizes = sorted(((i.width_px, i.height_px) for i in images), key=lambda size: (size[0] * size[1], size))
    return Sizes(
        smallest=sizes[0],
        median=(int(np.median([width for width, _ in sizes])), int(np.median([height for _, height in sizes]))),
        largest=sizes[-1],
        small=sum(min(size) < _SMALL_SIDE_PX for size in sizes),
    )


def _alike(taxonomy: Taxonomy, open_rows: list[Quarantined]) -> list[str]:
    """Return pairs of classes, and labels that no class has beside the class that they resemble."""
    texts = {one.code: {folded(text) for text in (one.code, one.name, *one.aliases)} for one in taxonomy.classes}
    # Codes of a letter or two always look alike.
    long = {code: {text for text in found if len(text) > 3} for code, found in texts.items()}
    found = []
    for first, second in combinations(long, 2):
        pair = next(((a, b) for a in sorted(long[first]) for b in sorted(long[second]) if _close(a, b)), None)
        if pair is not None:
            found.append(f"{pair[0]!r} of class {first} and {pair[1]!r} of class {second}")
    unknown = {m[1] for q in open_rows if q.code == "unknown_class" and (m := _UNKNOWN.search(q.reason))}
    for text in sorted(unknown):
        near = next((code for code, known in texts.items() if any(_close(folded(text), one) for one in known)), None)
        if near is not None:
            found.append(f"{text!r}, which is no class, and class {near} (--labels '{text}={near}' takes it)")
    return found


def _close(one: str, other: str) -> bool:
    return difflib.SequenceMatcher(None, one, other).ratio() >= _ALIKE


def count_leaked(lesions: "pd.Series[str]", splits: "pd.Series[str]") -> int:
    """Return how many lesions, [N], have images on more than one split, [N]; a correct split has 0."""
    return int((splits.groupby(lesions).nunique() > 1).sum())


def split_at_random(lesions: "pd.Series[str]", seed: int = RANDOM_SPLIT_SEED) -> RandomSplit:
    """Split images at random, as is often done, and count the leaks; `lesions` is [N], one per image."""
    # As in a real split, the order of the images is cut at the cumulative shares.
    edges = np.cumsum(list(SPLIT_SHARES.values())) * len(lesions)
    names = np.array([split.value for split in SPLIT_SHARES])
    order = np.random.default_rng(seed).permutation(len(lesions))
    # Rounding may put the last edge a little below the number of images, hence the clip.
    splits = pd.Series(names[np.searchsorted(edges, order + 0.5).clip(max=len(names) - 1)], index=lesions.index)
    in_test = splits == Split.TEST.value
    # A test image leaks if the model could have seen another image of its lesion in training.
    leaked = in_test & lesions.isin(lesions[splits == Split.TRAIN.value])
    return RandomSplit(
        seed=seed,
        leaked_lesions=count_leaked(lesions, splits),
        test_images=int(in_test.sum()),
        leaked_test_images=int(leaked.sum()),
        leaked_test_share=round(float(leaked.sum()) / max(1, int(in_test.sum())), 4),
    )


def _near_duplicates(
    store: Store, images: list[Image], group_of: dict[str, str], labels: dict[str, str], progress: Progress | None
) -> list[NearDuplicates]:
    name_of = {image.id: image.source_id or image.id for image in images}
    return [
        NearDuplicates(
            first=name_of[pair.first],
            second=name_of[pair.second],
            bits=pair.bits,
            correlation=pair.correlation,
            same_lesion=pair.same_lesion,
            same_diagnosis=pair.same_diagnosis,
            same_group=group_of[pair.first] == group_of[pair.second],
        )
        for pair in near_pairs(store, images, labels, progress=progress)
    ]


def _two_diagnoses(rows: pd.DataFrame, lesions: "pd.Series[str]") -> list[str]:
    """Return a sentence for every lesion whose images have several diagnoses."""
    labels = rows.groupby(lesions)["label"].unique()
    return [
        f"lesion {lesion} has the classes {' and '.join(sorted(found))}"
        for lesion, found in labels.items()
        if len(found) > 1
    ]


def _quality(store: Store, images: list[Image], progress: Progress | None) -> list[QualityOutlier]:
    image_ids = [image.id for image in images]
    # The side of the near-duplicate search, so that its pixels are reused.
    cache = PixelCache(store.home.cache, HASH_FRAME)
    cache.ensure(store, image_ids, progress)
    return quality_outliers(measure(cache.rows(image_ids)), [image.source_id or image.id for image in images])


def _open_quarantine(tx: Transaction) -> list[Quarantined]:
    """Return refused rows, except those that a later run of the same import could use."""
    images, labels = TABLES[Image], TABLES[SourceLabel]
    # A row that was refused and later repaired has a label of the same import; only open problems are reported.
    query = sa.select(labels.c.source, images.c.source_id).join(images, images.c.id == labels.c.image_id)
    used = {(source.rpartition(":")[2], source_id) for source, source_id in tx.connection.execute(query)}
    return [q for q in tx.find(Quarantined) if (q.import_id, q.source_id) not in used]
