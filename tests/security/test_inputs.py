"""Texts, moments and numbers from outside: what a database, JSON or a page cannot hold is refused at every entrance."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cli import run
from records.errors import TaxonomyError
from records.settings import RecordsSettings
from records.store import open_store
from records.taxonomy import load_taxonomy
from records.types.base import LINE, LINES, Plain, moment
from serving.access.keys import admin_token
from serving.settings import ServingSettings

BAD_TEXTS = {
    "NUL": "a\x00",
    "escape": "\x1b[2Jx",
    "C1 control": "a\x85b",
    "line break": "a\nb",
    "half a surrogate pair": "a\ud800",
    "the other half": "\udfffa",
    "override of direction": "\u202egnp.exe",
    "isolate": "a\u2067b",
    "line separator": "a\u2028b",
    "too long": "a" * 201,
    "too long once composed": "\ufb2c" * 80,
}
BAD_MOMENTS = [
    "0001-01-01T00:00:00+23:59",
    "0001-01-01T00:00:00Z",
    "9999-12-31T23:59:59-23:59",
    "9999-12-31T23:59:59.999999999999Z",
    "1899-12-31T23:59:59Z",
    "2200-01-01T00:00:00Z",
    "2199-12-31T23:59:59-00:01",
    "2026-03-01T12:00:60Z",
    "2026-03-01T12:00:00+24:00",
    "2026-03-01T12:00:00",
    "-0001-01-01T00:00:00Z",
    "",
    "1" * 5000,
    1e400,
    float("nan"),
    -(2**70),
    True,
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, tools: Any) -> Iterator[Any]:
    """A service of its own, since some of its rows are odd."""
    store = open_store(RecordsSettings(home=tmp_path_factory.mktemp("inputs")))
    tools.serve_bundle(store, tools.make_bundle(store, 0, bias={"bcc": -2.0}))
    with tools.run_service(store, ServingSettings(port=tools.free_port(), rate_limit_per_minute=100_000)) as started:
        yield started
    store.close()


@pytest.fixture(scope="module")
def http(running: Any) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {admin_token(running.store.home)}"}
    with httpx.Client(base_url=running.url, headers=headers, trust_env=False, timeout=600) as opened:
        yield opened


@pytest.fixture(scope="module")
def prediction_id(http: httpx.Client, make_image: Callable[..., bytes]) -> str:
    form = {"image": ("a.jpg", make_image(0)), "context": (None, '{"consent": "training"}')}
    return str(http.post("/v1/predictions", files=form).json()["id"])


def send(http: httpx.Client, path: str, body: Any) -> httpx.Response:
    # Python's JSON, since httpx refuses NaN; a lone surrogate travels as an escape, as any program may send it.
    return http.post(path, content=json.dumps(body).encode(), headers={"Content-Type": "application/json"})


def assert_refused(response: httpx.Response, what: Any) -> None:
    assert response.status_code == 422, (what, response.status_code, response.text[:300])
    problem = response.json()
    assert problem["detail"], what
    assert problem["detail"].isprintable(), what


# ---------------------------------------------------------------- HTTP


@pytest.mark.parametrize("kind", BAD_TEXTS)
def test_a_text_that_cannot_be_stored_is_a_problem_of_its_request(
    http: httpx.Client, prediction_id: str, make_image: Callable[..., bytes], kind: str
) -> None:
    bad = BAD_TEXTS[kind]
    for field in ("lesion_id", "patient_id", "sex", "localization", "device", "site"):
        context = json.dumps({field: bad})
        one = http.post("/v1/predictions", files={"image": ("a.jpg", make_image(1)), "context": (None, context)})
        assert_refused(one, (kind, field))
        many = [("image", ("a.jpg", make_image(1))), ("context", (None, f"[{context}]"))]
        assert_refused(http.post("/v1/predictions/batch", files=many), (kind, field))
    flags = f"/v1/predictions/{prediction_id}/flags"
    assert_refused(send(http, flags, {"reason": "unsure", "suggested_label": bad}), kind)
    if kind not in ("line break", "too long", "too long once composed"):
        assert_refused(send(http, flags, {"reason": "unsure", "comment": bad}), kind)
    outcome = {"diagnosis": bad, "confirmation": "histopathology", "observed_at": "2026-03-01T12:00:00Z"}
    assert_refused(send(http, f"/v1/predictions/{prediction_id}/outcomes", outcome), kind)
    assert_refused(send(http, flags, {"reason": "unsure", bad: 1}), kind)


@pytest.mark.parametrize("bad", BAD_MOMENTS, ids=lambda value: str(value)[:40] or "empty")
def test_a_moment_out_of_range_is_a_problem_of_its_request(
    http: httpx.Client, prediction_id: str, make_image: Callable[..., bytes], bad: Any
) -> None:
    context = json.dumps({"acquired_at": bad})
    form = {"image": ("a.jpg", make_image(1)), "context": (None, context)}
    assert_refused(http.post("/v1/predictions", files=form), bad)
    outcome = {"diagnosis": "nv", "confirmation": "histopathology", "observed_at": bad}
    assert_refused(send(http, f"/v1/predictions/{prediction_id}/outcomes", outcome), bad)


@pytest.mark.parametrize("age", ["NaN", "Infinity", "-Infinity", "1e400", "-1", "131", "9" * 400, '"61"', "true"])
def test_an_age_that_is_no_age_is_a_problem_of_its_request(
    http: httpx.Client, make_image: Callable[..., bytes], age: str
) -> None:
    form = {"image": ("a.jpg", make_image(1)), "context": (None, f'{{"age": {age}}}')}
    assert_refused(http.post("/v1/predictions", files=form), age)


@pytest.mark.parametrize("charset", ["raw_unicode_escape", "unicode_escape", "utf-16", "latin-1", "no-such-charset"])
def test_the_charset_of_a_form_brings_no_other_text_in(
    http: httpx.Client, make_image: Callable[..., bytes], charset: str
) -> None:
    part = 'form-data; name="context"'
    context = '{"lesion_id": "\\ud800"}'
    body = f"--b\r\nContent-Disposition: {part}\r\n\r\n{context}\r\n".encode("ascii")
    body += b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + make_image(1) + b"\r\n--b--"
    headers = {"Content-Type": f"multipart/form-data; boundary=b; charset={charset}"}
    assert_refused(http.post("/v1/predictions", content=body, headers=headers), charset)


@pytest.mark.parametrize("key", [b"\x80abc", "e\u0301\x85".encode(), b"a" * 201, b"\xc2\x9b31m"])
def test_an_idempotency_key_is_plain_text(http: httpx.Client, make_image: Callable[..., bytes], key: bytes) -> None:
    headers = [(b"Idempotency-Key", key), (b"Content-Type", b"image/jpeg")]
    assert_refused(http.post("/v1/predictions", content=make_image(1), headers=headers), key)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/predictions/%00",
        "/v1/predictions/%ff%fe",
        f"/v1/predictions/{'0' * 31}%0a",
        "/v1/predictions?after=%00",
        "/v1/predictions?limit=99999999999999999999999",
        "/v1/predictions?limit=" + "9" * 5000,
        "/v1/predictions?limit=NaN",
        "/v1/events?after=%ed%a0%80",
        "/v1/events?prediction_id=%00",
        "/v1/models/%00",
        f"/v1/predictions/{'0' * 32}/explanation?target=%00",
        f"/v1/predictions/{'0' * 32}/explanation?method=%e2%80%ae",
    ],
    ids=lambda path: path[:50],
)
def test_ids_cursors_and_sizes_in_an_address_are_checked(http: httpx.Client, path: str) -> None:
    assert_refused(http.get(path), path)


def test_equal_words_are_equal_text(running: Any, http: httpx.Client, make_image: Callable[..., bytes]) -> None:
    contexts = [{"lesion_id": "le\u0301sion"}, {"lesion_id": "l\u00e9sion"}]
    files: list[Any] = [("image", ("a.jpg", make_image(n))) for n in (2, 3)]
    found = http.post("/v1/predictions/batch", files=[*files, ("context", (None, json.dumps(contexts)))]).json()
    assert [lesion["lesion_id"] for lesion in found["lesions"]] == ["l\u00e9sion"]


_FIELDS = st.sampled_from(
    ["reason", "comment", "suggested_label", "diagnosis", "confirmation", "observed_at", "model", "percent"]
) | st.sampled_from(["rollout", "champion", "back_to", "lesion_id", "age", "acquired_at", "consent", "\ud800", "\x00"])
_LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(codec=None), max_size=20),
    st.sampled_from(["unsure", "other", "nv", "histopathology", "training", "2026-03-01T12:00:00Z", 10**400, "0" * 64])
    | st.sampled_from([*BAD_TEXTS.values(), *BAD_MOMENTS]),
)
_BODIES = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_FIELDS, inner, max_size=5), max_leaves=10
)


@settings(max_examples=150, deadline=None, database=None)
@given(
    body=_BODIES | st.dictionaries(_FIELDS, _LEAVES, max_size=6),
    route=st.sampled_from(
        ["flags", "outcomes", "POST /v1/rollout", "DELETE /v1/rollout", "predict", "batch", "DELETE /v1/images/x"]
    ),
)
def test_no_json_is_the_services_own_fault(
    http: httpx.Client, prediction_id: str, make_image: Callable[..., bytes], body: Any, route: str
) -> None:
    if route in ("flags", "outcomes"):
        response = send(http, f"/v1/predictions/{prediction_id}/{route}", body)
    elif route in ("predict", "batch"):
        form = [("image", ("a.jpg", make_image(1))), ("context", (None, json.dumps(body)))]
        response = http.post("/v1/predictions/batch" if route == "batch" else "/v1/predictions", files=form)
    else:
        verb, path = route.split()
        content, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        response = http.request(verb, path, content=content, headers=headers)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["detail"]


# ---------------------------------------------------------------- the types


@given(st.text(st.characters(codec=None), max_size=300), st.booleans())
def test_a_checked_text_is_composed_bounded_and_stays_what_it_is(text: str, lines: bool) -> None:
    rule = LINES if lines else LINE
    kept = rule.keep(text)
    assert rule.check(kept) == kept
    try:
        checked = rule.check(text)
    except ValueError:
        return
    assert checked.encode().decode() == checked
    assert rule.check(checked) == checked == rule.keep(checked)
    assert len(checked) <= rule.most


@given(
    st.datetimes(
        timezones=st.sampled_from(
            [None, UTC, timezone(timedelta(hours=23, minutes=59)), timezone(-timedelta(hours=23, minutes=59))]
        )
    )
)
def test_a_checked_moment_is_in_utc_and_in_range(value: datetime) -> None:
    try:
        checked = moment(value)
    except ValueError:
        return
    assert checked.tzinfo is UTC
    assert 1900 <= checked.year < 2200
    assert checked == value


def test_a_length_is_counted_in_composed_characters() -> None:
    assert Plain(1).check("\u00e9") == "\u00e9"
    with pytest.raises(ValueError, match="240 characters"):
        LINE.check("\ufb2c" * 80)
    with pytest.raises(ValueError, match="0 characters; send 1 to 5"):
        Plain(5, least=1).check("")


# ---------------------------------------------------------------- commands and files


@pytest.mark.parametrize("bad", ["a\udcff", "a\x1b[2J", "a\u202eb", "a\x00b"], ids=ascii)
@pytest.mark.parametrize(
    "arguments",
    [
        ["keys", "create", "{}", "--organisation", "clinic"],
        ["keys", "create", "n", "--organisation", "{}"],
        ["trace", "{}"],
    ],
    ids=" ".join,
)
def test_an_option_that_cannot_be_stored_is_one_sentence_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], bad: str
) -> None:
    given = [argument.format(bad) for argument in arguments]
    assert run([*given, "--set", f"records.home={tmp_path / 'home'}"]) == 2
    error = capsys.readouterr().err.strip()
    assert "not printable" in error
    assert error.isprintable()


@pytest.mark.parametrize(
    "bad",
    [
        'name: "a\\0"\nversion: 1\n',
        'name: "\\u202ea"\nversion: 1\n',
        "name: ok\nversion: 99999999999999999999\n",
        "name: ok\nversion: .nan\n",
    ],
)
def test_a_taxonomy_that_cannot_be_stored_is_refused(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "mine.yaml"
    classes = "classes:\n- {code: a, name: A, malignant: true}\n- {code: b, name: B, malignant: false}\n"
    path.write_text(bad + classes)
    with pytest.raises(TaxonomyError):
        load_taxonomy(str(path))
    path.write_text("name: ok\nversion: 1\n" + classes.replace("name: A", 'name: "A\\e[2J"'))
    with pytest.raises(TaxonomyError, match=r"U\+001B"):
        load_taxonomy(str(path))
