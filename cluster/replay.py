"""Replay of a finished round: fit and evaluate its winner again, and compare the results with its manifest.

In: the number of a round. Out: a `Replay`. The fit gets its own folder; reading the test split is audited.
Nothing is registered, rolled out or sent to annotators.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cluster.provenance import installed_packages, read_manifest
from cluster.session import ray_is_running
from records.datasets import load_dataset
from records.ids import new_id
from records.store import Store
from records.types import Split
from trainers.evaluation.evaluate import evaluate, predict_split
from trainers.fitting.fit import fit
from trainers.settings import TrainersSettings

TOLERANCE = {"fp32": 0.0, "bf16": 1e-3}
"""Allowed difference of a figure by precision, on the same kind of processor with the same packages."""

_COMPARED = ("balanced_accuracy", "accuracy", "macro_auc", "ece")


class Replay(BaseModel):
    """The result of a replay."""

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    round: int
    same_model: bool = Field(description="the bundle is bit-identical")
    model_id: str
    precision: str
    differences: dict[str, float | None] = Field(
        description="replayed minus recorded, by figure on the test split; empty if only one of them is defined"
    )
    within_tolerance: bool
    other_packages: dict[str, list[str]] = Field(description="package: [then, now], where they differ")


def replay_round(store: Store, number: int) -> Replay:
    """Fit and evaluate the winner of a finished round again, and compare.

    Args:
        store: with the round's dataset version.
        number: of the round.
    Returns:
        The comparison.
    Raises:
        UnknownIdError: there is no such round, or its dataset version is gone.
        RefusedError: the round has not ended.
        IntegrityError: manifest or dataset version was altered.
    """
    manifest, recorded = read_manifest(store.home, number)
    settings = TrainersSettings.model_validate(recorded.winner)
    dataset = load_dataset(store, recorded.dataset_id)
    # A new folder per replay: in the round's own folder the fit would resume from its checkpoints and train nothing.
    run_dir = store.home.runs / f"replay-{number:04d}-{new_id()[-8:]}"
    bundle = fit(store, settings, dataset, run_dir=run_dir, use_ray=ray_is_running())
    predictions = predict_split(store, bundle, dataset, Split.TEST, actor=f"replay of round {number}")
    figures = evaluate(predictions, store.taxonomy, bundle.document.operating).model_dump(mode="json")
    differences = {name: _difference(figures[name], recorded.test[name]) for name in _COMPARED}
    precision = str(bundle.document.config.get("precision", "fp32"))
    # bf16 is not reproducible to the last bit, so anything that is not fp32 gets the wider tolerance.
    allowed = TOLERANCE["fp32" if precision == "fp32" else "bf16"]
    now = installed_packages()
    return Replay(
        round=number,
        same_model=bundle.id == recorded.model_id,
        model_id=bundle.id,
        precision=precision,
        differences=differences,
        within_tolerance=all(value is not None and abs(value) <= allowed for value in differences.values()),
        other_packages={
            name: [then, now.get(name, "none")] for name, then in manifest.packages.items() if now.get(name) != then
        },
    )


def _difference(replayed: Any, recorded: Any) -> float | None:
    """Return the difference of two figures: 0 if both are undefined, None if only one is."""
    if replayed is None and recorded is None:
        return 0.0
    if replayed is None or recorded is None:
        return None
    return float(replayed) - float(recorded)
