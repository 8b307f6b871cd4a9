"""The report: one file that needs no other, words for somebody who decides, and no verdict on a patient."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from images.importer import open_dataset
from records.bundles import OperatingPoints, read_bundle
from records.taxonomy import load_taxonomy
from trainers.evaluation.evaluate import evaluate, predict_split
from trainers.evaluation.figures import KeyClassReport, SliceReport
from trainers.evaluation.report.mistakes import worst_mistakes
from trainers.evaluation.report.words import cards, warnings_of
from trainers.evaluation.report.write import write_report
from trainers.evaluation.slices import with_slices
from vision.inference.loaded import load_model

VERDICTS = re.compile(r"\b(benign|harmless|safe|no cancer|healthy|nan)\b", re.IGNORECASE)


@pytest.fixture(scope="module")
def reported(filled_store, make_bundle, tmp_path_factory):
    dataset = open_dataset(filled_store, None)
    bundle = make_bundle(filled_store, "custom_cnn", side_px=32, dataset_id=dataset.id)
    model = load_model(bundle, precision="fp32")
    from records.types import Split

    found = predict_split(filled_store, bundle, dataset, Split.TRAIN, actor="test", model=model)
    taxonomy, operating = bundle.document.taxonomy, bundle.document.operating
    evaluation = with_slices(evaluate(found, taxonomy, operating), found, taxonomy, operating)
    folder = tmp_path_factory.mktemp("report") / "report"
    path = write_report(folder, bundle, model, found, evaluation)
    return path, found, evaluation


def test_the_report_needs_no_other_file(reported):
    html = reported[0].read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', html)
    assert "<script" not in html
    assert html.count("data:image/svg+xml") >= 4
    assert len(html) < 6_000_000


def test_it_shows_and_names_no_image_unless_asked(reported, filled_store, tmp_path):
    path, found, evaluation = reported
    html = path.read_text()
    assert "data:image/png" not in html
    names = [name for name in found.images.names if name in html]
    assert names == []
    assert found.image_ids[worst_mistakes(found, filled_store.taxonomy, OperatingPoints())[0]][:12] in html
    bundle = read_bundle(filled_store.home.bundles / evaluation.model_id)
    asked = write_report(tmp_path, bundle, load_model(bundle, precision="fp32"), found, evaluation, embed_images=True)
    assert "data:image/png" in asked.read_text()
    assert any(name in asked.read_text() for name in found.images.names)


def test_metrics_beside_it_are_the_evaluation(reported):
    path, _, evaluation = reported
    assert json.loads((path.parent / "metrics.json").read_text()) == json.loads(evaluation.model_dump_json())


def test_no_verdict_on_a_patient(reported):
    text = re.sub(r"data:[^\"]+", "", reported[0].read_text())
    text = re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL)
    assert not VERDICTS.search(text)
    assert "not a diagnosis" in text


def test_the_first_screen_says_what_matters(reported):
    _, _, evaluation = reported
    taxonomy = load_taxonomy("ham10000")
    first = cards(evaluation, taxonomy)
    assert any("right, every class counting alike" in card.title for card in first)
    assert all(card.text.endswith(".") for card in first)
    assert all(sentence for sentence in warnings_of(evaluation, taxonomy))


def test_what_is_not_known_has_no_card(reported):
    _, _, evaluation = reported
    taxonomy = load_taxonomy("ham10000")
    titles = [card.title for card in cards(evaluation, taxonomy)]
    without = evaluation.model_copy(update={"answered_share": None, "key_class": None})
    assert set(titles) - {card.title for card in cards(without, taxonomy)} >= {"images left to the model alone"}
    key = KeyClassReport.model_construct(
        name="mel", sensitivity=0.9, sensitivity_ci=(0.8, 1.0), lesions=40, specificity=None
    )
    (card, *_) = cards(without.model_copy(update={"key_class": key}), taxonomy)
    assert (card.figure, card.title) == ("90 of 100", "melanoma lesions referred")
    assert "that are not" not in card.text


def test_groups_below_the_average_and_maps_that_show_nothing_are_warned_of(reported):
    _, _, evaluation = reported
    taxonomy = load_taxonomy("ham10000")
    present = sum(report.support > 0 for report in evaluation.per_class.values())
    low = SliceReport.model_construct(balanced_accuracy=0.1, balanced_accuracy_ci=(0.0, 0.2), classes=present)
    other = SliceReport.model_construct(balanced_accuracy=0.1, balanced_accuracy_ci=(0.0, 0.2), classes=present - 1)
    gains = SimpleNamespace(gain_ci=(-0.1, 0.2))
    useless = SimpleNamespace(
        insertion=gains, deletion=gains, mask_energy=SimpleNamespace(energy_ci=(0.1, 0.3), area=0.2),
        randomisation_similarity=0.8,
    )  # fmt: skip
    useful = SimpleNamespace(
        insertion=SimpleNamespace(gain_ci=(0.1, 0.2)), deletion=gains, mask_energy=None, randomisation_similarity=None
    )
    changed = evaluation.model_copy(
        update={
            "balanced_accuracy": 0.5,
            "slices": {"body_site": {"back": low, "face": other}},
            "explanations": useless,
            "prevalence": {"nv": 1.0},
        }
    )
    said = warnings_of(changed, taxonomy)
    assert "Below the average by more than chance, by body site: back (10 %)." in said
    for text in ("no better than shuffled ones", "no more on the lesion", "much like those of an untrained network",
                 "re-weighted to a stated prevalence"):  # fmt: skip
        assert any(text in one for one in said), text
    fine = changed.model_copy(update={"explanations": useful, "slices": {}, "prevalence": None})
    assert not any("heat maps" in one or "Below the average" in one for one in warnings_of(fine, taxonomy))


def test_slices_cover_what_is_known_and_name_what_they_leave_out(reported):
    _, found, evaluation = reported
    assert "confirmation" in evaluation.slices or "confirmation" in evaluation.slice_notes
    for field, reports in evaluation.slices.items():
        values = [getattr(traits, field) for traits in found.traits]
        for value, report in reports.items():
            assert report.images == values.count(value) >= 20
            hits = [found.probabilities[i].argmax() == found.labels[i] for i, one in enumerate(values) if one == value]
            assert report.accuracy == pytest.approx(np.mean(hits))


def test_the_costliest_mistake_comes_first_and_a_lesion_once(reported):
    taxonomy = load_taxonomy("ham10000")
    mel, nv = taxonomy.index_of("mel"), taxonomy.index_of("nv")
    probabilities = np.full((4, 7), 0.01)
    for row, (predicted, share) in enumerate([(nv, 0.94), (nv, 0.5), (mel, 0.94), (nv, 0.94)]):
        probabilities[row, predicted] = share
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    found = replace(
        reported[1],
        image_ids=list("abcd"), group_ids=list("abcd"), lesion_ids=["A", "A", "B", None],
        labels=np.array([mel, mel, nv, nv]), logits=np.zeros((4, 7), np.float32), probabilities=probabilities,
        traits=None, images=None,
    )  # fmt: skip
    assert worst_mistakes(found, taxonomy, OperatingPoints()).tolist() == [0, 2]
