"""Selection of images for annotators: from the store or from a folder, by every rule."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from cluster.cli import run
from cluster.selection import out_of_fold_probabilities, pool_of, select_images, take_in_folder
from labeling.acquisition.registry import DEFAULT_MIX, RULES
from records.bundles import (
    Architecture,
    Bundle,
    BundleDocument,
    Calibration,
    Geometry,
    OperatingPoints,
    write_bundle,
)
from records.errors import DataError
from records.frames import Frame
from records.ids import new_id, utc_now
from records.models import register, serve_model
from records.store import Store
from records.types import (
    Annotation,
    AnnotationKind,
    Confirmation,
    Image,
    ModelStatus,
    ReasonCode,
    ReviewItem,
    SourceLabel,
)
from vision.inference.loaded import load_model, reference_logits
from vision.networks import build_model

SIDE_PX = 64


@pytest.fixture
def model(store: Store) -> Bundle:
    """A network with random weights that serves."""
    codes = store.taxonomy.codes
    network = build_model("custom_cnn", len(codes)).eval()
    geometry = Geometry(side_px=SIDE_PX)
    inputs = np.random.default_rng(0).integers(0, 256, (2, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    document = BundleDocument(
        taxonomy=store.taxonomy,
        taxonomy_hash=store.taxonomy.hash,
        architecture=Architecture(name="custom_cnn"),
        geometry=geometry,
        class_priors=dict.fromkeys(codes, 1 / len(codes)),
        calibration=Calibration(bias=[0.0] * len(codes)),
        operating=OperatingPoints(
            refer={}, refer_malignant=None, urgent_threshold=0.9, conformal_thresholds=dict.fromkeys(codes, 0.7)
        ),
        dataset_id="d" * 64,
        config={},
        code_version="test",
        num_threads=1,
        metrics={},
        explanation={},
    )
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    arrays = {"inputs": inputs, "logits": reference_logits(network, inputs, geometry)}
    bundle = write_bundle(store, document, weights, arrays)
    with store.ledger.begin() as tx:
        register(tx, bundle)
        serve_model(tx, bundle.id, ModelStatus.CHAMPION, replaces=None)
    return bundle


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine images, two of them identical, and a file that is no image."""
    made = tmp_path / "pool"
    made.mkdir()
    for number in range(9):
        chance = np.random.default_rng(max(number, 1))
        pixels = chance.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        PillowImage.fromarray(pixels).resize((80, 80), PillowImage.Resampling.BICUBIC).save(made / f"p{number}.png")
    (made / "broken.jpg").write_bytes(b"no image")
    return made


def _items(store: Store) -> list[ReviewItem]:
    with store.ledger.read() as tx:
        return tx.find(ReviewItem, order_by=("-priority",))


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule_selects_with_a_real_model(store: Store, model: Bundle, folder: Path, rule: str) -> None:
    among, refused = take_in_folder(store, folder, Frame(SIDE_PX))
    assert (len(among), len(refused)) == (8, 1)
    assert "broken.jpg" in refused[0]
    assert select_images(store, model, {rule: 3}, among=among) == 3
    items = _items(store)
    assert len({item.image_id for item in items}) == 3
    assert [item.priority for item in items] == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert {tuple(item.reasons) for item in items} == {(ReasonCode.SELECTED,)}
    assert all(np.max(item.heat_map) == 255 for item in items)
    assert select_images(store, model, {rule: 30}) == 5, "no image is selected twice"


