"""Decision rule and operating point of a bundle: the same decisions on every way that an image can take."""

import csv
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from images.decode import decode_frame
from records.bundles import Bundle, OperatingPoints, PointName, ReferPoints, Rule, write_bundle
from records.frames import Frame
from records.models import find_bundle
from records.store import Store
from serving.bulk import predict_folder
from serving.client import Client
from serving.direct import predict_given
from serving.page.prediction_view import prediction_html
from serving.responses import prediction_body
from serving.schemas import Context
from serving.settings import ServingSettings
from serving.triage import TriageRules, triage
from tests.service import refer_point
from tests.serving.test_context import HEAD
from tests.serving.test_words import TAXONOMY, prediction
from trainers.fitting.combine import ensemble_of
from vision.calibration.decision import RULES, decision_rule, labels_of
from vision.calibration.operating import answered
from vision.inference.golden import golden_arrays
from vision.inference.loaded import load_model

SETTINGS = ServingSettings(audit_share=0.0, low_confidence=0.0, precision="fp32")
IMAGES = 6
KNOWN = {"age": 72.0, "sex": "male", "localization": "back"}
POINTS: tuple[PointName, ...] = ("proven", "target")
PAIRS = list(product(RULES, POINTS))


def bundle_of(store: Store, tools: Any, pixels: Any, rule: Rule, point: PointName) -> Bundle:
    """The same tiny network each time, with thresholds between the probabilities of the images.

    At the point `target` it is an ensemble of two, averages over two views and uses context as well.
    """
    plain = tools.make_bundle(store, bias={"nv": 1.5})
    if point == "target":
        architecture, network = ensemble_of([plain, tools.make_bundle(store, 1)], [0.7, 0.3])
        document = plain.document.model_copy(update={"context": HEAD, "views": 2, "architecture": architecture})
        golden = golden_arrays(network, document.geometry, 2)
        stored = {name: value.numpy() for name, value in network.state_dict().items()}
        plain = write_bundle(store, document, stored, golden)
    codes = store.taxonomy.codes
    probabilities = load_model(plain, precision="fp32").predict(pixels, context=[KNOWN] * IMAGES).probabilities
    mel = np.sort(probabilities[:, codes.index("mel")])
    # Between two probabilities, so that rounding refers no other images; the target refers one, the other point all but
    # one.
    refer = {"proven": float(mel[:2].mean()), "target": float(mel[-2:].mean())}
    points = {name: ReferPoints(refer={"mel": refer_point(value)}) for name, value in refer.items()}
    shares = probabilities.mean(axis=0)
    decision = decision_rule(rule, store.taxonomy, dict(zip(codes, shares.tolist(), strict=True)), point)
    other = points["proven" if point == "target" else "target"]
    operating = OperatingPoints(
        refer=points[point].refer,
        conformal_thresholds=dict.fromkeys(codes, 0.75),
        decision=decision.model_copy(update={"other": other}),
    )
    document = plain.document.model_copy(update={"operating": operating})
    return write_bundle(store, document, plain.weights(), plain.golden())


@pytest.fixture
def folder(tmp_path: Path, make_image: Callable[..., bytes]) -> Path:
    made = tmp_path / "images"
    made.mkdir()
    for number in range(IMAGES):
        (made / f"{number}.jpg").write_bytes(make_image(number))
    return made


def until(holds: Callable[[], bool]) -> None:
    for _ in range(2400):
        if holds():
            return
        time.sleep(0.05)
    raise AssertionError("the service did not load the model within two minutes")


def decided(one: Any) -> tuple[Any, ...]:
    reasons = tuple(getattr(reason, "code", reason) for reason in one.reasons)
    return one.label, tuple(one.prediction_set), str(one.decision), tuple(map(str, reasons))


def confidences(way: Any) -> Any:
    # A batch sums in another order than one image.
    return pytest.approx([one.confidence for one in way], abs=1e-5)


def bulk_rows(bundle: Bundle, folder: Path, out: Path) -> list[tuple[Any, ...]]:
    about = out.with_suffix(".about.csv")
    about.write_text("image_id,age,sex,localization\n" + "".join(f"{n},72,male,back\n" for n in range(IMAGES)))
    predict_folder(bundle, folder, out, SETTINGS, context=about)
    with out.open() as file:
        rows = sorted(csv.DictReader(file), key=lambda row: row["image"])
    kept = [(row["label"], float(row["confidence"]), row["decision"], row["reasons"].split()) for row in rows]
    return [(label, said, tuple(reasons), confidence) for label, confidence, said, reasons in kept]


