"""All error classes of Relook.

    RelookError
    ├── UserError                 the caller can fix it: exit code 2, or a 4xx response
    │   ├── ConfigError           a setting that cannot work: names field, value and a valid one
    │   ├── DataError             a folder, table or image that cannot be used
    │   │   └── ImageError        bytes that are not an image Relook reads
    │   ├── ArgumentError         an argument of the classifier for scikit-learn (also a ValueError)
    │   ├── TaxonomyError         classes that do not fit together
    │   ├── UnknownIdError        an id that names nothing, or more than one thing
    │   ├── RefusedError          a request that is understood and not allowed
    │   └── AccessError           an unknown caller, or one without permission
    ├── ContractError             a function was called against its contract (a bug in the caller)
    ├── IntegrityError            stored bytes or rows are not what their hash says
    ├── DivergedError             training produced a loss that is not finite
    └── UnavailableError          a server, database or storage does not respond
        └── LabelStudioError      Label Studio refused, failed or is down
            ├── LabelStudioRefusedError it responded, and does not take what was sent to it
            └── LabelStudioStartError   the local one does not start (also a UserError)

Every message is one sentence that says what was wrong and what would be right; passwords in URLs are masked.
"""

import re

from records.redaction import without_secrets

_IN_A_TRACEBACK = re.compile(r"\brecords\.errors\.(\w+): (.+)")


class RelookError(Exception):
    """Base of all errors that Relook raises on purpose."""

    def __init__(self, message: str = "") -> None:
        # Messages quote settings and what drivers say, so secrets are masked here and not where an error is raised.
        super().__init__(without_secrets(message))


class UserError(RelookError):
    """Raised when the input is wrong and the caller can fix it."""


class ConfigError(UserError):
    """Raised when a setting cannot work."""


class DataError(UserError):
    """Raised when a data folder, a table or a file cannot be used."""


class ImageError(DataError):
    """Raised when bytes are not an image that Relook reads.

    Args:
        message: one sentence for the person who sent the image.
        code: a stable identifier for programs, such as `not_an_image` or `too_many_pixels`.
    """

    def __init__(self, message: str, code: str = "not_an_image") -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        """Pickle the code as well: by default an exception pickles only what it passed to `Exception`."""
        return type(self), (str(self), self.code)


class ArgumentError(UserError, ValueError):
    """Raised when an argument of the classifier for scikit-learn cannot be used; its tools expect a ValueError."""


class TaxonomyError(UserError):
    """Raised when classes are malformed, or two taxonomies that must agree do not."""


class UnknownIdError(UserError):
    """Raised when an id or a prefix names nothing, or more than one thing."""


class RefusedError(UserError):
    """Raised when a request is understood and not allowed."""


class AccessError(UserError):
    """Raised when a caller is unknown, lacks a permission or exceeds a rate limit.

    Args:
        message: one sentence for the caller.
        code: `unauthenticated`, `forbidden`, `rate_limited` or `busy`.
    """

    def __init__(self, message: str, code: str = "forbidden") -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["AccessError"], tuple[str, str]]:
        """Pickle the code as well: by default an exception pickles only what it passed to `Exception`."""
        return type(self), (str(self), self.code)


class ContractError(RelookError):
    """Raised when a function is called against its documented contract."""


class IntegrityError(RelookError):
    """Raised when stored bytes or rows are not what their hash says."""


class DivergedError(RelookError):
    """Raised when training produced a loss that is not finite."""


class UnavailableError(RelookError):
    """Raised when a server, database or storage that is needed does not respond."""


class LabelStudioError(UnavailableError):
    """Raised when Label Studio refused a call, failed, or cannot be reached."""


class LabelStudioRefusedError(LabelStudioError):
    """Raised when Label Studio, or a proxy before it, responded and did not take what was sent to it."""


class LabelStudioStartError(LabelStudioError, UserError):
    """Raised when the local Label Studio does not start; the cause is on this machine."""


def error_class(name: str) -> type[RelookError]:
    """Return the error class of that name, to rebuild an error that another process recorded as text.

    Exceptions of third-party code may not be picklable, so processes exchange class name and message. A name
    that is none of the classes above gives `RelookError`.
    """
    # Only this module is searched: a recorded name must not be able to import anything.
    known = globals().get(name)
    return known if isinstance(known, type) and issubclass(known, RelookError) else RelookError


def quoted_error(text: str) -> RelookError | None:
    """Rebuild the last error of ours in a text that quotes tracebacks, as Ray's errors do; None if there is none."""
    quoted = _IN_A_TRACEBACK.findall(text)
    if not quoted:
        return None
    name, message = quoted[-1]
    return error_class(name)(message.strip())
