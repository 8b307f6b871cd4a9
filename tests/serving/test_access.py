"""Keys, scopes, visibility, erasure and rate limits over real HTTP."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any, cast

import httpx
import pytest

from records import audit
from records.errors import AccessError, ConfigError, RefusedError, UnknownIdError
from records.ids import utc_now
from records.retention import apply_retention
from records.store import Store
from records.types import ApiKey, Image, Prediction, ReviewItem, ReviewState, Scope
from serving.access.keys import CACHE_S, REREAD_S, KeyRing, admin_token, create_key, revoke_key
from serving.access.limits import RateLimit
from serving.client import Client
from serving.preconditions import require_startable
from serving.schemas import FlagRequest
from serving.settings import ServingSettings

JPEG = {"Content-Type": "image/jpeg"}


@pytest.fixture(scope="module")
def tokens(kept: Store, tools: Any) -> dict[str, str]:
    return {
        "north": tools.make_key(kept, "north", Scope.PREDICT, Scope.FLAG),
        "south": tools.make_key(kept, "south", Scope.PREDICT),
        "sandbox": tools.make_key(kept, "sandbox", Scope.PREDICT, Scope.FLAG, organisation="north", sandbox=True),
        "auditor": tools.make_key(kept, "auditor", Scope.AUDIT, organisation="hospital"),
        "admin": admin_token(kept.home),
    }


@pytest.fixture(scope="module")
def keyed(kept: Store, tokens: dict[str, str], tools: Any) -> Iterator[Any]:
    settings = ServingSettings(port=tools.free_port(), model_poll_s=0.1, audit_share=1.0, rate_limit_per_minute=0)
    with tools.run_service(kept, settings) as running:
        yield running


@pytest.fixture
def client_of(keyed: Any, tokens: dict[str, str]) -> Iterator[Callable[[str], Client]]:
    opened: list[Client] = []

    def make(name: str) -> Client:
        opened.append(Client(keyed.url, tokens.get(name, name), retry_s=0.0))
        return opened[-1]

    yield make
    for client in opened:
        client.close()


def test_without_a_valid_key_every_route_is_refused(
    keyed: Any, client_of: Callable[[str], Client], make_image: Any
) -> None:
    with httpx.Client(base_url=keyed.url, trust_env=False) as http:
        for path in ("/v1/predictions", "/v1/model", "/v1/models", "/v1/events", "/metrics"):
            response = http.get(path)
            assert (response.status_code, response.json()["code"]) == (401, "unauthenticated")
            assert response.headers["www-authenticate"].startswith("Bearer")
        # Refused before the body is read.
        assert http.post("/v1/predictions", content=b"junk", headers=JPEG).status_code == 401
        assert http.get("/v1/model", headers={"Authorization": "Basic abc"}).status_code == 401
        assert http.get("/healthz").status_code == 200
    with pytest.raises(AccessError, match="unknown, expired or revoked"):
        client_of("rlk_0_wrong").predict(make_image(0))


def test_scopes_limit_what_a_key_may_do(client_of: Callable[[str], Client], make_image: Any) -> None:
    prediction = client_of("south").predict(make_image(0))
    with pytest.raises(AccessError, match="scope `flag`"):
        client_of("south").flag(prediction.id, FlagRequest(reason="unsure"))
    with pytest.raises(AccessError, match="scope `predict`"):
        client_of("auditor").predict(make_image(0))
    with pytest.raises(AccessError, match="scope `admin`"):
        client_of("north").erase(prediction.image_id)


def test_objects_of_others_do_not_exist(kept: Store, client_of: Callable[[str], Client], make_image: Any) -> None:
    prediction = client_of("north").predict(make_image(1))
    with kept.ledger.read() as tx:
        stored = tx.require(Prediction, prediction.id)
    assert stored.organisation == "north"
    assert stored.caller != "local"
    south = client_of("south")
    for ask in (south.prediction, south.explanation):
        with pytest.raises(UnknownIdError):
            ask(prediction.id)
    assert prediction.id not in {item.id for item in south.predictions(limit=200).items}
    assert client_of("auditor").prediction(prediction.id) == prediction
    assert prediction.id in {item.id for item in client_of("auditor").predictions(limit=200).items}


def test_a_sandbox_key_leaves_nothing_behind(kept: Store, client_of: Callable[[str], Client], make_image: Any) -> None:
    prediction = client_of("sandbox").predict(make_image(30))
    assert prediction.review is None
    with kept.ledger.read() as tx:
        assert tx.get(Image, prediction.image_id) is None
        assert tx.find(ReviewItem, where={"image_id": prediction.image_id}) == []
    assert not kept.blobs.has(prediction.image_id)


def test_a_new_key_works_at_once_beside_strangers(
    kept: Store, keyed: Any, tools: Any, client_of: Callable[[str], Client]
) -> None:
    for number in range(5):
        # Refused by a copy of the keys that was read just now, and does not have the key that follows.
        with pytest.raises(AccessError, match="unknown, expired or revoked"):
            client_of(f"rlk_{number}_wrong").predictions()
        client_of(tools.make_key(kept, f"new{number}", Scope.PREDICT)).predictions()


class CountedLedger:
    """Counts the readings of a ledger."""

    def __init__(self, ledger: Any) -> None:
        self._ledger = ledger
        self.readings = 0

    def __getattr__(self, name: str) -> Any:
        self.readings += name == "read"
        return getattr(self._ledger, name)


def test_strangers_share_few_readings_of_the_ledger(kept: Store, tools: Any) -> None:
    ledger = CountedLedger(kept.ledger)
    ring = KeyRing(replace(kept, ledger=cast(Any, ledger)))

    async def refused(token: str) -> None:
        with pytest.raises(AccessError, match="unknown, expired or revoked"):
            await ring.find(f"Bearer {token}")

    async def strangers() -> None:
        for wave in range(3):
            await asyncio.gather(*(refused(f"rlk_{wave}_{number}") for number in range(200)))
        assert 1 <= ledger.readings <= 2 + (time.monotonic() - began_s) / REREAD_S
        # What does not look like a key is refused by the copy.
        keyed = ledger.readings
        await asyncio.gather(*(refused(f"abc{number}") for number in range(200)))
        assert ledger.readings <= keyed + 1 + (time.monotonic() - began_s) / CACHE_S
        assert (await ring.find(f"Bearer {admin_token(kept.home)}")).id == "admin"
        token = await asyncio.to_thread(tools.make_key, kept, "late", Scope.PREDICT)
        assert (await ring.find(f"Bearer {token}")).scopes == {Scope.PREDICT}

    began_s = time.monotonic()
    asyncio.run(strangers())


def test_a_revoked_or_expired_key_opens_nothing(kept: Store, keyed: Any, make_image: Any) -> None:
    key, token = create_key(kept, name="short", organisation="north", scopes=[Scope.PREDICT], actor="test")
    headers = {"Authorization": f"Bearer {token}"}
    with Client(keyed.url, token) as client, httpx.Client(base_url=keyed.url, trust_env=False, headers=headers) as http:
        _until(lambda: http.get("/v1/model").status_code == 200)
        client.predict(make_image(0))
        revoke_key(kept, key.id, actor="test")
        revoke_key(kept, key.id, actor="test")
        _until(lambda: http.get("/v1/model").status_code == 401)
    with kept.ledger.read() as tx:
        stored = tx.require(ApiKey, key.id)
    assert token not in stored.model_dump_json()
    assert stored.secret_hash not in repr(stored)
    assert audit.verify(kept.ledger, kept.home) == []
    with pytest.raises(ConfigError, match="at least one scope"):
        create_key(kept, name="x", organisation="y", scopes=[], actor="test")
    with pytest.raises(UnknownIdError):
        revoke_key(kept, "nobody", actor="test")


def test_erasure_reaches_blobs_and_stays(kept: Store, client_of: Callable[[str], Client], make_image: Any) -> None:
    prediction = client_of("north").predict(make_image(3))
    admin = client_of("admin")
    erased = admin.erase(prediction.image_id)
    assert erased.blobs >= 1
    assert not kept.blobs.has(prediction.image_id)
    # Sent again it is predicted and not stored.
    again = client_of("north").predict(make_image(3))
    assert again.image_id == prediction.image_id
    assert not kept.blobs.has(prediction.image_id)
    with kept.ledger.read() as tx:
        image = tx.require(Image, prediction.image_id)
    assert image.erased_at is not None
    with pytest.raises(UnknownIdError):
        admin.erase("0" * 64)


def test_an_expired_image_is_stored_again_when_it_is_sent_again(
    kept: Store, client_of: Callable[[str], Client], make_image: Any
) -> None:
    settings = kept.settings.model_copy(update={"keep_images_days": 1})
    prediction = client_of("north").predict(make_image(4))
    done = apply_retention(
        replace(kept, settings=settings), actor="test", forget=lambda ids: None, now=utc_now() + timedelta(days=2)
    )
    assert done.images == 0, "every prediction is drawn for the audit, so its review item is open"
    with kept.ledger.begin() as tx:
        (item,) = tx.find(ReviewItem, where={"image_id": prediction.image_id})
        tx.update(ReviewItem, item.id, state=ReviewState.WITHDRAWN)
    done = apply_retention(
        replace(kept, settings=settings), actor="test", forget=lambda ids: None, now=utc_now() + timedelta(days=2)
    )
    assert done.images == 1
    assert not kept.blobs.has(prediction.image_id)
    with pytest.raises(RefusedError, match="no longer stored"):
        client_of("north").flag(prediction.id, FlagRequest(reason="unsure"))
    again = client_of("north").predict(make_image(4))
    assert kept.blobs.has(again.image_id)
    assert again.review is not None
    with kept.ledger.read() as tx:
        assert tx.require(Image, again.image_id).erased_at is None
    assert client_of("north").flag(again.id, FlagRequest(reason="unsure")).review.state == "new"


def test_beyond_loopback_only_with_keys(tools: Any, store: Store) -> None:
    settings = ServingSettings(host="0.0.0.0", port=tools.free_port())
    with pytest.raises(ConfigError, match="no API keys"):
        require_startable(settings, store.settings)


def test_a_bucket_fills_evenly() -> None:
    now = 0.0
    rates = RateLimit(60, lambda: now)
    for _ in range(60):
        rates.take("a")
    with pytest.raises(AccessError, match="60 units a minute") as refused:
        rates.take("a")
    assert refused.value.code == "rate_limited"
    rates.take("b")
    now = 1.0
    rates.take("a")
    with pytest.raises(AccessError):
        rates.take("a")


def _until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)
