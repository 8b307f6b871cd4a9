import pickle

import pytest

from records import errors


def test_what_the_caller_can_fix_is_a_user_error() -> None:
    ours = {e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, errors.RelookError)}
    users = {e.__name__ for e in ours if issubclass(e, errors.UserError)}
    assert users == {
        "UserError",
        "AccessError",
        "ArgumentError",
        "ConfigError",
        "DataError",
        "ImageError",
        "TaxonomyError",
        "UnknownIdError",
        "RefusedError",
        "LabelStudioStartError",
    }
    assert len(ours) == 17


def test_an_image_error_keeps_its_code_between_processes() -> None:
    error = pickle.loads(pickle.dumps(errors.ImageError("too large", "too_many_pixels")))
    assert (str(error), error.code) == ("too large", "too_many_pixels")


def test_an_image_error_is_caught_as_bad_data() -> None:
    with pytest.raises(errors.DataError, match=r"^no$"):
        raise errors.ImageError("no")


def test_an_error_recorded_by_name_is_rebuilt_and_an_unknown_name_is_the_base_class() -> None:
    assert errors.error_class("DataError") is errors.DataError
    for name in ("ValueError", "error_class", ""):
        assert errors.error_class(name) is errors.RelookError
