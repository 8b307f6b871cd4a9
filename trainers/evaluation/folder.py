"""Predictions of a model for any folder of labelled images, imported or not.

In: a loaded model, a folder of images and a table (columns image_id, dx, and lesion_id or patient_id if known).
Out: `SplitPredictions` as for a split of a dataset. Nothing is stored, and no row is skipped: one unusable row is an
error, because metrics over the rest would be too good.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.progress import Progress

from images.decode import decode_frame
from images.import_plan import read_label
from images.layouts import read_source
from images.members import ImageFile
from images.parallel import chunks_of, map_in_order
from images.source_table import SourceRow
from records.arrays import UInt8Array
from records.context import COLUMNS, Value
from records.errors import DataError, ImageError, TaxonomyError
from records.frames import Frame
from records.taxonomy import Taxonomy
from records.types.images import LABEL_RANK
from trainers.evaluation.evaluate import SplitPredictions, joined_outputs
from trainers.evaluation.images import CONFIRMED_BY, Images, Traits, age_band
from trainers.evaluation.skin import SkinTones, tone_of
from vision.inference.loaded import LoadedModel


def predict_folder(
    model: LoadedModel,
    images: Path,
    labels: Path,
    *,
    columns: Mapping[str, str] | None = None,
    progress: Progress | None = None,
    masks: Path | None = None,
) -> SplitPredictions:
    """Predict every row of a table.

    Args:
        model: the loaded model.
        images: folder with the images, in any depth.
        labels: the table.
        columns: names of the table's columns where they differ from the usual ones.
        progress: a bar is added to it.
        masks: folder of lesion masks, named after the images; skin tone is measured outside them.
    Returns:
        The predictions in the table's order; the independent unit is the patient, else the lesion, else the image.
    Raises:
        DataError: the folder or table cannot be read, or a row has no image, no diagnosis or an unknown one.
    """
    source = read_source(images, columns, labels)
    class_indices = _checked(source.rows, labels, model.taxonomy)
    if progress and source.unlisted:
        _say_unlisted(progress, source.unlisted, images, labels)
    task = progress.add_task("Predicting", total=len(source.rows)) if progress else None
    # Decoding in chunks bounds memory; the model predicts one chunk while the next is decoded.
    chunks = chunks_of(source.rows)
    outputs = []
    tones = SkinTones([row.source_id for row in source.rows], masks, model.geometry.frame)
    decoded = map_in_order(lambda rows: _decode(rows, model.geometry.frame), chunks)
    for rows, pixels in zip(chunks, decoded, strict=True):
        outputs.append(model.predict(pixels, context=[known_of(row) for row in rows]))
        tones.add(pixels)
        if progress and task is not None:
            progress.advance(task, len(pixels))
    lesion_ids = [row.context["lesion_id"] for row in source.rows]
    patient_ids = [row.context["patient_id"] for row in source.rows]
    return SplitPredictions(
        model_id=model.model_id,
        image_ids=[row.source_id for row in source.rows],
        group_ids=[
            # Prefixes keep a patient, a lesion and an image of the same name apart.
            f"patient:{patient}" if patient else f"lesion:{lesion}" if lesion else f"image:{row.source_id}"
            for row, patient, lesion in zip(source.rows, patient_ids, lesion_ids, strict=True)
        ],
        lesion_ids=lesion_ids,
        labels=np.array(class_indices, dtype=np.int64),
        **joined_outputs(outputs),
        known=[known_of(row) for row in source.rows],
        images=Images(
            names=[row.source_id for row in source.rows],
            read=lambda index: (source.rows[index].path or Path(source.rows[index].source_id)).read_bytes(),
            masks=masks,
        ),
        traits=[_traits(row, angle) for row, angle in zip(source.rows, tones.angles, strict=True)],
    )


def _say_unlisted(progress: Progress, unlisted: Sequence[str], images: Path, labels: Path) -> None:
    text = f"note: {len(unlisted)} images of {images} are in no row of {labels} and are not evaluated: "
    progress.console.print(text + ", ".join(unlisted[:3]), markup=False, highlight=False)


def known_of(row: SourceRow) -> dict[str, Value]:
    """Return the context of a row, by column."""
    return {"age": row.age_years, **{name: row.context.get(name) for name in COLUMNS if name != "age"}}


def _traits(row: SourceRow, angle: float | None) -> Traits:
    return Traits(
        age=age_band(row.age_years),
        sex=row.context["sex"],
        localization=row.context["localization"],
        confirmation=CONFIRMED_BY[LABEL_RANK[row.confirmation]],
        skin_tone=tone_of(angle),
    )


def _checked(rows: Sequence[SourceRow], labels: Path, taxonomy: Taxonomy) -> list[int]:
    """Return the class index of every row; DataError if a row cannot be evaluated."""
    seen: set[str] = set()
    problems = []
    codes = []
    for row in rows:
        if row.source_id in seen:
            problems.append(f"{row.source_id} is listed twice")
        elif row.problem is not None:
            problems.append(row.problem)
        else:
            try:
                code = read_label(row.label, taxonomy)
            except TaxonomyError as error:
                problems.append(f"{row.source_id} has {error}")
            else:
                if code is None:
                    problems.append(f"{row.source_id} has no diagnosis")
                codes.append(code or "")
        seen.add(row.source_id)
    # All problems are counted and one is shown, which is enough to find the column or folder that is wrong.
    if problems:
        raise DataError(
            f"{len(problems)} of {len(rows)} rows of {labels} cannot be evaluated, first: {problems[0]}; "
            f"correct them or leave them out of the table (classes: {', '.join(taxonomy.codes)})"
        )
    return [taxonomy.index_of(code) for code in codes]


def _decode(rows: Sequence[SourceRow], frame: Frame) -> UInt8Array:
    return np.stack([read_frame(row.path or Path(row.source_id), frame) for row in rows])


def read_frame(path: ImageFile, frame: Frame) -> UInt8Array:
    """Read what a frame takes of an image file.

    Args:
        path: of a JPEG, PNG or WebP file.
        frame: for a network, or for people.
    Returns:
        [H, W, 3].
    Raises:
        DataError: the file cannot be read.
        ImageError: it is not an image, or is damaged.
    """
    try:
        return decode_frame(path.read_bytes(), frame)
    except OSError as error:
        raise DataError(f"the image {path} cannot be read ({error.strerror})") from error
    except ImageError as error:
        raise ImageError(f"{path}: {error}", error.code) from error
