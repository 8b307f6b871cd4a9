"""Settings: impossible values are refused, and the message names the setting."""

import pytest
from pydantic import ValidationError

from records.types import Consent
from serving.settings import ServingSettings, compute_threads


@pytest.mark.parametrize("host", ["example.org", "", "localhost:80", "1.2.3"])
def test_only_an_address_is_listened_on(host: str) -> None:
    with pytest.raises(ValidationError, match="not an IP address"):
        ServingSettings(host=host)


@pytest.mark.parametrize(("host", "url"), [("127.0.0.1", "http://127.0.0.1:80"), ("::1", "http://[::1]:80")])
def test_the_url_has_host_and_port(host: str, url: str) -> None:
    assert ServingSettings(host=host, port=80).url == url


def test_bodies_have_to_fit_the_largest_image_twice() -> None:
    with pytest.raises(ValidationError, match="at least twice max_upload_mb"):
        ServingSettings(max_upload_mb=20, max_bodies_mb=39)
    assert ServingSettings(max_upload_mb=20, max_bodies_mb=40, host="localhost").url.startswith("http://localhost:")


def test_a_batch_has_to_fit_into_max_in_flight() -> None:
    with pytest.raises(ValidationError, match="raise max_in_flight"):
        ServingSettings(max_batch_size=32, max_in_flight=16)


@pytest.mark.parametrize("field", [{"port": 0}, {"audit_share": 1.5}, {"precision": "int8"}, {"unknown": 1}])
def test_values_out_of_range_are_refused(field: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ServingSettings.model_validate(field)


def test_every_field_is_described() -> None:
    assert all(field.description for field in ServingSettings.model_fields.values())
    assert ServingSettings().default_consent is Consent.TRAINING


@pytest.mark.parametrize(("cpus", "threads"), [(0.1, 1), (0.5, 1), (1.0, 1), (1.5, 2), (4.0, 4)])
def test_threads_are_the_cores_of_the_replica(cpus: float, threads: int) -> None:
    assert compute_threads(cpus) == threads
