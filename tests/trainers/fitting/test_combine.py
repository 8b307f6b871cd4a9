"""`relook models combine`: a bundle like any other, the same one each time, and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from rich.progress import Progress
from typer.testing import CliRunner

from cluster.cli import app
from cluster.model_card import model_card
from records.bundles import Architecture, Bundle, Geometry, Member, write_bundle
from records.datasets import DatasetVersion, build_version
from records.errors import ConfigError, RefusedError, RelookError, TaxonomyError
from records.frames import Crop
from records.models import find_bundle, register
from records.store import Store
from records.types import ModelRecord, Split
from trainers.evaluation.evaluate import predict_split
from trainers.evaluation.measure import measure_model
from trainers.fitting.combine import combine, shares_of
from trainers.fitting.fit import fit
from trainers.settings import TrainersSettings, WorkersSettings
from vision.inference.loaded import load_model

SETTINGS = TrainersSettings(precision="fp32", context=True, views=2, workers=WorkersSettings(threads=1, use_gpu=False))
OTHER = Geometry(side_px=32, mean=(0.4, 0.5, 0.6), std=(0.1, 0.2, 0.4))


@pytest.fixture(scope="module")
def dataset(filled_store: Store) -> DatasetVersion:
    return build_version(filled_store).version


@pytest.fixture(scope="module")
def members(filled_store: Store, dataset: DatasetVersion, make_bundle: Callable[..., Bundle]) -> list[Bundle]:
    made = [
        make_bundle(filled_store, "custom_cnn", 0, 32, dataset_id=dataset.id, views=2),
        make_bundle(filled_store, "custom_cnn", 1, 32, dataset_id=dataset.id, geometry=OTHER),
    ]
    with filled_store.ledger.begin() as tx:
        for bundle in made:
            register(tx, bundle)
    return made


@pytest.fixture(scope="module")
def combined(filled_store: Store, dataset: DatasetVersion, members: list[Bundle]) -> Bundle:
    return combine(filled_store, members, [2 / 3, 1 / 3], dataset, SETTINGS)


def test_it_is_calibrated_evaluated_and_reported_as_one_model(
    filled_store: Store, dataset: DatasetVersion, members: list[Bundle], combined: Bundle, tmp_path: Any
) -> None:
    document = combined.document
    assert document.architecture.name == "ensemble"
    assert [(member.model_id, member.weight) for member in document.members] == [
        (members[0].id, 2 / 3), (members[1].id, 1 / 3),
    ]  # fmt: skip
    assert document.context is not None
    assert document.views == 2
    assert document.suitability is not None
    assert document.operating.conformal_thresholds
    assert load_model(combined, precision="fp32").check_golden() < 1e-3
    # Logits are the weighted mean of the members' over the same views.
    found, *alone = (
        predict_split(filled_store, bundle, dataset, Split.VAL, actor="test").logits
        for bundle in (combined, members[0], _with_views(filled_store, members[1]))
    )
    assert found == pytest.approx(2 / 3 * alone[0] + 1 / 3 * alone[1], abs=1e-4)
    with Progress(disable=True) as bar:
        evaluation = measure_model(filled_store, combined, report=tmp_path / "report", precision="fp32", progress=bar)
    assert evaluation.balanced_accuracy == pytest.approx(document.metrics["val"]["balanced_accuracy"], abs=1e-6)
    assert evaluation.context is not None
    assert (tmp_path / "report" / "report.html").is_file()
    card = model_card(filled_store, combined)
    assert card.starting_weights is not None
    assert members[1].id[:12] in card.starting_weights


def _with_views(store: Store, bundle: Bundle) -> Bundle:
    document = bundle.document.model_copy(update={"views": 2})
    return write_bundle(store, document, bundle.weights(), bundle.golden())


def test_the_command_makes_the_same_bundle_again(
    filled_store: Store, members: list[Bundle], combined: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RELOOK_HOME", str(filled_store.home.root))
    names = [member.id[:12] for member in members]
    sets = ["--set", "trainers.context=true", "--set", "trainers.workers.threads=1"]
    done = CliRunner().invoke(app, ["models", "combine", *names, "--weights", "2,1", *sets, "--json"])
    assert done.exit_code == 0, done.exception
    printed = json.loads(done.stdout)
    # Views are the first member's, context is what `--set` says.
    assert printed["model_id"] == combined.id
    assert printed["members"] == {members[0].id: 2 / 3, members[1].id: 1 / 3}
    assert find_bundle(filled_store, combined.id).document.members == combined.document.members
    with filled_store.ledger.read() as tx:
        assert tx.require(ModelRecord, combined.id).architecture == "ensemble"
    refused = CliRunner().invoke(app, ["models", "combine", *names, "--weights", "1"])
    assert "2 numbers above 0" in str(refused.exception)


@pytest.mark.parametrize("text", ["1", "1,0", "1,-2", "1,nan", "1,inf", "1,x", "", "1,2,3", [], [1], [2.0, 0.0]])
def test_weights_that_are_none_are_refused(text: "str | list[float]") -> None:
    with pytest.raises(ConfigError, match="2 numbers above 0"):
        shares_of(text, 2)


def test_models_that_do_not_fit_together_are_refused(
    filled_store: Store, dataset: DatasetVersion, members: list[Bundle], make_bundle: Callable[..., Bundle]
) -> None:
    def refused(error: type[RelookError], words: str, *chosen: Bundle, of: DatasetVersion = dataset) -> None:
        with pytest.raises(error, match=words):
            combine(filled_store, chosen, shares_of(None, len(chosen)), of, SETTINGS)

    first = members[0]
    changed = {
        "elsewhere": {"dataset_id": "e" * 64},
        "foreign": {"dataset_id": dataset.id, "taxonomy_hash": "f" * 64},
        "orphan": {"dataset_id": dataset.id, "parent_model_id": "a" * 64},
        "made": {"dataset_id": dataset.id, "members": [Member(model_id="b" * 64, dataset_id="c" * 64, weight=1.0)]},
    }
    other = {
        name: replace(first, id=name[0] * 64, document=first.document.model_copy(update=fields))
        for name, fields in changed.items()
    }
    refused(ConfigError, "one model or more")
    refused(ConfigError, "named twice", first, first)
    larger = make_bundle(filled_store, "custom_cnn", 0, 64, dataset_id=dataset.id)
    refused(ConfigError, "differ in side .* 32 center, .* 64 center", first, larger)
    geometry = first.document.geometry.model_copy(update={"crop": Crop.WHOLE})
    whole = make_bundle(filled_store, "custom_cnn", 0, 32, dataset_id=dataset.id, geometry=geometry)
    refused(ConfigError, "or crop: .* 32 center, .* 32 whole", first, whole)
    refused(RefusedError, "not in this home, so nobody can tell", first, other["elsewhere"])
    refused(TaxonomyError, "member", first, other["foreign"])
    refused(RefusedError, "made of model aaaaaaaaaaaa", first, other["orphan"])
    refused(RefusedError, "made of model bbbbbbbbbbbb", first, other["made"])
    # A version of the same images whose splits changed places: what a member learned from is now held out.
    swapped = dataset.rows.assign(split=dataset.rows["split"].replace({"train": "test", "test": "train"}))
    refused(RefusedError, r"holds out \(test\)", *members, of=replace(dataset, id="d" * 64, rows=swapped))
    # Another image of a group that was trained on is as bad as the image.
    renamed = swapped.assign(image_id=[f"{number:064x}" for number in range(len(swapped))])
    refused(RefusedError, "others of their groups", *members, of=replace(dataset, id="d" * 64, rows=renamed))


def test_one_model_is_calibrated_anew_with_other_views_and_context(
    filled_store: Store, dataset: DatasetVersion, members: list[Bundle]
) -> None:
    whole = combine(filled_store, members[:1], shares_of(None, 1), dataset, SETTINGS)
    assert (whole.document.views, members[0].document.context) == (2, None)
    assert whole.document.context is not None
    assert [member.model_id for member in whole.document.members] == [members[0].id]
    found, alone = (
        predict_split(filled_store, bundle, dataset, Split.VAL, actor="test") for bundle in (whole, members[0])
    )
    assert found.logits == pytest.approx(alone.logits, abs=1e-5)
    once = combine(filled_store, members[:1], [1.0], dataset, SETTINGS.with_values({"views": 1, "context": False}))
    assert (once.document.views, once.document.context) == (1, None)
    one_view = predict_split(filled_store, once, dataset, Split.VAL, actor="test").logits
    assert np.abs(one_view - alone.logits).max() > 1e-3


def test_an_ensemble_is_not_trained_further(
    filled_store: Store, dataset: DatasetVersion, combined: Bundle, tmp_path: Any
) -> None:
    with pytest.raises(ConfigError, match="start from one of its members"):
        fit(filled_store, SETTINGS, dataset, run_dir=tmp_path, use_ray=False, start_from=combined)
    assert not np.isnan(combined.golden()["logits"]).any()
    assert isinstance(combined.document.architecture, Architecture)
