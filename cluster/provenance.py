"""Provenance files: the manifest of a round, and the change record of a promotion.

A manifest has everything that is needed to run a round again and to compare the results. It is written when
the round begins (seed, settings, packages) and completed when it ends (data, winner, model, verdict, test
figures). A change record says what changed with a promotion: data, gate report, settings, packages; one JSON
file per model in `runs/changes/`. Files are written atomically and may be written again.
"""

import json
import platform
from collections import Counter
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.gate import GateReport
from cluster.settings import Settings, public_dump
from records.bundles import Bundle
from records.datasets import load_dataset
from records.durable import make_folders, write_file
from records.errors import IntegrityError, RefusedError, UnknownIdError
from records.home import Home
from records.ids import utc_now
from records.models import find_bundle
from records.store import Store, find_images
from records.types import DatasetRecord, RoundRecord, RoundStep
from trainers.settings import flat_values

RECORDED_PACKAGES = (
    "relook",
    "torch",
    "torchvision",
    "ray",
    "albumentations",
    "numpy",
    "pandas",
    "pyarrow",
    "scikit-learn",
)


class RoundResult(BaseModel):
    """The results of a round that a replay compares."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    dataset_id: str
    winner: dict[str, Any] = Field(description="settings of trainers that were fitted")
    model_id: str
    test: dict[str, Any] = Field(description="evaluation on the test split")
    verdict: str


class Manifest(BaseModel):
    """The content of a round's `manifest.json`."""

    model_config = ConfigDict(frozen=True)

    round: int
    seed: int
    settings_hash: str
    settings: dict[str, Any]
    packages: dict[str, str]
    python: str
    result: RoundResult | None = Field(default=None, description="empty until the round has ended")


def round_folder(home: Home, number: int) -> Path:
    """Return the folder of a round."""
    return home.runs / f"round-{number:04d}"


def manifest_file(run_dir: Path) -> Path:
    """Return the manifest file in a round's folder."""
    return run_dir / "manifest.json"


def write_manifest(run_dir: Path, record: RoundRecord, settings: Settings) -> None:
    """Write what a round begins with, secrets masked; an existing manifest stays."""
    run_dir.mkdir(parents=True, exist_ok=True)
    # A resumed round keeps the packages and settings that it began with, not those of the process that resumes it.
    if manifest_file(run_dir).exists():
        return
    manifest = Manifest(
        round=record.number,
        seed=record.seed,
        settings_hash=record.settings_hash,
        settings=public_dump(settings),
        packages=installed_packages(),
        python=platform.python_version(),
    )
    _put(run_dir, manifest)


def complete_manifest(run_dir: Path, results: dict[str, dict[str, Any]]) -> None:
    """Add the results of the steps, given by name, to the manifest of a round."""
    result = RoundResult(
        dataset_id=results["version"]["dataset_id"],
        winner=results["tune"]["settings"],
        model_id=results["fit"]["model_id"],
        test=results["evaluate"]["test"],
        verdict=str(results["gate"]["verdict"]),
    )
    _put(run_dir, _read(run_dir).model_copy(update={"result": result}))


def read_manifest(home: Home, number: int) -> tuple[Manifest, RoundResult]:
    """Read the manifest of a finished round, and its result.

    UnknownIdError if there is no such round, RefusedError if it has not ended, IntegrityError if the file is damaged.
    """
    run_dir = round_folder(home, number)
    if not manifest_file(run_dir).is_file():
        raise UnknownIdError(f"no round has the number {number}; `relook rounds` lists them")
    manifest = _read(run_dir)
    if manifest.result is None:
        raise RefusedError(f"round {number} has not ended; finish it with `relook round --resume`")
    return manifest, manifest.result


def installed_packages() -> dict[str, str]:
    """Return the versions of the packages that results depend on."""
    return {name: package_version(name) for name in RECORDED_PACKAGES}


def _read(run_dir: Path) -> Manifest:
    path = manifest_file(run_dir)
    try:
        return Manifest.model_validate_json(path.read_text())
    except (OSError, ValidationError) as error:
        raise IntegrityError(f"{path} is not the manifest of a round; restore it from a backup") from error


def _put(run_dir: Path, manifest: Manifest) -> None:
    _write(manifest_file(run_dir), manifest.model_dump(mode="json"))


def _write(path: Path, value: dict[str, Any]) -> None:
    write_file(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_change_record(
    store: Store, model_id: str, gate: GateReport | None, actor: str, *, forced_because: str | None = None
) -> Path:
    """Write the change record of a promotion and return its file.

    Args:
        store: with model and data.
        model_id: the model that serves now.
        gate: report of the gate; None if it was not run.
        actor: who promoted it.
        forced_because: the reason, if it was promoted against the gate.
    Returns:
        The file.
    """
    bundle = find_bundle(store, model_id)
    # From the report: the ledger already names the new champion.
    before = find_bundle(store, gate.champion) if gate and gate.champion else None
    record = {
        "model_id": model_id,
        "replaces": before.id if before else None,
        "at": utc_now().isoformat(),
        "by": actor,
        "forced_because": forced_because,
        "gate": gate.model_dump(mode="json") if gate else None,
        "data": _data(store, bundle),
        "settings_changed": _difference(
            flat_values(before.document.config if before else {}), flat_values(bundle.document.config)
        ),
        "code_version": [before.document.code_version if before else None, bundle.document.code_version],
        "packages": installed_packages(),
        "test": stored_test_figures(store, model_id),
    }
    folder = store.home.runs / "changes"
    make_folders(folder)
    path = folder / f"{model_id}.json"
    _write(path, record)
    return path


def _data(store: Store, bundle: Bundle) -> dict[str, Any]:
    """Describe the training data; an imported bundle names a dataset version that this store may not have."""
    dataset_id = bundle.document.dataset_id
    with store.ledger.read() as tx:
        if tx.get(DatasetRecord, dataset_id) is None:
            return {"dataset_id": dataset_id, "here": False}
    dataset = load_dataset(store, dataset_id)
    train = dataset.rows[dataset.rows["split"].isin(bundle.document.trained_on)]
    images = find_images(store, [str(image_id) for image_id in train["image_id"]])
    return {
        "dataset_id": dataset_id,
        "here": True,
        "images": dataset.num_images,
        "groups": dataset.num_groups,
        "train_images": len(train),
        "train_labels": dict(Counter(str(label) for label in train["label"])),
        "train_provenance": dict(Counter(image.provenance for image in images)),
        "train_consent": dict(Counter(str(image.consent) for image in images)),
        "labels_from_annotators": int(dataset.rows["label_source"].str.startswith("annotator:").sum()),
    }


def _difference(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[Any]]:
    """Return `{field: [before, after]}` for every field that differs."""
    names = sorted({*before, *after})
    return {name: [before.get(name), after.get(name)] for name in names if before.get(name) != after.get(name)}


def stored_test_figures(store: Store, model_id: str) -> dict[str, Any] | None:
    """Return the evaluation on the test split by the round that made the model; None if no round did."""
    with store.ledger.read() as tx:
        fits = [step for step in tx.find(RoundStep, where={"step": "fit"}) if step.result["model_id"] == model_id]
        if not fits:
            return None
        evaluated = tx.find(RoundStep, where={"round_id": fits[0].round_id, "step": "evaluate"})
    test: dict[str, Any] | None = evaluated[0].result["test"] if evaluated else None
    return test
