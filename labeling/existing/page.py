"""The labeling page of a project that somebody else made: which control names the class, and what its choices mean.

In: the page's XML, and the results of annotations. Out: the key of the image in a task's data, the control, and a
`ParsedAnnotation` per result. Choices are compared with the taxonomy as the labels of tables are.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from images.import_plan import read_label
from images.pairs import label_pair
from labeling.tasks import CANT_TELL, ParsedAnnotation, chosen_values
from records.errors import DataError, TaxonomyError
from records.taxonomy import Taxonomy, folded
from records.types import AnnotationKind
from records.types.base import LINE

_UNSURE = frozenset(
    {CANT_TELL, "can't tell", "cannot tell", "cant tell", "unsure", "not sure", "don't know", "uncertain"}
)
_MODEL_KEYS = frozenset({"prediction", "heatmap", "cases"})
_CONTROLS = frozenset(
    {
        "choices", "taxonomy", "labels", "rectanglelabels", "polygonlabels", "brushlabels", "keypointlabels",
        "ellipselabels", "vectorlabels", "bitmasklabels", "pairwise", "ranker", "rating", "textarea", "number",
    }
)  # fmt: skip


@dataclass(frozen=True)
class LabelPage:
    """What is read of a labeling page.

    Args:
        from_name: name of the control whose choices are classes.
        to_name: name of the image that it is about.
        image_key: key of that image in a task's data.
        choices: its choices as annotations hold them; empty if each task brings its own.
        keys: every key of a task's data that the page uses, to the tag that shows it.
        lists: those keys whose values are lists.
        said: `--labels`: choice to class, where taxonomy and choice differ.
        unread: controls whose results are not taken, with the kind of each.
    """

    from_name: str
    to_name: str
    image_key: str
    choices: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    lists: frozenset[str] = frozenset()
    said: Mapping[str, str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    @property
    def shows_model(self) -> bool:
        """Whether annotators see the model's prediction or its heat map."""
        return not _MODEL_KEYS.isdisjoint(self.keys)

    def parse(self, result: Sequence[Mapping[str, Any]], taxonomy: Taxonomy) -> ParsedAnnotation:
        """Return the content of an annotation; a choice that means no class is kept as a text and not trained on."""
        chosen = chosen_values(result, self.from_name, "choices")
        if not chosen:
            said = f"nothing was chosen in {self.from_name!r}"
        elif len(chosen) > 1:
            said = f"several classes were chosen: {', '.join(chosen)}"
        else:
            try:
                meaning = self.meaning(chosen[0], taxonomy)
            except TaxonomyError:
                said = f"not a class: {chosen[0]}"
            else:
                kind = AnnotationKind.CLASS if meaning is not None else AnnotationKind.CANT_TELL
                return ParsedAnnotation(kind, meaning, None, None, None)
        return ParsedAnnotation(AnnotationKind.OTHER, None, LINE.keep(said), None, None, understood=False)

    def meaning(self, choice: str, taxonomy: Taxonomy) -> str | None:
        """Return the class that a choice means, None for "can't tell"; TaxonomyError if it means neither."""
        meant = {folded(key): value for key, value in self.said.items()}.get(folded(choice), choice)
        if taxonomy.class_of(meant) is None and folded(meant) in _UNSURE:
            return None
        return read_label(meant, taxonomy)

    def result(self, code: str | None, taxonomy: Taxonomy) -> list[dict[str, Any]]:
        """Return the regions of an annotation that names a class, or "can't tell"; none if no choice means it."""
        meant = {code: choice for choice, code in self.classes(taxonomy).items()}
        unsure = [choice for choice in self.choices if self.is_unsure(choice, taxonomy)]
        chosen = meant.get(code) if code is not None else next(iter(unsure), None)
        if chosen is None:
            return []
        value = {"choices": [chosen]}
        return [{"from_name": self.from_name, "to_name": self.to_name, "type": "choices", "value": value}]

    def is_unsure(self, choice: str, taxonomy: Taxonomy) -> bool:
        """Return whether a choice means "can't tell"."""
        try:
            return self.meaning(choice, taxonomy) is None
        except TaxonomyError:
            return False

    def classes(self, taxonomy: Taxonomy) -> dict[str, str]:
        """Return choice to class, of the choices that mean one."""
        found = {}
        for choice in self.choices:
            try:
                code = self.meaning(choice, taxonomy)
            except TaxonomyError:
                continue
            if code is not None:
                found[choice] = code
        return found