def test_every_way_decides_alike_for_every_rule_and_point(
    store: Store, tools: Any, folder: Path, tmp_path: Path
) -> None:
    files = sorted(folder.iterdir())
    data = [path.read_bytes() for path in files]
    pixels = np.stack([decode_frame(one, Frame(tools.side_px)) for one in data])
    bundles = {(rule, point): bundle_of(store, tools, pixels, rule, point) for rule, point in PAIRS}
    seen = {}
    tools.serve_bundle(store, bundles["natural", "proven"])
    settings = SETTINGS.model_copy(update={"port": tools.free_port(), "model_poll_s": 0.05})
    with tools.run_service(store, settings) as service, Client(service.url) as client:
        for (rule, point), bundle in bundles.items():
            if rule != "natural" or point != "proven":
                tools.serve_bundle(store, bundle)
            until(lambda bundle=bundle: client.model().id == bundle.id)
            single = [client.predict(one, context=Context(**KNOWN)) for one in data]
            batched = client.predict_many(data, contexts=[Context(**KNOWN)] * IMAGES)
            batch = [item.prediction for item in batched.items]
            again = [client.prediction(one.id) for one in single]
            details = client.model_details(bundle.id)
            assert (details.rule, details.point) == (rule, point)
            loaded = load_model(bundle, precision="fp32")
            here = predict_given(bundle, loaded, files, SETTINGS, context=KNOWN)
            # The stored image, the model that the prediction names: what was decided can be computed again.
            named = find_bundle(store, single[0].model.id)
            replayed = predict_given(
                named, loaded, [store.blobs.get(one.image_id) for one in single], SETTINGS, context=KNOWN
            )
            want = [decided(one) for one in single]
            for way in (batch, again, replayed, here):
                assert [decided(one) for one in way] == want
                assert [one.confidence for one in way] == confidences(single)
            in_bulk = bulk_rows(bundle, folder, tmp_path / f"{rule}-{point}.csv")
            assert [row[:3] for row in in_bulk] == [(label, said, why) for label, _, said, why in want]
            assert [row[3] for row in in_bulk] == confidences(single)
            expected = labels_of(loaded.predict(pixels, context=[KNOWN] * IMAGES).probabilities, loaded.decision)
            assert [one.label for one in single] == [store.taxonomy.codes[index] for index in expected]
            assert [one.label_in_set for one in single] == [one.label in one.prediction_set for one in single]
            seen[rule, point] = want
    # The rules name different classes, and the points refer different images: otherwise the above would show nothing.
    assert len({tuple(w[0] for w in seen[rule, "proven"]) for rule in RULES}) == 3
    for rule in RULES:
        referred = [["refer" in w[3] for w in seen[rule, point]] for point in POINTS]
        assert sum(referred[0]) > sum(referred[1]) > 0


def test_a_label_outside_its_set_is_told_as_one_story() -> None:
    shares = {"akiec": 0.02, "bcc": 0.02, "bkl": 0.2, "df": 0.02, "mel": 0.2, "nv": 0.52, "vasc": 0.02}
    stored = prediction(
        label="nv", confidence=0.52, probabilities=shares, prediction_set=["bkl", "mel"], reasons=["prediction_set"]
    )
    body = prediction_body(stored, None, None, TAXONOMY)
    assert body.label_in_set is False
    (reason,) = body.reasons
    assert reason.text.startswith("The label, Melanocytic nevus, is not among the classes that cannot be excluded")
    names = {one.code: one.name for one in TAXONOMY.classes}
    html = prediction_html(body, names, frozenset())
    assert "The label, Melanocytic nevus, is not among them" in html
    assert 'id="rl-label"' not in html
    inside = prediction_body(stored.model_copy(update={"prediction_set": ["nv"]}), None, None, TAXONOMY)
    assert inside.label_in_set is True
    assert "not among" not in prediction_html(inside, names, frozenset())
    assert prediction_body(stored.model_copy(update={"label": None}), None, None, TAXONOMY).label_in_set is None


def test_a_label_that_is_not_the_most_likely_class_is_explained() -> None:
    shares = {"akiec": 0.02, "bcc": 0.02, "bkl": 0.02, "df": 0.02, "mel": 0.2, "nv": 0.7, "vasc": 0.02}
    stored = prediction(
        label="mel", confidence=0.2, probabilities=shares, prediction_set=["mel", "nv"], reasons=["low_confidence"]
    )
    body = prediction_body(stored, None, None, TAXONOMY)
    assert body.reasons[0].text == "The label has a probability of only 20 %."
    html = prediction_html(body, {one.code: one.name for one in TAXONOMY.classes}, frozenset({"mel"}))
    assert "Label: Melanoma, 20 %" in html
    assert "Melanocytic nevus is more likely, 70 %." in html
    assert "Most likely" not in html


def test_a_label_outside_a_small_plain_set_goes_to_review() -> None:
    codes = TAXONOMY.codes
    row = np.full(7, 0.01)
    row[[codes.index("nv"), codes.index("bkl"), codes.index("df")]] = 0.52, 0.3, 0.14
    # Nevi have more than 0.8 at calibration, the others may have less.
    operating = OperatingPoints(conformal_thresholds={**dict.fromkeys(codes, 0.75), "nv": 0.2})
    verdict = triage(row, TAXONOMY, operating, TriageRules(0.0, 2, 0.0), 0.5)
    assert (verdict.label, verdict.prediction_set) == ("nv", ("bkl",))
    assert (verdict.decision, verdict.reasons) == ("review", ("prediction_set",))
    assert not answered(row[None], TAXONOMY, operating)[0]
