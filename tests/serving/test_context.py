"""Context over HTTP, batches, the inference protocol, a folder, Python and evaluation: the same numbers everywhere."""

import base64
import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from pydantic import ValidationError

from records.bundles import Bundle, write_bundle
from records.context import ContextHead, ContextPart
from records.errors import ConfigError, DataError, RefusedError
from records.settings import RecordsSettings
from records.store import Store, open_store
from records.types import Consent, Prediction
from serving.bulk import predict_folder
from serving.client import Client
from serving.direct import Model
from serving.page.prediction_view import context_text
from serving.schemas import Context, PredictionResponse
from serving.settings import ServingSettings
from trainers.evaluation.folder import predict_folder as evaluate_folder
from vision.inference.golden import golden_arrays
from vision.inference.loaded import load_model, plain_network

CONTEXT = {"age": 72.0, "sex": "Male", "localization": "back"}
UNSEEN = {"age": 129.0, "sex": "diverse", "localization": "moon"}
HEAD = ContextHead(
    weight=0.8,
    train_images=900,
    columns=[
        ContextPart(
            name="age", kind="numeric", knots=[5.0, 50.0, 85.0],
            heights=[[0.0] * 7, [0.0] * 7, [0.0, 0.5, 0.0, 0.0, 3.0, -3.0, 0.0]],
        ),
        ContextPart(name="sex", kind="categorical", values={"male": [0, 0, 0, 0, 0.4, 0, 0], "female": [0.0] * 7}),
        ContextPart(name="localization", kind="categorical", values={"back": [0, 0, 0, 0, 2.0, 0, -1.0]}),
    ],
)  # fmt: skip


@dataclass(frozen=True)
class Served:
    url: str
    store: Store
    bundle: Bundle


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Iterator[Served]:
    store = open_store(RecordsSettings(home=tmp_path_factory.mktemp("context")))
    plain = tools.make_bundle(store, 0)
    document = plain.document.model_copy(update={"context": HEAD, "views": 4})
    golden = golden_arrays(plain_network(plain), document.geometry, 4)
    bundle = write_bundle(store, document, plain.weights(), golden)
    tools.serve_bundle(store, bundle)
    settings = ServingSettings(port=tools.free_port(), default_consent=Consent.REVIEW)
    with tools.run_service(store, settings) as running:
        yield Served(running.url, store, bundle)
    store.close()


@pytest.fixture
def caller(served: Served) -> Iterator[Client]:
    with Client(served.url, retry_s=0.0) as opened:
        yield opened


def same(found: dict[str, float] | None, expected: dict[str, float] | None) -> bool:
    # A batch sums in another order than one image.
    return found == pytest.approx(expected, abs=1e-5) and found is not None


