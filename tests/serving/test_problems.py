"""Problem documents: the right status for each kind of error, and no internal details."""

import pytest

from records.errors import (
    ConfigError,
    ContractError,
    DataError,
    ImageError,
    IntegrityError,
    RefusedError,
    TaxonomyError,
    UnavailableError,
    UnknownIdError,
)
from serving.problems import problem, problem_of


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ImageError("x"), 415, "not_an_image"),
        (ImageError("x", "unsupported_type"), 415, "unsupported_type"),
        (ImageError("x", "too_large"), 413, "too_large"),
        (ImageError("x", "too_many_pixels"), 413, "too_many_pixels"),
        (ImageError("x", "damaged"), 422, "damaged"),
        (ImageError("x", "empty"), 422, "empty"),
        (UnknownIdError("x"), 404, "not_found"),
        (RefusedError("x"), 409, "refused"),
        (DataError("x"), 422, "invalid"),
        (TaxonomyError("x"), 422, "invalid"),
        (ConfigError("x"), 422, "invalid"),
        (UnavailableError("x"), 503, "unavailable"),
        (ContractError("x"), 500, "internal"),
        (IntegrityError("x"), 500, "internal"),
        (ValueError("x"), 500, "internal"),
    ],
)
def test_each_error_has_its_status(error: Exception, status: int, code: str) -> None:
    found = problem_of(error)
    assert (found.status, found.code) == (status, code)
    assert found.type == f"urn:relook:problem:{code}"


@pytest.mark.parametrize("error", [UnavailableError, IntegrityError, RuntimeError])
def test_internal_errors_reveal_nothing(error: type[Exception]) -> None:
    found = problem_of(error("sqlite:////secret/place/ledger.db at line 7"))
    assert "secret" not in found.model_dump_json()
    assert "Traceback" not in found.model_dump_json()


def test_the_callers_errors_keep_their_sentence() -> None:
    assert problem_of(ImageError("the image is empty", "empty")).detail == "the image is empty"
    assert problem(404, "not_found", "nothing").title == "Not Found"
