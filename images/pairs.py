"""Pairs of an option, such as `--labels 'NEV=nv,"Melanoma, NOS"=mel'`: what somebody else wrote, and what it means.

Quotation marks around a side or around a whole pair keep its commas, as in a CSV file; `""` between them is one mark.
"""

import re

from records.errors import DataError

_QUOTED = r'"(?:[^"]|"")+"'
_PAIR = re.compile(rf"\s*({_QUOTED}|[^,]*?)\s*=\s*({_QUOTED}|[^,]*?)\s*(?:,|\Z)")
_WHOLE = re.compile(rf"\s*({_QUOTED})\s*(?:,|\Z)")


def parse_columns(text: str | None) -> dict[str, str]:
    """Read the value of `--columns`; DataError if a part is not of the form `what=column`.

    >>> parse_columns('dx="Diagnosis, final",lesion=mole_id')
    {'dx': 'Diagnosis, final', 'lesion': 'mole_id'}
    """
    return _pairs(text, "--columns", "what=column, for example dx=diagnosis", own_is_left=False)


def parse_labels(text: str | None, form: str = "label=class, for example NEV=nv") -> dict[str, str]:
    """Read the value of `--labels`; DataError if a part is not of the form `label=class`.

    >>> parse_labels('NEV=nv,"Melanoma, NOS"=mel,size=large=bkl')
    {'NEV': 'nv', 'Melanoma, NOS': 'mel', 'size=large': 'bkl'}
    """
    return _pairs(text, "--labels", form, own_is_left=True)


def label_pair(label: str, code: str) -> str:
    """Return what `--labels` takes to read a label as a class.

    >>> label_pair("Melanoma, NOS", "mel")
    '"Melanoma, NOS"=mel'
    """
    is_plain = "," not in label and not label.startswith('"')
    return f"{label}={code}" if is_plain else '"' + label.replace('"', '""') + f'"={code}'


def _pairs(text: str | None, option: str, form: str, *, own_is_left: bool) -> dict[str, str]:
    """Return left side to right; the side that is somebody's own text may hold further equal signs."""
    found: dict[str, str] = {}
    at = 0
    while text and (not found or text[at - 1] == ","):
        left = right = ""
        if (whole := _WHOLE.match(text, at)) is not None:
            left, right = _cut(_bare(whole[1]), own_is_left)
        elif (pair := _PAIR.match(text, at)) is not None:
            left, right = pair[1], pair[2]
            if _bare(left) == left and _bare(right) == right:
                left, right = _cut(f"{left}={right}", own_is_left)
        if not left or not right:
            part = text[at:].partition(",")[0]
            raise DataError(
                f"{option} cannot read {part!r}; write {form}, with a name that has a comma in quotation marks"
            )
        found[_bare(left)] = _bare(right)
        at = (whole or pair).end()  # type: ignore[union-attr]
    return found


def _cut(text: str, at_last: bool) -> tuple[str, str]:
    left, _, right = text.rpartition("=") if at_last else text.partition("=")
    return left.strip(), right.strip()


def _bare(side: str) -> str:
    return side[1:-1].replace('""', '"') if re.fullmatch(_QUOTED, side) else side
