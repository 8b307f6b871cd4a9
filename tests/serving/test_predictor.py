"""The predictor's core without HTTP or Ray: batches equal singles, models swap, errors stay with their request."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from records.errors import ImageError, RefusedError, UnavailableError, UnknownIdError
from records.ids import new_id
from records.store import Store
from records.types import Decision, ModelStatus, Prediction, ReasonCode, ReviewItem
from serving import holder
from serving.explainer import Explainer
from serving.holder import ModelHolder
from serving.messages import PredictionRequest, StoredPrediction
from serving.predictor import Predictor
from serving.schemas import Context
from serving.settings import ServingSettings

T = TypeVar("T")

SETTINGS = ServingSettings(model_poll_s=0.05, audit_share=0.0)


def request(make_image: bytes, **changes: Any) -> PredictionRequest:
    return PredictionRequest(image=make_image, request_id=new_id(), context=Context(), **changes)


def with_predictor(store: Store, use: Callable[[Predictor], Awaitable[T]], settings: ServingSettings = SETTINGS) -> T:
    """Run something against a started predictor in its own event loop."""

    async def run() -> T:
        predictor = Predictor(store, settings)
        await predictor.start()
        try:
            return await use(predictor)
        finally:
            await predictor.stop()

    return asyncio.run(run())


def test_predictions_of_a_batch_equal_those_of_one_at_a_time(
    store: Store, tools: Any, make_image: Callable[..., bytes]
) -> None:
    tools.serve_bundle(store, tools.make_bundle(store, bias={"bcc": -2.0}))
    images = [make_image(number) for number in range(12)]

    async def both(predictor: Predictor) -> tuple[list[StoredPrediction], list[StoredPrediction]]:
        singles = [await predictor.predict(request(data)) for data in images]
        return singles, list(await asyncio.gather(*(predictor.predict(request(data)) for data in images)))

    singles, together = with_predictor(store, both)
    for one, other in zip(singles, together, strict=True):
        assert one.prediction.image_id == other.prediction.image_id
        assert one.prediction.decision is other.prediction.decision
        assert list((one.prediction.probabilities or {}).values()) == pytest.approx(
            list((other.prediction.probabilities or {}).values()), abs=1e-5
        )
    with store.ledger.read() as tx:
        assert tx.count(Prediction) == 24


@pytest.mark.parametrize(("least", "alone"), [(1, 2), (2, 1)])
def test_a_batch_alone_has_all_cores_where_they_pay_and_concurrent_batches_one_each(
    least: int, alone: int, store: Store, tools: Any, make_image: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holder, "all_cores_from", lambda *_: least)
    tools.serve_bundle(store, tools.make_bundle(store))
    images = [make_image(number) for number in range(12)]

    async def both(predictor: Predictor) -> tuple[list[StoredPrediction], list[StoredPrediction]]:
        singles = [await predictor.predict(request(data)) for data in images[:3]]
        return singles, list(await asyncio.gather(*(predictor.predict(request(data)) for data in images)))

    settings = SETTINGS.model_copy(update={"predictor_cpus": 2.0, "max_batch_size": 2})
    singles, together = with_predictor(store, both, settings)
    assert {stored.prediction.num_threads for stored in singles} == {alone}
    assert 1 in {stored.prediction.num_threads for stored in together}


@pytest.mark.parametrize(
    ("one_ms", "all_ms", "cores", "expected"),
    [
        # Milliseconds per image, and for a batch in which threads wait for each other.
        (4.0, (2.0, 1.0), 4, 1),
        (4.0, (1.0, 6.0), 4, 4),
        (4.0, (3.0, 1.0), 4, 8),
        (4.0, (4.0, 1.0), 4, 17),
        (4.0, (2.0, 1.0), 1, 1),
    ],
)
def test_all_cores_are_for_batches_that_they_compute_a_quarter_faster(
    one_ms: float, all_ms: tuple[float, float], cores: int, expected: int
) -> None:
    now, sizes = [0.0], []

    class Slow:
        def predict(self, pixels: Any, *, gradcam: bool) -> None:
            each, waiting = (one_ms, 0.0) if torch.get_num_threads() == 1 else all_ms
            # Now and then something else delays a pass.
            now[0] += each * len(pixels) + waiting + 1000.0 * (len(sizes) % 10 in (0, 1, 2, 5))
            sizes.append(len(pixels))

    before = torch.get_num_threads()
    found = holder.all_cores_from(Slow(), np.zeros((1, 8, 8, 3), np.uint8), cores, 16, lambda: now[0])
    assert found == expected
    assert torch.get_num_threads() == before
    # No size beyond the one that is found, and none where there is one core.
    assert sorted(set(sizes)) == [size for size in (1, 2, 4, 8, 16) if size <= expected and cores > 1]


def test_forward_passes_together_have_no_more_threads_than_there_are_cores(
    store: Store, tools: Any, make_image: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools.serve_bundle(store, tools.make_bundle(store))
    forward, lock = Predictor._forward, threading.Lock()
    computing: list[int] = []
    begun: list[tuple[int, int]] = []
    """Of every forward pass: its images, and the threads of all that compute from then on."""

    def counted(self: Predictor, num_threads: int, batch: Any) -> Any:
        with lock:
            computing.append(num_threads)
            begun.append((len(batch), sum(computing)))
        try:
            time.sleep(0.2)
            return forward(self, num_threads, batch)
        finally:
            with lock:
                computing.remove(num_threads)

    async def overlapping(predictor: Predictor) -> None:
        first = asyncio.create_task(predictor.predict(request(make_image(0))))
        while not computing:
            await asyncio.sleep(0.001)
        await asyncio.gather(first, *(predictor.predict(request(make_image(number))) for number in range(1, 4)))

    monkeypatch.setattr(Predictor, "_forward", counted)
    monkeypatch.setattr(holder, "all_cores_from", lambda *_: 1)
    with_predictor(store, overlapping, SETTINGS.model_copy(update={"predictor_cpus": 2.0}))
    assert begun[0] == (1, 2)
    assert sum(images for images, _ in begun) == 4
    assert max(threads for _, threads in begun) == 2


@pytest.mark.long
@pytest.mark.engines
def test_openvino_decides_like_torch_and_every_prediction_says_its_engine(
    store: Store, tools: Any, make_image: Callable[..., bytes]
) -> None:
    tools.serve_bundle(store, tools.make_bundle(store, bias={"bcc": -2.0}))
    images = [make_image(number) for number in range(6)]

    async def predicted(predictor: Predictor) -> list[Prediction]:
        served = predictor.state().model
        assert served is not None
        found = await asyncio.gather(*(predictor.predict(request(data)) for data in images))
        assert {stored.prediction.engine for stored in found} == {served.engine}
        return [stored.prediction for stored in found]

    both = [
        with_predictor(store, predicted, SETTINGS.model_copy(update={"engine": engine, "predictor_cpus": 2.0}))
        for engine in ("torch", "openvino")
    ]
    assert [one[0].engine for one in both] == ["torch", "openvino"]
    for torchs, ours in zip(*both, strict=True):
        assert (ours.decision, ours.label, ours.prediction_set) == (
            torchs.decision, torchs.label, torchs.prediction_set,
        )  # fmt: skip
        assert list((ours.probabilities or {}).values()) == pytest.approx(
            list((torchs.probabilities or {}).values()), abs=1e-4
        )
        assert ours.settings_hash != torchs.settings_hash


def test_one_bad_image_harms_no_other(store: Store, tools: Any, make_image: Callable[..., bytes]) -> None:
    tools.serve_bundle(store, tools.make_bundle(store))

    async def mixed(predictor: Predictor) -> list[Any]:
        bodies = [make_image(0), b"text", make_image(1), make_image(2)[:500], make_image(3)]
        return await asyncio.gather(*(predictor.predict(request(b)) for b in bodies), return_exceptions=True)

    results = with_predictor(store, mixed)
    assert [type(result) for result in results] == [
        StoredPrediction,
        ImageError,
        StoredPrediction,
        ImageError,
        StoredPrediction,
    ]


def test_a_key_in_flight_is_predicted_once(store: Store, tools: Any, make_image: Callable[..., bytes]) -> None:
    tools.serve_bundle(store, tools.make_bundle(store))

    async def same_key(predictor: Predictor) -> list[StoredPrediction]:
        calls = (predictor.predict(request(make_image(0), idempotency_key="k")) for _ in range(8))
        return list(await asyncio.gather(*calls))

    stored = with_predictor(store, same_key)
    assert len({result.prediction.id for result in stored}) == 1
    with store.ledger.read() as tx:
        assert tx.count(Prediction) == 1


def test_two_replicas_with_one_key_give_one_prediction(
    store: Store, tools: Any, make_image: Callable[..., bytes]
) -> None:
    tools.serve_bundle(store, tools.make_bundle(store))

    async def race() -> list[StoredPrediction]:
        replicas = [Predictor(store, SETTINGS) for _ in range(3)]
        for replica in replicas:
            await replica.start()
        calls = [
            replica.predict(request(make_image(number), idempotency_key=f"key-{number}"))
            for number in range(4)
            for replica in replicas
        ]
        try:
            return list(await asyncio.gather(*calls))
        finally:
            for replica in replicas:
                await replica.stop()

    stored = asyncio.run(race())
    assert len({result.prediction.id for result in stored}) == 4
    with store.ledger.read() as tx:
        assert tx.count(Prediction) == 4


def test_non_finite_output_is_reviewed_and_never_dropped(
    store: Store, tools: Any, make_image: Callable[..., bytes]
) -> None:
    tools.serve_bundle(store, tools.make_bundle(store, status_of_images="overflow"))

    async def use(predictor: Predictor) -> StoredPrediction:
        return await predictor.predict(request(make_image(0), explain=True))

    stored = with_predictor(store, use)
    prediction = stored.prediction
    assert prediction.decision is Decision.REVIEW
    assert prediction.reasons == [ReasonCode.NON_FINITE]
    assert (prediction.label, prediction.confidence, prediction.probabilities) == (None, None, None)
    assert stored.heat_map is None
    with store.ledger.read() as tx:
        (item,) = tx.find(ReviewItem)
    assert item.heat_map is None
    with pytest.raises(RefusedError, match="no finite output"):
        Explainer(store, SETTINGS).explain(prediction, "gradcam", "mel")


def test_a_new_model_serves_from_the_next_request_on(
    store: Store, tools: Any, make_image: Callable[..., bytes]
) -> None:
    first, second = tools.make_bundle(store, 0), tools.make_bundle(store, 1)
    tools.serve_bundle(store, first, ModelStatus.PROVISIONAL)

    async def swap(predictor: Predictor) -> list[tuple[str, str]]:
        seen = []
        for step in range(400):
            stored = await predictor.predict(request(make_image(step % 5)))
            seen.append((stored.prediction.model_id, stored.prediction.model_status))
            if step == 3:
                await asyncio.to_thread(tools.serve_bundle, store, second)
            if seen[-1][0] == second.id:
                break
        return seen

    seen = with_predictor(store, swap)
    assert seen[0] == (first.id, "provisional")
    assert seen[-1] == (second.id, "champion")
    assert [model for model, _ in seen] == sorted([model for model, _ in seen], key=[first.id, second.id].index)


def test_a_status_change_needs_no_new_model(store: Store, tools: Any) -> None:
    bundle = tools.make_bundle(store)
    tools.serve_bundle(store, bundle, ModelStatus.PROVISIONAL)
    holder = ModelHolder(store, SETTINGS)
    assert holder.refresh()
    loaded = holder.current.loaded
    tools.serve_bundle(store, bundle, ModelStatus.CHAMPION)
    assert not holder.refresh()
    assert holder.current.status == "champion"
    assert holder.current.loaded is loaded


def test_a_model_that_misses_its_golden_images_is_not_served(
    store: Store, tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    good = tools.make_bundle(store, 0)
    wrong = tools.make_bundle(store, 1, golden_logits=np.full((4, 7), 50.0, np.float32))
    tools.serve_bundle(store, good)
    holder = ModelHolder(store, SETTINGS)
    holder.refresh()
    tools.serve_bundle(store, wrong)
    assert not holder.refresh()
    assert holder.current.id == good.id
    assert "golden" in caplog.text
    assert "golden" in holder.state().detail


def test_an_altered_bundle_is_not_served(store: Store, tools: Any, caplog: pytest.LogCaptureFixture) -> None:
    bundle = tools.make_bundle(store)
    (bundle.path / "bundle.json").write_text((bundle.path / "bundle.json").read_text() + " ")
    tools.serve_bundle(store, bundle)
    holder = ModelHolder(store, SETTINGS)
    assert not holder.refresh()
    with pytest.raises(UnavailableError, match="altered"):
        _ = holder.current
    assert "altered" in caplog.text


def test_without_a_model_there_is_a_sentence(store: Store, make_image: Callable[..., bytes]) -> None:
    async def use(predictor: Predictor) -> str:
        with pytest.raises(UnavailableError, match="promote one"):
            await predictor.predict(request(make_image(0)))
        return predictor.state().detail

    assert "promote" in with_predictor(store, use)


def test_what_has_no_model_is_not_explained(store: Store, tools: Any, make_image: Callable[..., bytes]) -> None:
    explainer = Explainer(store, SETTINGS)
    with pytest.raises(UnavailableError, match="no model is to be served yet; promote one first"):
        explainer.explain_image(make_image(0), "gradcam", None, None)
    tools.serve_bundle(store, tools.make_bundle(store))
    stored = with_predictor(store, lambda predictor: predictor.predict(request(make_image(0))))
    gone = stored.prediction.model_copy(update={"model_id": "f" * 64})
    with pytest.raises(
        UnknownIdError, match="the model ffffffffffff that made this prediction is no longer registered"
    ):
        explainer.explain(gone, "gradcam", "nv", None)


def test_the_log_of_the_ledger_is_copied_into_its_file_while_the_predictor_runs(
    store: Store, tools: Any, make_image: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.predictor.CHECKPOINT_S", 0.05)
    tools.serve_bundle(store, tools.make_bundle(store))
    file = Path(str(store.ledger.engine.url.database))
    before = file.stat().st_mtime_ns

    async def copied(predictor: Predictor) -> bool:
        await predictor.predict(request(make_image(1)))
        end = time.monotonic() + 120
        while file.stat().st_mtime_ns == before and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return file.stat().st_mtime_ns != before

    assert with_predictor(store, copied)
