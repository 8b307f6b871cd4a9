"""The change record: what changed when a model began to answer, for whoever has to account for it.

One JSON file per promotion in `runs/changes/`: data, gate, what its settings and packages differ in
from the model before. It is written after the promotion and may be written again.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from cluster.gate import GateReport
from cluster.manifest import installed_packages
from records.bundles import Bundle
from records.datasets import load_dataset
from records.ids import utc_now
from records.models import find_bundle
from records.store import Store
from records.stored import find_images
from records.types import DatasetRecord, RoundStep, Split


def write_change_record(
    store: Store, model_id: str, gate: GateReport | None, actor: str, *, forced_because: str | None = None
) -> Path:
    """Write the change record of a promotion.

    Args:
        store: with model and data.
        model_id: of the model that answers now.
        gate: what the gate said, None if it was not asked.
        actor: who promoted it.
        forced_because: the reason, if it was promoted against the gate.
    Returns:
        The file.
    """
    bundle = find_bundle(store, model_id)
    before = find_bundle(store, gate.champion) if gate and gate.champion else None
    record = {
        "model_id": model_id,
        "replaces": before.id if before else None,
        "at": utc_now().isoformat(),
        "by": actor,
        "forced_because": forced_because,
        "gate": gate.model_dump(mode="json") if gate else None,
        "data": _data(store, bundle),
        "settings_changed": _difference(before.document.config if before else {}, bundle.document.config),
        "code_version": [before.document.code_version if before else None, bundle.document.code_version],
        "packages": installed_packages(),
        "test": _test_figures(store, model_id),
    }
    folder = store.home.runs / "changes"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{model_id}.json"
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    temporary.replace(path)
    return path


def _data(store: Store, bundle: Bundle) -> dict[str, Any]:
    """Say what the model was trained on; a bundle from elsewhere names data that are not here."""
    dataset_id = bundle.document.dataset_id
    with store.ledger.read() as tx:
        if tx.get(DatasetRecord, dataset_id) is None:
            return {"dataset_id": dataset_id, "here": False}
    dataset = load_dataset(store, dataset_id)
    train = dataset.split(Split.TRAIN)
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
    """Return field: [before, after] for every field that differs."""
    names = sorted({*before, *after})
    return {name: [before.get(name), after.get(name)] for name in names if before.get(name) != after.get(name)}


def _test_figures(store: Store, model_id: str) -> dict[str, Any] | None:
    """Return the figures on the test split that the model's round reported, if a round made it."""
    with store.ledger.read() as tx:
        fits = [step for step in tx.find(RoundStep, where={"step": "fit"}) if step.result["model_id"] == model_id]
        if not fits:
            return None
        evaluated = tx.find(RoundStep, where={"round_id": fits[0].round_id, "step": "evaluate"})
    test: dict[str, Any] | None = evaluated[0].result["test"] if evaluated else None
    return test
