"""The print view: one prediction on a page that holds all of it, and nothing that a browser would run or fetch."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from markupsafe import escape

from records.erasure import RECORDS_PLACES, erase_images
from records.errors import UnknownIdError
from records.types import Consent, Image
from serving.client import Client
from serving.page.prediction_view import prediction_html
from serving.schemas import Context
from serving.words import DISCLAIMER

LOADED = re.compile(r"<(script|link|iframe|object|embed|form)\b|\bon[a-z]+=|url\(|@import|(?:src|href)=\"(?!data:)")


def images_of(html: str) -> list[str]:
    return re.findall(r'<img alt="([^"]*)"', html)


def test_the_page_holds_the_prediction_and_loads_nothing(
    client: Client, service: Any, make_image: Callable[..., bytes]
) -> None:
    hostile = '"><script>alert(1)</script>'
    found = client.predict(make_image(1), context=Context(age=61, localization=hostile, lesion_id="L<b>7"))
    response = client._http.get(f"/v1/predictions/{found.id}/print")
    html = response.text
    assert (response.status_code, response.headers["content-type"].partition(";")[0]) == (200, "text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "script-src" not in response.headers["content-security-policy"]
    assert LOADED.search(html) is None
    assert hostile not in html
    assert str(escape(hostile)) in html
    assert images_of(html) == ["The image", "Heat map over the image"]
    names = {c.code: c.name for c in service.store.taxonomy.classes}
    assert all(str(escape(name)) in html for name in names.values())
    for said in (found.id, found.model.id, found.image_id, found.request_id, DISCLAIMER, "size: A4", "61"):
        assert said in html
    assert all(str(escape(reason.text)) in html for reason in found.reasons)


@pytest.mark.parametrize("gone", ["never stored", "erased", "file lost"])
def test_an_image_that_may_not_be_shown_is_left_out(
    client: Client, service: Any, make_image: Callable[..., bytes], gone: str
) -> None:
    number = 40 + ["never stored", "erased", "file lost"].index(gone)
    consent = Consent.NONE if gone == "never stored" else Consent.REVIEW
    found = client.predict(make_image(number), context=Context(consent=consent, age=77))
    if gone == "erased":
        erase_images(service.store, [found.image_id], actor="test", places=RECORDS_PLACES)
    if gone == "file lost":
        service.store.blobs.delete(found.image_id)
        with service.store.ledger.read() as tx:
            assert tx.require(Image, found.image_id).erased_at is None
    html = client.print_view(found.id)
    assert images_of(html) == []
    assert "The image is not shown" in html
    assert ("<td>77</td>" in html) == (gone == "file lost"), "the context goes with the consent and with an erasure"
    assert found.id in html


def test_only_who_may_read_a_prediction_prints_it(client: Client) -> None:
    with pytest.raises(UnknownIdError):
        client.print_view("0" * 32)


def test_the_page_of_the_service_links_it(client: Client, service: Any, make_image: Callable[..., bytes]) -> None:
    found = client.predict(make_image(2))
    shown = prediction_html(found, {c.code: c.name for c in service.store.taxonomy.classes}, frozenset())
    assert f'href="v1/predictions/{found.id}/print" target="_blank" rel="noopener"' in shown