def test_the_command_takes_a_folder_and_a_mix(
    store: Store, model: Bundle, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = ["--set", f"records.home={store.home.root}", "--json"]
    mix = ["--mix", "random=2", "--mix", "k_center=3"]
    assert run(["label", "select", "--pool", str(folder), *mix, *home]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["selected"], said["pool"], said["model_id"]) == (5, 8, model.id)
    assert len(said["refused"]) == 1
    for wrong in (["--rule", "luck"], ["--mix", "random"], ["--pool", str(folder / "none")]):
        assert run(["label", "select", *wrong, *home]) == 2
        assert "error" in json.loads(capsys.readouterr().out)


def test_the_pool_knows_the_class_shares_and_the_labels_so_far(store: Store, model: Bundle, folder: Path) -> None:
    among, _ = take_in_folder(store, folder, Frame(SIDE_PX))
    codes = store.taxonomy.codes
    imported = [(among[0], "nv"), (among[1], "mel"), (among[2], "nv"), (among[2], "bcc")]  # the last is a correction
    with store.ledger.begin() as tx:
        for number, (image_id, label) in enumerate(imported):
            tx.add(
                SourceLabel(
                    id=f"{number}", image_id=image_id, label=label, confirmation=Confirmation.FOLLOW_UP,
                    source=f"import:{number}" if number < 3 else "correction:1:x", created_at=utc_now(),
                )
            )  # fmt: skip
        items = [
            ReviewItem(id=new_id(), created_at=utc_now(), image_id=i, reasons=[ReasonCode.SELECTED], priority=1.0)
            for i in (among[0], among[3], among[4])
        ]
        tx.add(*items)
        for number, (item, label) in enumerate(zip(items, ("mel", "mel", None), strict=True)):
            tx.add(
                Annotation(
                    id=new_id(), created_at=utc_now(), image_id=item.image_id, review_item_id=item.id, label=label,
                    task_id=number, annotation_id=number, annotator="a", annotated_at=utc_now(), server="http://ls",
                    kind=AnnotationKind.CLASS if label else AnnotationKind.CANT_TELL, project_id=1, revision="0",
                )
            )  # fmt: skip
        images = [tx.get(Image, image_id) for image_id in among[5:]]
    shares = dict(zip(codes, np.arange(1, 8) / 28, strict=True))
    pool = pool_of(store, load_model(model), images, ["rare_margin"], shares=shares)
    assert pool.label_counts is not None
    counts = dict(zip(codes, pool.label_counts.tolist(), strict=True))
    assert counts == dict.fromkeys(codes, 0) | {"nv": 1, "bcc": 1, "mel": 2}
    assert pool.class_shares is not None
    np.testing.assert_allclose(pool.class_shares, np.arange(1, 8) / 28)
    uncalibrated = pool_of(store, load_model(model), images, ["margin"])
    assert (uncalibrated.class_shares, uncalibrated.label_counts) == (None, None)


def test_without_a_rule_the_budget_is_shared_by_the_default_mix(
    store: Store, model: Bundle, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = ["--set", f"records.home={store.home.root}", "--json"]
    assert run(["label", "select", "--pool", str(folder), "--budget", "20", *home]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rule"], found["mix"]) == (None, {"random": 2, "rare_margin": 12, "expected_miss_cost": 6})
    # Every lesion once, as there are fewer than the budget.
    assert found["selected"] == len(_items(store)) == 8
    assert sum(DEFAULT_MIX.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(("setting", "given"), [(None, "equal"), ("natural", "natural")])
def test_the_setting_says_which_probabilities_rules_read(
    store: Store, model: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch, setting: str | None, given: str
) -> None:
    import cluster.selection

    asked: list[str] = []
    real = cluster.selection.choose_mixed
    monkeypatch.setattr(
        cluster.selection,
        "choose_mixed",
        lambda *args, **named: asked.append(named["prevalence"]) or real(*args, **named),
    )
    changed = ["--set", f"labeling.prevalence={setting}"] if setting else []
    home = ["--set", f"records.home={store.home.root}", "--json"]
    assert run(["label", "select", "--pool", str(folder), "--rule", "margin", *changed, *home]) == 0
    assert asked == [given]


def test_a_folder_without_images_is_named(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image"):
        take_in_folder(store, tmp_path, Frame(SIDE_PX))


def test_dropout_passes_differ_and_are_reproducible(model: Bundle) -> None:
    loaded = load_model(model)
    pixels = np.random.default_rng(1).integers(0, 256, (3, SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    samples = loaded.dropout_samples(pixels, 4, seed=5)
    assert samples.shape == (4, 3, 7)
    np.testing.assert_allclose(samples.sum(axis=2), 1.0, atol=1e-6)
    assert np.ptp(samples, axis=0).max() > 0
    np.testing.assert_array_equal(samples, loaded.dropout_samples(pixels, 4, seed=5))
    np.testing.assert_allclose(loaded.dropout_samples(pixels, 1, dropout=0.0)[0], loaded.predict(pixels).probabilities)
    assert loaded.describe(pixels).shape[0] == 3


def test_without_usable_images_nothing_is_selected(store: Store, model: Bundle, folder: Path) -> None:
    assert select_images(store, model, {"random": 3}) == 0
    among, _ = take_in_folder(store, folder, Frame(SIDE_PX))
    assert take_in_folder(store, folder, Frame(SIDE_PX))[0] == among, "known images are not taken in again"
    assert select_images(store, model, {"random": 0}) == 0
    shutil.rmtree(store.home.cache)
    for image_id in among:
        store.blobs.delete(image_id)
    assert select_images(store, model, {"random": 3}) == 0
    assert _items(store) == []


def test_the_command_selects_from_the_store(
    store: Store, model: Bundle, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    take_in_folder(store, folder, Frame(SIDE_PX))
    assert (
        run(
            [
                "label",
                "select",
                "--rule",
                "random",
                "--budget",
                "2",
                "--set",
                f"records.home={store.home.root}",
                "--json",
            ]
        )
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert (said["selected"], said["pool"]) == (2, None)


def test_no_row_is_predicted_from_its_own_group() -> None:
    """Two classes far apart, and a group whose label is wrong: the others say so. One class has a single group."""
    chance = np.random.default_rng(0)
    labels = np.array([0, 1] * 12 + [2, 2])
    groups = np.array([f"g{row // 2}" for row in range(26)], dtype=object)
    features = np.stack([3.0 * labels, np.zeros(26)], axis=1) + chance.normal(0, 0.1, (26, 2))
    wrong = labels.copy()
    wrong[0] = 1
    found = out_of_fold_probabilities(features.astype(np.float32), wrong, groups, 4)
    assert found.sum(axis=1) == pytest.approx(np.ones(26))
    assert found[:24].argmax(axis=1).tolist() == labels[:24].tolist()
    assert found[24:, 2].tolist() == [0.0, 0.0], "no other group shows this class"
    assert found[:, 3].tolist() == [0.0] * 26
