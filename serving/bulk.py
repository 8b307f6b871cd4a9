"""Prediction of a folder of images into a CSV file, most urgent first.

In: a model and a folder. Out: a table ordered by decision and p(malignant), with a row for every file of the folder:
one that is no image that can be read has the reason in its row, since a row that is missing is noticed by nobody.
Finished rows are kept, line by line, in a
file beside the table, so an interrupted run continues with `resume`. Nothing enters the ledger.
"""

import csv
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from images.context_table import ContextTable, read_context_table
from images.decode import decode_frames
from images.dicom import as_plain_file
from images.files import list_folder, shown
from images.overlay import overlay_png
from records.arrays import UInt8Array
from records.bundles import Bundle
from records.durable import replacing, write_file
from records.errors import DataError, ImageError, RefusedError
from records.frames import Frame
from records.ids import sha256_hex
from records.images import image_size, sniff
from records.parts import attempt, each_in_parts
from records.taxonomy import Taxonomy
from records.types import Decision
from records.types.base import LINE
from serving.context import effect_of
from serving.settings import ServingSettings
from serving.triage import TriageRules, Verdict, malignant_probability, triage
from vision.inference.loaded import LoadedModel, load_model
from vision.inference.output import BatchOutput
from vision.inference.suitability import assess

_ORDER = {Decision.URGENT: 0, Decision.REVIEW: 1, Decision.RETAKE: 2, Decision.ANSWERED: 3}
_CONTEXT_COLUMNS = ["context_used", "context_unknown", "label_without_context", "confidence_without_context"]
# Excel reads the wide forms as the narrow ones.
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")


@dataclass(frozen=True)
class BulkResult:
    """Result of a run."""

    rows: list[dict[str, Any]]
    """most urgent first"""
    failed: int
    hidden: int
    """files and folders of the operating system, such as Thumbs.db, that have no row"""


def predict_folder(
    bundle: Bundle,
    folder: Path,
    out: Path,
    settings: ServingSettings,
    *,
    explain: bool = False,
    resume: bool = False,
    context: Path | None = None,
    on_done: Callable[[int, int], None] = lambda done, total: None,
) -> BulkResult:
    """Predict every file of a folder and write the table.

    Args:
        bundle: the model.
        folder: all files of it and its subfolders are listed; JPEG, PNG, WebP and DICOM files are predicted, whatever
            their suffix.
        out: the CSV file; `<out>.partial` holds the finished rows.
        settings: precision, batch size and rules of triage; no audit sample is drawn.
        explain: write a heat map per image into `<out>.maps/`.
        resume: continue with the rows of `<out>.partial`.
        context: table of what is known about the images, see `images.context_table`.
        on_done: called with the number of finished images and of all images.
    Returns:
        The rows, the number of files that could not be predicted, and that of system files.
    Raises:
        DataError: the folder holds no files, or the table of context cannot be used.
        RefusedError: an interrupted run exists and `resume` was not given, or it was of another model or context.
        IntegrityError: the model does not reproduce its golden logits.
    """
    listing = list_folder(folder)
    unfinished, maps_of_run = out.with_name(out.name + ".partial"), out.with_name(out.name + ".maps")
    paths = _without_own(listing.files, (out, unfinished, maps_of_run, *([] if context is None else [context])))
    if not paths and not listing.unreadable:
        raise DataError(f"{shown(folder)!r} holds no files; name a folder of images")
    told = None if context is None else read_context_table(context)
    loaded = _checked_model(bundle, settings)
    done = _resumed(unfinished, bundle.id, None if told is None else told.hash, resume)
    left = [path for path in paths if str(path.relative_to(folder)) not in done]
    drawn = loaded.geometry.frame.shown(settings.overlay_side_px) if explain else loaded.geometry.frame
    one = partial(_read, frame=loaded.geometry.frame, drawn=drawn, max_pixels=settings.max_pixels)
    maps = maps_of_run if explain else None
    with unfinished.open("a") as file, ThreadPoolExecutor(settings.decode_threads) as threads:
        on_done(len(done), len(paths))
        if maps is not None:
            maps.mkdir(parents=True, exist_ok=True)
        for start in range(0, len(left), settings.max_batch_size):
            batch = left[start : start + settings.max_batch_size]
            read = list(threads.map(lambda path: attempt(one, path), batch))
            for row in _rows(bundle, loaded, folder, told, list(zip(batch, read, strict=True)), settings, maps):
                done[row["image"]] = row
                # Rows first, table last: the table is sorted, so it can be written only when all rows are there.
                file.write(json.dumps(row, allow_nan=False) + "\n")
            # After each batch, so that a killed run repeats at most one batch.
            file.flush()
            on_done(len(done), len(paths))
    rows = sorted((done | _unread_rows(listing.unreadable, folder)).values(), key=_urgency)
    _write(out, rows, bundle.document.taxonomy, in_context=told is not None)
    unfinished.unlink()  # only now: if writing the table fails, `resume` still finds all rows
    return BulkResult(rows, sum(row["error"] is not None for row in rows), listing.hidden)


