from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from records.errors import TaxonomyError
from records.taxonomy import load_taxonomy

BIRDS: dict[str, Any] = {
    "name": "birds",
    "version": 1,
    "classes": [
        {"code": "owl", "name": "Owl", "malignant": False},
        {"code": "emu", "name": "Emu", "malignant": True, "miss_cost": 3},
    ],
    "key_classes": [{"code": "emu"}],
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[[object], str]:
    def to_file(value: object) -> str:
        path = tmp_path / "taxonomy.yaml"
        path.write_text(value if isinstance(value, str) else yaml.safe_dump(value))
        return str(path)

    return to_file


def _changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    birds = deepcopy(BIRDS)
    change(birds)
    return birds


def test_the_built_in_one_is_the_contract() -> None:
    taxonomy = load_taxonomy("ham10000")
    assert taxonomy.codes == ("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc")
    assert taxonomy.malignant_codes == ("akiec", "bcc", "mel")
    assert taxonomy.key_class is not None
    assert (taxonomy.key_class.code, taxonomy.key_class.sensitivity_floor) == ("mel", 0.90)
    assert taxonomy.index_of("mel") == 4


def test_a_file_is_read_and_order_is_declared(write: Callable[[object], str]) -> None:
    taxonomy = load_taxonomy(write(BIRDS))
    assert taxonomy.codes == ("owl", "emu")
    assert taxonomy.hash == load_taxonomy(write(BIRDS)).hash
    turned = load_taxonomy(write(_changed(lambda b: b["classes"].reverse())))
    assert turned.codes == ("emu", "owl")
    assert turned.hash != taxonomy.hash


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda b: b.pop("name"), "name: Field required"),
        (lambda b: b.update(version=0), "version: "),
        (lambda b: b.update(classes=b["classes"][:1], key_classes=[]), "classes: "),
        (lambda b: b["classes"][1].update(code="Emu!"), r"classes\.1\.code: "),
        (lambda b: b["classes"][1].update(code=False), r"classes\.1\.code: "),
        (lambda b: b["classes"][0].pop("malignant"), r"classes\.0\.malignant: "),
        (lambda b: b["classes"][0].update(miss_cost=-1), r"classes\.0\.miss_cost: "),
        (lambda b: b["classes"][0].update(miss_cost=float("nan")), r"classes\.0\.miss_cost: "),
        (lambda b: b["classes"][0].update(color="red"), r"classes\.0\.color: "),
        (lambda b: b["classes"][1].update(code="owl"), "'owl' is declared twice"),
        (lambda b: b.update(key_classes=[{"code": "dodo"}]), "key class 'dodo' is not among the classes owl, emu"),
        (lambda b: b["key_classes"][0].update(sensitivity_floor=1.5), r"key_classes\.0\.sensitivity_floor: "),
    ],
)
def test_errors_name_the_field(
    write: Callable[[object], str], change: Callable[[dict[str, Any]], object], named: str
) -> None:
    with pytest.raises(TaxonomyError, match=named):
        load_taxonomy(write(_changed(change)))


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", ""])
def test_another_document_is_refused(write: Callable[[object], str], text: str) -> None:
    with pytest.raises(TaxonomyError, match="the document"):
        load_taxonomy(write(text))


def test_what_is_not_yaml_is_refused(write: Callable[[object], str], tmp_path: Path) -> None:
    with pytest.raises(TaxonomyError, match="is not YAML"):
        load_taxonomy(write("classes: [a"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TaxonomyError, match="cannot be read"):
        load_taxonomy(str(tmp_path / "binary.yaml"))
    with pytest.raises(TaxonomyError, match="no taxonomy"):
        load_taxonomy(str(tmp_path / "missing.yaml"))


def test_unknown_class_and_other_taxonomy_are_named() -> None:
    taxonomy = load_taxonomy("ham10000")
    with pytest.raises(TaxonomyError, match="unknown class 'owl'; taxonomy 'ham10000' has akiec, bcc"):
        taxonomy.index_of("owl")
    taxonomy.require_same(taxonomy.hash, "this bundle")
    with pytest.raises(TaxonomyError, match="this bundle was made with taxonomy 000000000000"):
        taxonomy.require_same("0" * 64, "this bundle")


def test_a_taxonomy_never_changes() -> None:
    taxonomy = load_taxonomy("ham10000")
    with pytest.raises(ValidationError, match="frozen"):
        taxonomy.name = "x"


@pytest.mark.parametrize("code", ["y" * 60, "Mel", "a b", "", "_x", "näv"])
def test_what_is_no_code_is_a_sentence(tmp_path: Path, code: str) -> None:
    path = tmp_path / "mine.yaml"
    classes = [{"code": name, "name": "Y", "malignant": False} for name in (code, "z")]
    path.write_text(yaml.safe_dump({"name": "x", "version": 1, "classes": classes}))
    with pytest.raises(TaxonomyError, match=r"classes\.0\.code: '.*' is no code: one has 1 to 32 characters a to z"):
        load_taxonomy(str(path))
