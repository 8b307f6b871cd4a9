"""Explanations by every method, batches, outcomes, events and metrics over real HTTP."""

import io
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx
import numpy as np
import pytest

from records.errors import DataError, RefusedError, TaxonomyError
from records.ids import new_id, utc_now
from records.types import Annotation, AnnotationKind, Consent, Decision, Outcome, SourceLabel
from serving.client import Client
from serving.schemas import Context, OutcomeRequest

METHODS = ("gradcam", "integrated_gradients", "gradient_shap", "occlusion")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_explains_the_same_stored_and_unstored(
    client: Client, make_image: Callable[..., bytes], method: str
) -> None:
    prediction = client.predict(make_image(40))
    stored = client.explanation(prediction.id, method=method, target="mel", versus="nv")
    again = client.explanation(prediction.id, method=method, target="mel", versus="nv")
    fresh = client.explain_image(make_image(40), method=method, target="mel", versus="nv")
    assert stored == again
    assert np.allclose(stored.values, fresh.values, atol=1e-6)
    assert (stored.target, stored.versus, stored.exact) == ("mel", "nv", False)
    opposite = client.explanation(prediction.id, method=method, target="nv", versus="mel")
    if method != "gradcam":
        assert np.allclose(np.array(stored.values), -np.array(opposite.values), atol=1e-4)
    if method == "integrated_gradients":
        assert stored.steps in (50, 100, 200, 400)
        # A random network may give two classes the same logit, and then there is nothing to add up to.
        if stored.completeness_error is None:
            assert abs(np.sum(stored.values)) < 1e-4
        else:
            assert stored.completeness_error <= 0.02 or stored.steps == 400


def test_forms_of_an_explanation(service: Any, client: Client, make_image: Callable[..., bytes]) -> None:
    with httpx.Client(base_url=service.url, trust_env=False) as http:
        headers = {"Content-Type": "image/jpeg"}
        found = http.post("/v1/explanations?method=occlusion&format=npy", content=make_image(41), headers=headers)
        assert np.load(io.BytesIO(found.content), allow_pickle=False).shape == (64, 64)
        found = http.post("/v1/explanations?format=png", content=make_image(41), headers=headers)
        assert found.content.startswith(b"\x89PNG")
        found = http.post("/v1/explanations?method=guess", content=make_image(41), headers=headers)
        assert found.status_code == 422
    with pytest.raises(DataError, match="with itself"):
        client.explain_image(make_image(41), target="mel", versus="mel")
    with pytest.raises(DataError):
        client.explain_image(make_image(41), target="cat")


def test_a_batch_predicts_each_image_and_summarises_lesions(client: Client, make_image: Callable[..., bytes]) -> None:
    contexts = [Context(lesion_id="L1"), Context(lesion_id="L1"), Context()]
    found = client.predict_many([make_image(42), make_image(43), b"no image"], contexts=contexts, idempotency_key="b1")
    predictions = [item.prediction for item in found.items]
    assert predictions[0] is not None
    assert predictions[1] is not None
    assert predictions[2] is None
    assert found.items[2].problem is not None
    assert found.items[2].problem.code == "not_an_image"
    order = ["answered", "retake", "review", "urgent"]
    (lesion,) = found.lesions
    assert lesion.lesion_id == "L1"
    assert lesion.prediction_ids == [predictions[0].id, predictions[1].id]
    assert order.index(lesion.decision) == max(order.index(a.decision) for a in predictions[:2] if a)
    assert predictions[0].probabilities == pytest.approx(client.predict(make_image(42)).probabilities, abs=1e-5)
    again = client.predict_many([make_image(42), make_image(43), b"no image"], contexts=contexts, idempotency_key="b1")
    assert again == found
    with pytest.raises(DataError, match="send one for each"):
        client.predict_many([make_image(42)], contexts=contexts)
    with pytest.raises(DataError, match="1 to 32 files"):
        client.predict_many([b"x"] * 33)


def test_an_outcome_is_a_label_of_its_rank(service: Any, client: Client, make_image: Callable[..., bytes]) -> None:
    prediction = client.predict(make_image(44))
    request = OutcomeRequest(diagnosis="mel", confirmation="histopathology", observed_at=utc_now())
    stored = client.outcome(prediction.id, request)
    assert stored.agrees == (prediction.label == "mel")
    assert client.outcome(prediction.id, request).id == stored.id
    with service.store.ledger.read() as tx:
        assert tx.count(Outcome, where={"prediction_id": prediction.id}) == 1
        (label,) = tx.find(SourceLabel, where={"image_id": prediction.image_id})
    assert (label.label, label.confirmation, label.source) == ("mel", "histopathology", f"outcome:{stored.id}")
    with pytest.raises(DataError, match="in the future"):
        client.outcome(prediction.id, request.model_copy(update={"observed_at": utc_now() + timedelta(days=1)}))
    with pytest.raises((DataError, TaxonomyError)):
        client.outcome(prediction.id, request.model_copy(update={"diagnosis": "cat"}))
    hidden = client.predict(make_image(45), context=Context(consent=Consent.NONE))
    with pytest.raises(RefusedError, match="without consent"):
        client.outcome(hidden.id, request)


def test_events_list_each_change_once_and_in_order(
    service: Any, client: Client, make_image: Callable[..., bytes]
) -> None:
    start = client.events(limit=200).next
    prediction = client.predict(make_image(46))
    before = client.events(after=start)
    assert before.items == []
    assert before.next == start
    other = next(code for code in service.store.taxonomy.codes if code != prediction.label)
    with service.store.ledger.begin() as tx:
        tx.add(_label(prediction.image_id, other))
    (amended,) = client.events(after=start).items
    assert (amended.kind, amended.prediction_id, amended.details["label"]) == ("amended", prediction.id, other)
    client.outcome(
        prediction.id,
        OutcomeRequest(diagnosis=prediction.label or other, confirmation="follow_up", observed_at=utc_now()),
    )
    (second,) = client.events(after=amended.id).items
    assert second.kind == ("confirmed" if prediction.label else "amended")
    assert client.events(after=second.id).items == []


def test_metrics_are_in_prometheus_format(service: Any, client: Client, make_image: Callable[..., bytes]) -> None:
    client.predict(make_image(47))
    with httpx.Client(base_url=service.url, trust_env=False) as http:
        http.get("/v1/nothing")
        http.get("/v1/model", headers={"Host": "elsewhere.example"})
        text = http.get("/metrics").text
    for name in ("relook_predictions_total", "relook_tasks_waiting", "relook_tasks_overdue", "relook_confidence"):
        assert name in text
    assert any(f'decision="{decision}"' in text for decision in Decision)
    for status in (200, 403, 404):
        assert f'relook_responses_total{{status="{status}"}}' in text


def _label(image_id: str, label: str) -> Annotation:
    number = int(image_id[:6], 16)
    return Annotation(
        id=new_id(), created_at=utc_now(), review_item_id="r" * 32, image_id=image_id, kind=AnnotationKind.CLASS,
        label=label, annotator="a", annotated_at=utc_now(), server="test", project_id=1, task_id=number,
        annotation_id=number, revision="1",
    )  # fmt: skip