def test_every_path_gives_the_same_probabilities_with_and_without_context(
    served: Served, caller: Client, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    images = [make_image(number) for number in range(3)]
    contexts = [Context(**CONTEXT), Context(**UNSEEN), Context(age=60, device="x")]
    http = [caller.predict(image, context=context) for image, context in zip(images, contexts, strict=True)]
    alone = [caller.predict(image) for image in images]
    for one, bare in zip(http, alone, strict=True):
        assert one.context_effect is not None
        assert bare.context_effect is None
        assert same(one.context_effect.probabilities_without, bare.probabilities)
    batch = caller.predict_many(images, contexts=contexts).items
    assert all(
        same(b.prediction and b.prediction.probabilities, h.probabilities) for b, h in zip(batch, http, strict=True)
    )
    assert [b.prediction and b.prediction.context_effect and b.prediction.context_effect.used for b in batch] == [
        ["age", "sex", "localization"], [], ["age"],
    ]  # fmt: skip
    assert all(same(p, h.probabilities) for p, h in zip(inferred(served, images, contexts), http, strict=True))
    python = Model(served.bundle, ServingSettings()).predict(
        images, context=[CONTEXT, UNSEEN, {"age": 60, "device": "x"}]
    )
    assert all(same(p.probabilities, h.probabilities) for p, h in zip(python, http, strict=True))
    rows = folder_rows(served.bundle, images, tmp_path)
    assert all(same(row["probabilities"], h.probabilities) for row, h in zip(rows, http, strict=True))
    assert [row["context_used"] for row in rows] == ["age sex localization", "", "age"]
    found = evaluate_folder(load_model(served.bundle), tmp_path / "images", tmp_path / "table.csv")
    codes = served.bundle.document.taxonomy.codes
    assert all(
        same(dict(zip(codes, p.tolist(), strict=True)), h.probabilities)
        for p, h in zip(found.probabilities, http, strict=True)
    )


def inferred(served: Served, images: list[bytes], contexts: list[Context]) -> list[dict[str, float]]:
    texts = [context.model_dump_json(exclude_none=True) for context in contexts]
    tensors = [
        {"name": "image", "datatype": "BYTES", "shape": [3], "data": [base64.b64encode(i).decode() for i in images]},
        {"name": "context", "datatype": "BYTES", "shape": [3], "data": texts},
    ]  # fmt: skip
    url = f"{served.url}/v2/models/relook/infer"
    response = httpx.post(url, json={"inputs": tensors}, trust_env=False, timeout=600)
    outputs = {output["name"]: output for output in response.json()["outputs"]}
    assert outputs["context_used"]["data"] == ["age sex localization", "", "age"]
    codes = outputs["classes"]["data"]
    without = np.array(outputs["probabilities_without_context"]["data"]).reshape(3, -1)
    assert np.abs(without[1] - np.array(outputs["probabilities"]["data"]).reshape(3, -1)[1]).max() == 0.0
    return [
        dict(zip(codes, row, strict=True)) for row in np.array(outputs["probabilities"]["data"]).reshape(3, -1).tolist()
    ]


def folder_rows(bundle: Bundle, images: list[bytes], tmp_path: Path) -> list[dict[str, Any]]:
    (tmp_path / "images").mkdir()
    for number, image in enumerate(images):
        (tmp_path / "images" / f"i{number}.jpg").write_bytes(image)
    table = (
        "image_id,dx,age,sex,localization,device\ni0,nv,72,Male,back,\ni1,nv,129,diverse,moon,\ni2,nv,60,,unknown,x\n"
    )
    (tmp_path / "table.csv").write_text(table)
    out = tmp_path / "out.csv"
    result = predict_folder(bundle, tmp_path / "images", out, ServingSettings(), context=tmp_path / "table.csv")
    with out.open() as file:
        assert {row["image"]: row["context_used"] for row in csv.DictReader(file)}["i2.jpg"] == "age"
    return sorted(result.rows, key=lambda row: str(row["image"]))


def test_a_prediction_says_what_the_context_changed(caller: Client, make_image: Callable[..., bytes]) -> None:
    changed = next(
        found for number in range(20)
        if (found := caller.predict(make_image(number), context=Context(**CONTEXT))).context_effect
        and found.label != found.context_effect.label_without
    )  # fmt: skip
    effect = changed.context_effect
    assert effect is not None
    assert effect.confidence_without == effect.probabilities_without[effect.label_without]
    assert caller.prediction(changed.id).context_effect == effect
    text = context_text(changed, {"mel": "Melanoma"})
    assert text is not None
    assert "changed the label" in text
    unseen = caller.predict(make_image(1), context=Context(**UNSEEN))
    assert unseen.context_effect is not None
    assert unseen.context_effect.unknown == ["age", "sex", "localization"]
    assert unseen.probabilities == unseen.context_effect.probabilities_without
    said = context_text(unseen, {})
    assert said is not None
    assert "age, sex, localization" in said
    assert context_text(caller.predict(make_image(1)), {}) is None


def test_without_consent_the_caller_learns_it_and_the_ledger_does_not(
    served: Served, caller: Client, make_image: Callable[..., bytes]
) -> None:
    found = caller.predict(make_image(5), context=Context(**CONTEXT, consent=Consent.NONE))
    assert found.context_effect is not None
    with served.store.ledger.read() as tx:
        stored = tx.require(Prediction, found.id)
    assert (stored.context, stored.context_effect) == ({}, None)
    assert stored.probabilities == found.probabilities


def test_the_service_says_which_context_its_model_uses(served: Served, caller: Client) -> None:
    model = caller.model()
    assert model is not None
    assert [(c.name, c.kind, c.low, c.high) for c in model.context] == [
        ("age", "numeric", 5.0, 85.0), ("sex", "categorical", None, None), ("localization", "categorical", None, None),
    ]  # fmt: skip
    assert sorted(model.context[1].values) == ["female", "male"]
    assert model.views == caller.model_details(model.id).views == 4
    assert caller.model_details(model.id).context == model.context


def test_a_model_without_context_ignores_it(client: Client, make_image: Callable[..., bytes]) -> None:
    found = client.predict(make_image(3), context=Context(**CONTEXT))
    assert found.context_effect is None
    assert same(found.probabilities, client.predict(make_image(3)).probabilities)


def test_context_that_cannot_be_used_is_refused_in_one_sentence(
    served: Served, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    model = Model(served.bundle, ServingSettings())
    for given, words in (([{}, {}], "2 entries for 1"), ({"weight": 3}, "age, sex"), (["old"], "mappings")):
        with pytest.raises(ConfigError, match="context") as caught:
            model.predict(make_image(0), context=given)  # type: ignore[arg-type]
        assert words in str(caught.value)
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(make_image(0))
    tables = {
        "dx,age\nnv,3\n": "image_id", "image_id,dx\na,nv\n": "no column of context", "image,age\na,old\n": "row 1",
        "image,age\na,131\n": "0 to 130", "image,sex\na,m\na,f\n": "twice", "": "empty",
    }  # fmt: skip
    for text, words in tables.items():
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(DataError, match=words):
            predict_folder(served.bundle, folder, tmp_path / "o.csv", ServingSettings(), context=tmp_path / "t.csv")
    with pytest.raises(DataError, match="cannot be read"):
        predict_folder(served.bundle, folder, tmp_path / "o.csv", ServingSettings(), context=tmp_path / "none.csv")
    response = httpx.post(
        f"{served.url}/v1/predictions", trust_env=False,
        files={"image": ("a.jpg", make_image(0)), "context": (None, json.dumps({"age": "old"}), "application/json")},
    )  # fmt: skip
    assert response.status_code == 422


def test_an_interrupted_run_does_not_go_on_with_another_table(
    served: Served, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(make_image(0))
    (folder / "table.csv").write_text("image,sex\na.jpg,male\n")
    (tmp_path / "o.csv.partial").write_text(json.dumps({"model_id": served.bundle.id, "context": None}) + "\n")
    with pytest.raises(RefusedError, match="another table of context"):
        predict_folder(
            served.bundle, folder, tmp_path / "o.csv", ServingSettings(), resume=True, context=folder / "table.csv"
        )
    # The table itself is not taken for an image, and an older run without context goes on.
    (tmp_path / "p.csv.partial").write_text(json.dumps({"model_id": served.bundle.id}) + "\n")
    assert len(predict_folder(served.bundle, folder, tmp_path / "p.csv", ServingSettings(), resume=True).rows) == 2
    result = predict_folder(served.bundle, folder, tmp_path / "q.csv", ServingSettings(), context=folder / "table.csv")
    assert [row["context_used"] for row in result.rows] == ["sex"]


def test_an_older_response_has_no_context_effect(caller: Client, make_image: Callable[..., bytes]) -> None:
    body = caller.predict(make_image(2)).model_dump(mode="json")
    del body["context_effect"]
    assert PredictionResponse.model_validate(body).context_effect is None
    with pytest.raises(ValidationError):
        PredictionResponse.model_validate({**body, "context_effect": {"used": []}})


def test_the_page_sends_what_a_visitor_filled_in_and_says_what_it_changed(
    served: Served, make_image: Callable[..., bytes], tmp_path: Path
) -> None:
    from serving.page.api import PageApi
    from serving.page.predict import PredictHandlers

    upload = tmp_path / "upload.jpg"
    upload.write_bytes(make_image(0))
    visitor = SimpleNamespace(state=SimpleNamespace(key=None))
    api = PageApi(served.url, served.store.taxonomy)
    with api.client(visitor) as shared, shared:  # type: ignore[arg-type]
        handlers = PredictHandlers(api, 64)

        def shown(*about: Any) -> str:
            return str(handlers.predict({"path": str(upload)}, "review", visitor, *about)[0])  # type: ignore[arg-type]

        assert "rl-context" not in shown(None, "", None)
        assert "rl-context" not in shown()
        assert "age, sex, localization" in shown(72, "male", "back")
        assert "not seen such a value of sex" in shown(None, "diverse", "")
        assert "Age: Input should be a valid number" in shown("old", "", "")
        assert "rl-probabilities" not in shown("old", "", "")