def _checked_model(bundle: Bundle, settings: ServingSettings) -> LoadedModel:
    loaded = load_model(bundle, precision=settings.precision)
    loaded.check_golden()
    return loaded


def _unread_rows(unreadable: Sequence[tuple[Path, str]], folder: Path) -> dict[str, dict[str, Any]]:
    named = [(str(path.relative_to(folder)), why) for path, why in unreadable]
    return {name: _row(name, error=why) for name, why in named}


def _without_own(files: Sequence[Path], own: Sequence[Path]) -> list[Path]:
    """Leave out what this run or an earlier one with the same name wrote into the folder itself."""
    paths = {os.path.abspath(path) for path in own}
    return [path for path in files if paths.isdisjoint((os.path.abspath(path), os.path.abspath(path.parent)))]


@dataclass(frozen=True)
class Decoded:
    """One image as a model and a reader see it."""

    pixels: UInt8Array
    shown: UInt8Array
    """what a heat map is drawn over"""
    shorter_px: int


def _read(path: Path, frame: Frame, drawn: Frame, max_pixels: int) -> Decoded:
    return decode_for(path.read_bytes(), frame, drawn, max_pixels)


def decode_for(data: bytes, frame: Frame, drawn: Frame, max_pixels: int) -> Decoded:
    """Decode an image that was not imported as a model sees it and as its heat map is drawn over it.

    ImageError is raised if the bytes are no image that can be read, or have more than `max_pixels`.
    """
    data = as_plain_file(data)
    sniff(data)
    width_px, height_px = image_size(data)
    if width_px * height_px > max_pixels:
        raise ImageError(f"{width_px} x {height_px} pixels are too many", "too_many_pixels")
    decoded = decode_frames(data, {frame, drawn})
    return Decoded(decoded[frame], decoded[drawn], min(width_px, height_px))


