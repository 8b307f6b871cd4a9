"""`relook labels value`: the curve, the classes and the last round, for a network with random weights."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from threadpoolctl import threadpool_limits

from cluster.cli import run
from cluster.label_value import Figure, RoundValue, value_of_labels
from cluster.label_verbs import shown
from cluster.selection import take_in_folder
from images.importer import import_folder, open_dataset
from images.synth import synthesize
from records.bundles import Bundle
from records.datasets import DatasetVersion, build_version
from records.errors import DataError
from records.frames import Frame
from records.store import Store
from records.types import Confirmation, ResolvedLabel, Split
from serving.label_value import label_value

SIDE_PX = 32


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Heads this small take ten times as long where the threads of BLAS wait for each other on busy cores."""
    with threadpool_limits(1):
        yield


def _said(image_id: str, label: str) -> ResolvedLabel:
    return ResolvedLabel(image_id=image_id, label=label, confirmation=Confirmation.SINGLE_READER, annotators=["anna"])


@pytest.fixture
def imported(store: Store, tmp_path: Path) -> DatasetVersion:
    """Generated lesions, as many of each class."""
    synthesize(tmp_path / "data", lesions=105, seed=5, width_px=80, shares=dict.fromkeys(store.taxonomy.codes, 1 / 7))
    import_folder(store, tmp_path / "data", frames=(Frame(SIDE_PX),))
    return open_dataset(store, None)


def test_it_says_what_labels_and_the_last_round_bought(
    store: Store,
    imported: DatasetVersion,
    make_bundle: Callable[..., Bundle],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bundle = make_bundle(store, "custom_cnn", 0, SIDE_PX)
    first = value_of_labels(store, bundle, imported)
    assert first.last_round is None
    assert first.labels == len(imported.split(Split.TRAIN)) == first.curve[-1][0]
    for _, figure in [*first.curve, (0, first.gain_of_next)]:
        assert None not in (figure.value, figure.low, figure.high)
        assert figure.low <= figure.value <= figure.high
    # Half of these labels are too few points to predict the other half from.
    assert first.checked is None
    assert {one.code for one in first.classes} == set(store.taxonomy.codes)
    assert sum(one.labels for one in first.classes) == first.labels

    synthesize(tmp_path / "pool", lesions=20, seed=6, width_px=80)
    pool, _ = take_in_folder(store, tmp_path / "pool", Frame(SIDE_PX))
    earlier = [_said(image_id, "nv") for image_id in pool[:4]]
    parent = build_version(store, resolved=earlier, round_number=1, parent_id=imported.id).version
    later = [_said(pool[0], "mel"), *earlier[1:], *(_said(image_id, "bcc") for image_id in pool[4:9])]
    version = build_version(store, resolved=later, round_number=2, parent_id=parent.id).version

    home = ["--set", f"records.home={store.home.root}"]
    assert run(["labels", "value", "--model", str(bundle.path), *home, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["dataset_id"] == version.id
    found = said["last_round"]
    assert (found["number"], found["new"], found["changed"]) == (2, 5, {"nv -> mel": 1})
    assert set(found["recall_gain"]) == set(store.taxonomy.codes)

    # The service shows it without computing it again.
    kept = label_value(store)
    assert (kept.dataset_id, kept.model_id, kept.labels) == (version.id, bundle.id, said["labels"])
    assert kept.model_dump(mode="json", exclude={"created_at"}) == said

    console = Console(width=200)
    with console.capture() as printed:
        console.print(shown(first))
    assert f"{first.curve[-1][1].value:.3f}" in printed.get()
    assert "No label of this version came from a round of annotations." in printed.get()
    figures = RoundValue(**{**found, "gain": Figure(**found["gain"]), "recall_gain": {}})
    with console.capture() as printed:
        console.print(shown(replace(first, last_round=figures)))
    assert "Round 2: 5 images got their first label; changed labels: 1 x nv -> mel." in printed.get()


def test_a_home_with_too_few_labels_is_refused(
    store: Store, make_bundle: Callable[..., Bundle], tmp_path: Path
) -> None:
    synthesize(tmp_path / "data", lesions=14, seed=5, width_px=80)
    import_folder(store, tmp_path / "data", frames=(Frame(SIDE_PX),))
    with pytest.raises(DataError, match="needs 60 labelled images on train"):
        value_of_labels(store, make_bundle(store, "custom_cnn", 0, SIDE_PX), open_dataset(store, None))