def read_page(
    label_config: str, taxonomy: Taxonomy, *, choices: str | None = None, said: Mapping[str, str] | None = None
) -> LabelPage:
    """Read a labeling page.

    Args:
        label_config: its XML.
        taxonomy: its classes are what choices may mean.
        choices: name of the control with the classes; None takes the only one that has some.
        said: choice to class, or to `cant-tell`, where they are not written alike.
    Returns:
        The page.
    Raises:
        DataError: there is no such control, several, none of whose choices is a class, or no image.
        TaxonomyError: `said` names a class that there is not.
    """
    said = dict(said or {})
    for code in said.values():
        if code != CANT_TELL:
            taxonomy.index_of(code)
    page = _parsed(label_config)
    tags = [(str(one.tag).lower(), one) for one in page.iter()]
    images = {one.get("name", ""): one for tag, one in tags if tag == "image"}
    about = {one.get("name", ""): one for tag, one in tags if tag == "choices" and _image_of(one, images) is not None}
    whole = {name: one for name, one in about.items() if one.get("perRegion", "").lower() != "true"}
    others = [(tag, one.get("name", "")) for tag, one in tags if tag in _CONTROLS and one.get("name") not in whole]
    unread = tuple(LINE.keep(f"<{tag}> {name!r}") for tag, name in others)
    if not whole:
        has = f"; it has {', '.join(unread)}, whose results are no class of a whole image" if unread else ""
        raise DataError(f"the project's page has no <Choices> about an <Image>, which is where a class is read{has}")
    from_name = _control(whole, taxonomy, choices, said)
    control = whole[from_name]
    to_name = _image_of(control, images) or ""
    shown = images[to_name].get("value") or images[to_name].get("valueList") or ""
    if not shown.startswith("$") or len(shown) == 1:
        raise DataError(f"the image {to_name!r} of the project's page has no value of the form $key")
    # In the order of the page; an image wins over a text with the same key.
    used = [(key, tag, name) for tag, one in tags for name, key in one.items() if key.startswith("$") and key != "$"]
    keys = {key[1:]: tag for key, tag, _ in sorted(used, key=lambda use: use[1] == "image")}
    lists = frozenset(key[1:] for key, _, name in used if name == "valueList")
    listed = () if "$" in control.get("value", "") else tuple(choices_of(control))
    return LabelPage(from_name, to_name, shown[1:], listed, keys, lists, said, unread)


def choices_of(control: ElementTree.Element) -> list[str]:
    """Return the choices of a control as annotations hold them."""
    return [one.get("alias") or one.get("value") or "" for one in control.iter() if str(one.tag).lower() == "choice"]


def _image_of(control: ElementTree.Element, images: Mapping[str, object]) -> str | None:
    named = [name.strip() for name in control.get("toName", "").split(",") if name.strip() in images]
    # A choice about two images compares them, and is no class of either.
    return named[0] if len(named) == 1 else None


def _control(
    controls: Mapping[str, ElementTree.Element], taxonomy: Taxonomy, choices: str | None, said: Mapping[str, str]
) -> str:
    if choices is not None and choices not in controls:
        raise DataError(f"the project's page has no choices {choices!r} about an image; it has {', '.join(controls)}")
    candidates = dict(controls) if choices is None else {choices: controls[choices]}
    # Choices that come from each task's data are known only when they are read.
    fitting = [
        name
        for name, one in candidates.items()
        if not choices_of(one) or LabelPage(name, "", "", tuple(choices_of(one)), said=said).classes(taxonomy)
    ]
    if len(fitting) > 1:
        raise DataError(f"{' and '.join(fitting)} of the project's page could name the class; name one with --choices")
    if not fitting:
        have = "; ".join(f"{name}: {', '.join(choices_of(one))}" for name, one in candidates.items())
        first = choices_of(next(iter(candidates.values())))[0]
        raise DataError(
            f"none of the choices of the project's page ({LINE.keep(have)}) is a class of the taxonomy "
            f"{taxonomy.name!r}; map them with --labels, for example --labels "
            f"'{label_pair(LINE.keep(first), taxonomy.codes[0])}'"
        )
    return fitting[0]


def _parsed(label_config: str) -> ElementTree.Element:
    # A page has no use for entities, whose expansion may be without end.
    if "<!doctype" in label_config.lower() or "<!entity" in label_config.lower():
        raise DataError("the project's page holds a document type, which a labeling page does not have")
    try:
        return ElementTree.fromstring(label_config)
    except ElementTree.ParseError as error:
        raise DataError(f"the project's page is not XML ({error})") from error