def _rows(
    bundle: Bundle,
    loaded: LoadedModel,
    folder: Path,
    told: ContextTable | None,
    batch: list[tuple[Path, Decoded | Exception]],
    settings: ServingSettings,
    maps: Path | None,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each image; one that cannot be read, predicted or drawn has an error and stops no other."""
    usable = [(path, read) for path, read in batch if isinstance(read, Decoded)]
    predicted = each_in_parts(usable, partial(_predicted, bundle, loaded, folder, told, settings, maps))
    failed = [(path, read) for path, read in batch if isinstance(read, Exception)]
    for path, error in failed:
        yield _row(str(path.relative_to(folder)), error=LINE.keep(str(error) or type(error).__name__))
    for (path, _), row in zip(usable, predicted, strict=True):
        if isinstance(row, Exception):
            row = _row(str(path.relative_to(folder)), error=LINE.keep(f"{type(row).__name__}: {row}"))
        yield row


def _predicted(
    bundle: Bundle,
    loaded: LoadedModel,
    folder: Path,
    told: ContextTable | None,
    settings: ServingSettings,
    maps: Path | None,
    usable: Sequence[tuple[Path, Decoded]],
) -> list[dict[str, Any]]:
    rows = []
    pixels = np.stack([read.pixels for _, read in usable])
    known = None if told is None else [told.of(str(path.relative_to(folder))) for path, _ in usable]
    output = loaded.predict(pixels, gradcam=maps is not None, context=known)
    verdicts = verdicts_of(bundle, loaded, output, pixels, [read.shorter_px for _, read in usable], settings)
    taxonomy = bundle.document.taxonomy
    for row, ((path, read), verdict) in enumerate(zip(usable, verdicts, strict=True)):
        values = output.probabilities[row]
        name = str(path.relative_to(folder))
        has_label = verdict.label is not None
        if maps is not None and output.maps is not None and verdict.label is not None:
            drawn = output.maps[row, taxonomy.index_of(verdict.label)]
            png = overlay_png(read.shown, drawn, settings.overlay_alpha)
            # The hash of the relative path keeps equal file names of different subfolders apart.
            write_file(maps / f"{sha256_hex(os.fsencode(name))[:16]}-{path.stem}.png", png, sync=False)
        rows.append(
            _row(
                name,
                decision=verdict.decision.value,
                label=verdict.label,
                confidence=verdict.confidence,
                p_malignant=malignant_probability(values, taxonomy) if has_label else None,
                reasons=" ".join(verdict.reasons),
                probabilities=dict(zip(taxonomy.codes, values.tolist(), strict=True)) if has_label else {},
                **(_effect(output, row, bundle) if has_label else {}),
            )
        )
    return rows


def _effect(output: BatchOutput, row: int, bundle: Bundle) -> dict[str, Any]:
    effect = effect_of(output, row, bundle.document)
    if effect is None:
        return {}
    return {
        "context_used": " ".join(effect.used),
        "context_unknown": " ".join(effect.unknown),
        "label_without_context": effect.label_without,
        "confidence_without_context": effect.confidence_without,
    }


def verdicts_of(
    bundle: Bundle,
    loaded: LoadedModel,
    output: BatchOutput,
    pixels: UInt8Array,
    shorter_sides_px: Sequence[int],
    settings: ServingSettings,
) -> list[Verdict]:
    """Return the decision for each image of a batch that nothing records.

    Args:
        bundle: the model.
        loaded: the same, as it predicted.
        output: its predictions for the pixels.
        pixels: [N, S, S, 3].
        shorter_sides_px: [N] of the images before they were resized.
        settings: rules of triage.
    Returns:
        [N] verdicts.
    """
    suitable = assess(loaded.checks, output, pixels, shorter_sides_px)
    # No audit sample: nothing enters the ledger, so no annotator could review it.
    rules = TriageRules(settings.low_confidence, settings.max_set_size, audit_share=0.0)
    taxonomy, operating = bundle.document.taxonomy, bundle.document.operating
    return [
        triage(values, taxonomy, operating, rules, 0.5, checks)
        for values, checks in zip(output.probabilities, suitable, strict=True)
    ]


def _row(image: str, **values: Any) -> dict[str, Any]:
    empty = {"decision": None, "label": None, "confidence": None, "p_malignant": None, "reasons": "", "error": None}
    return {"image": image, **empty, "probabilities": {}, **values}


def _urgency(row: dict[str, Any]) -> tuple[int, float, str]:
    """Sort key: unreadable files last, then by decision, then by p(malignant)."""
    rank = _ORDER[Decision(row["decision"])] if row["decision"] else len(_ORDER)
    # Without a finite output p(malignant) counts as 1, as in triage.
    return rank, -(1.0 if row["p_malignant"] is None else row["p_malignant"]), row["image"]


def _resumed(partial: Path, model_id: str, context: str | None, resume: bool) -> dict[str, dict[str, Any]]:
    if not partial.exists():
        partial.parent.mkdir(parents=True, exist_ok=True)
        write_file(partial, json.dumps({"model_id": model_id, "context": context}) + "\n")
        return {}
    if not resume:
        raise RefusedError(f"{partial} holds an interrupted run; continue it with --resume, or remove it")
    text = partial.read_text()
    # A killed run may have left half a line at the end; its image is predicted again.
    whole = text[: text.rfind("\n") + 1]
    write_file(partial, whole)
    head, *rows = (json.loads(line) for line in whole.splitlines())
    if head["model_id"] != model_id:
        raise RefusedError(f"{partial} was started with model {head['model_id'][:12]}; remove it to start again")
    if head.get("context") != context:
        raise RefusedError(f"{partial} was started with another table of context; remove it to start again")
    return {row["image"]: row for row in rows}


def _write(out: Path, rows: list[dict[str, Any]], taxonomy: Taxonomy, *, in_context: bool) -> None:
    columns = ["image", "decision", "label", "confidence", "p_malignant", "reasons", "error"]
    columns += _CONTEXT_COLUMNS if in_context else []
    with (
        replacing(out) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow([*columns, *(f"p_{code}" for code in taxonomy.codes)])
        for row in rows:
            probabilities = [row["probabilities"].get(code, "") for code in taxonomy.codes]
            # A name that is not UTF-8 would make the whole table unreadable for other programs.
            cells = {**row, "image": shown(row["image"])}
            writer.writerow([_cell(cells.get(column)) for column in columns] + probabilities)


def _cell(value: Any) -> Any:
    """Return what a table cell holds; text that a spreadsheet would compute as a formula begins with an apostrophe."""
    if isinstance(value, str) and value.lstrip()[:1] in _FORMULA:
        return f"'{value}"
    return "" if value is None else value
