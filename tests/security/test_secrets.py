"""No password or token is shown: in settings, manifests, errors and tables of URLs of any form."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.settings import Settings, public_dump
from records.errors import ConfigError, ImageError, LabelStudioStartError, RelookError, UnavailableError
from records.redaction import MASK, without_secrets
from records.settings import RecordsSettings

SECRET = "S3cr3t"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://relook:{SECRET}@db/relook",
        f"postgresql://relook:pa/{SECRET}@db/relook",
        f"postgresql://relook:{SECRET}@more?{SECRET}#{SECRET}@db:5432/relook",
        f"postgresql+psycopg://relook:{SECRET}%2F{SECRET}@[::1]:5432/relook",
        f"postgresql:///relook?host=db&password={SECRET}",
        f"postgresql://relook@db/relook?sslmode=require&sslpassword={SECRET}",
        f"postgresql://db/relook?PASSWORD={SECRET};user={SECRET}",
        f"s3://AKIA:{SECRET}/{SECRET}@bucket/blobs?endpoint_override=minio:9000",
        f"s3://bucket/blobs?access_key=AKIA&secret_key={SECRET}&scheme=http",
        f"s3://bucket/blobs?endpoint_override=http://u:{SECRET}@minio:9000",
        f"https://{SECRET}@registry.example/simple",
        f"https://user:{SECRET}@label.example/api?project=1",
        f"https://bucket.example/key?X-Amz-Signature={SECRET}&X-Amz-Credential={SECRET}",
        f"https://bucket.example/key?{SECRET}",
        f"redis://:{SECRET}@cache:6379/0",
    ],
)
def test_a_secret_of_a_url_is_masked_wherever_it_stands(url: str) -> None:
    assert SECRET not in without_secrets(url)
    assert SECRET not in without_secrets(f"ledger {url} does not respond; start it")
    assert SECRET not in without_secrets(f"records.blobs {url!r} cannot be opened: {url}")
    for error in (ConfigError, UnavailableError, ImageError, LabelStudioStartError):
        assert SECRET not in str(error(f"{url} does not respond"))
        assert SECRET not in repr(error(f"{url} does not respond"))
    dumped = public_dump(Settings(records=RecordsSettings(database=url, blobs=url)))
    assert SECRET not in str(dumped)


@given(
    st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="'\"<>"), min_size=12, max_size=40)
)
def test_no_password_is_shown_whatever_its_characters(password: str) -> None:
    shown = without_secrets(f"postgresql://relook:{password}@db.example/relook")
    assert password not in shown
    assert shown.endswith("db.example/relook")


@pytest.mark.parametrize(
    "text",
    [
        "file:///srv/relook/blobs",
        "sqlite:////home/a/relook.db",
        "s3://bucket/blobs?endpoint_override=minio:9000&scheme=http&region=eu",
        "postgresql://relook@db:5432/relook?sslmode=require&application_name=relook",
        "Label Studio at http://127.0.0.1:8080/api/tasks?project=3&page=2 responded 502",
        "image a:b@c is not readable",
        "no URL at all",
    ],
)
def test_what_is_no_secret_stays_readable(text: str) -> None:
    assert without_secrets(text) == text
    assert str(RelookError(text)) == text


def test_the_mask_says_that_something_was_there() -> None:
    assert without_secrets("postgresql://relook:x@db/r?password=y") == (
        f"postgresql://relook:{MASK}@db/r?password={MASK}"
    )
