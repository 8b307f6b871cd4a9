import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from records import bundles
from records.bundles import (
    Bundle,
    BundleDocument,
    content_id,
    read_bundle,
    write_bundle,
)
from records.errors import ContractError, IntegrityError, UnknownIdError
from records.models import find_bundle, register, serve_model, serving_id, serving_model
from records.store import Store
from records.types import ModelRecord, ModelStatus

Arrays = dict[str, dict[str, np.ndarray[Any, Any]]]
FILES = ("bundle.json", "weights.safetensors", "golden.safetensors")


@pytest.fixture
def bundle(store: Store, document: BundleDocument, arrays: Arrays) -> Bundle:
    """A bundle on disk, not registered."""
    return write_bundle(store, document, arrays["weights"], arrays["golden"])


@pytest.fixture
def three(store: Store, document: BundleDocument, arrays: Arrays) -> Iterator[list[Bundle]]:
    """Three registered bundles."""
    made = [
        write_bundle(store, document.model_copy(update={"code_version": str(n)}), arrays["weights"], arrays["golden"])
        for n in range(3)
    ]
    with store.ledger.begin() as tx:
        for number, each in enumerate(made):
            register(tx, each, round_number=number)
    return made


def test_everything_comes_back(store: Store, bundle: Bundle, document: BundleDocument, arrays: Arrays) -> None:
    back = read_bundle(bundle.path)
    assert back == bundle
    assert back.document == document
    assert back.path == store.home.bundles / back.id
    for read, given in ((back.weights(), arrays["weights"]), (back.golden(), arrays["golden"])):
        assert set(read) == set(given)
        for name, value in given.items():
            assert (read[name].shape, read[name].dtype) == (value.shape, value.dtype)
            np.testing.assert_array_equal(read[name], value)
    assert sorted(path.name for path in store.home.bundles.iterdir()) == [bundle.id]


def test_the_same_content_is_the_same_bundle(
    store: Store, bundle: Bundle, document: BundleDocument, arrays: Arrays
) -> None:
    turned = dict(reversed(arrays["weights"].items()))
    assert write_bundle(store, document, turned, arrays["golden"]) == bundle
    other = write_bundle(store, document, arrays["weights"] | {"more": np.zeros(1)}, arrays["golden"])
    assert other.id != bundle.id
    assert len(list(store.home.bundles.iterdir())) == 2


def test_a_report_beside_it_changes_nothing(bundle: Bundle) -> None:
    (bundle.path / "report").mkdir()
    (bundle.path / "report" / "index.html").write_text("<html>")
    assert read_bundle(bundle.path).id == bundle.id


@pytest.mark.parametrize("name", FILES)
def test_altered_and_truncated_files_are_refused(store: Store, bundle: Bundle, name: str) -> None:
    with store.ledger.begin() as tx:
        register(tx, bundle)
    file = bundle.path / name
    whole = file.read_bytes()
    altered = bytearray(whole)
    altered[-2] ^= 1
    for content in (bytes(altered), whole[:-3], b""):
        file.write_bytes(content)
        for find in (lambda: read_bundle(bundle.path), lambda: find_bundle(store, bundle.id[:8])):
            with pytest.raises(IntegrityError, match=f"bundle {bundle.id[:12]} was altered"):
                find()
    file.write_bytes(whole)
    assert read_bundle(bundle.path) == bundle


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_named(bundle: Bundle, name: str) -> None:
    (bundle.path / name).unlink()
    with pytest.raises(IntegrityError, match=f"{name} is missing"):
        read_bundle(bundle.path)


def test_a_folder_that_is_no_bundle_is_named(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.path / "bundle.json").unlink()
    for path in (bundle.path, tmp_path / "nothing"):
        with pytest.raises(UnknownIdError, match="not a model bundle"):
            read_bundle(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("weights.safetensors", b"", "cannot be read"),
        ("weights.safetensors", b"\xff" * 99, "cannot be read"),
        ("golden.safetensors", b"rubbish!" * 9, "cannot be read"),
        ("bundle.json", b"\xff\xfe", "cannot be read"),
        ("bundle.json", b"{}", "cannot be read: taxonomy: Field required"),
    ],
)
def test_rubbish_in_a_copy_without_an_id_is_refused(
    bundle: Bundle, tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    assert read_bundle(copy).id == bundle.id
    (copy / name).write_bytes(content)
    with pytest.raises(IntegrityError, match=said):
        read_bundle(copy)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"taxonomy_hash": "0" * 64}, "names a taxonomy hash that its taxonomy does not have"),
        ({"format_version": 2}, "cannot be read: format_version"),
        ({"color": "red"}, "cannot be read: color"),
    ],
)
def test_a_document_that_does_not_fit_is_refused(
    bundle: Bundle, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    copy = shutil.copytree(bundle.path, tmp_path / "copy")
    document = json.loads((copy / "bundle.json").read_text())
    (copy / "bundle.json").write_text(json.dumps(document | change))
    with pytest.raises(IntegrityError, match=said):
        read_bundle(copy)


def test_numbers_that_are_not_finite_are_not_written(store: Store, document: BundleDocument, arrays: Arrays) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ContractError, match="cannot be written as JSON"):
            write_bundle(store, document.model_copy(update={"metrics": {"x": value}}), *arrays.values())
    assert list(store.home.bundles.iterdir()) == []


def test_a_bundle_that_was_altered_is_not_taken_for_the_one_written(
    store: Store, bundle: Bundle, document: BundleDocument, arrays: Arrays
) -> None:
    (bundle.path / FILES[1]).write_bytes(b"")
    with pytest.raises(IntegrityError, match="was altered"):
        write_bundle(store, document, *arrays.values())


def test_finding_by_prefix_path_and_role(store: Store, three: list[Bundle]) -> None:
    for each in three:
        for name in (each.id, each.id[:8], str(each.path)):
            assert find_bundle(store, name) == each
    with store.ledger.begin() as tx:
        serve_model(tx, three[0].id, ModelStatus.PROVISIONAL, replaces=None)
        tx.update(ModelRecord, three[1].id, status=ModelStatus.CANDIDATE)
    assert find_bundle(store, "champion") == three[0]
    assert find_bundle(store, "candidate") == three[1]


@pytest.mark.parametrize("name", ["champion", "candidate", "abcdefgh", "", "0" * 64])
def test_names_that_nothing_has_are_refused(store: Store, three: list[Bundle], name: str) -> None:
    with pytest.raises(UnknownIdError, match=f"no model is called '{name}'"):
        find_bundle(store, name)


def test_short_prefixes_and_shared_roles_are_refused(store: Store, three: list[Bundle]) -> None:
    with pytest.raises(UnknownIdError, match="no model is called"):
        find_bundle(store, three[0].id[:7])
    with store.ledger.begin() as tx:
        for each in three[:2]:
            tx.update(ModelRecord, each.id, status=ModelStatus.CANDIDATE)
    with pytest.raises(UnknownIdError, match="2 models are called 'candidate'"):
        find_bundle(store, "candidate")


def test_a_home_that_moved_finds_its_bundles(
    store: Store, three: list[Bundle], tmp_path: Path, new_store: Callable[..., Any]
) -> None:
    store.close()
    store.home.root.rename(tmp_path / "moved")
    with new_store("moved") as moved:
        found = find_bundle(moved, three[0].id[:8])
        assert found.path == moved.home.bundles / three[0].id


def test_registering_twice_keeps_the_first(store: Store, bundle: Bundle) -> None:
    with store.ledger.begin() as tx:
        register(tx, bundle, round_number=1)
        first = tx.require(ModelRecord, bundle.id)
        register(tx, bundle, status=ModelStatus.CHAMPION, round_number=2)
        assert tx.find(ModelRecord) == [first]
    assert (first.status, first.round, first.dataset_id) == (ModelStatus.REGISTERED, 1, "d" * 64)


def test_one_model_serves_and_the_one_before_retires(store: Store, three: list[Bundle]) -> None:
    with store.ledger.begin() as tx:
        assert serving_model(tx) is None
        for each, status in zip(
            three, (ModelStatus.PROVISIONAL, ModelStatus.CHAMPION, ModelStatus.CHAMPION), strict=True
        ):
            serve_model(tx, each.id, status, replaces=serving_id(tx))
            current = serving_model(tx)
            assert current is not None
            assert (current.id, current.status) == (each.id, status)
        assert [tx.require(ModelRecord, each.id).status for each in three] == ["retired", "retired", "champion"]
        serve_model(tx, three[2].id, ModelStatus.PROVISIONAL, replaces=three[2].id)
        assert tx.require(ModelRecord, three[2].id).status == ModelStatus.PROVISIONAL


def test_two_serving_models_are_named_and_can_be_repaired(store: Store, three: list[Bundle]) -> None:
    with store.ledger.begin() as tx:
        for each in three[:2]:
            tx.update(ModelRecord, each.id, status=ModelStatus.CHAMPION)
        with pytest.raises(IntegrityError, match="2 models have the status of a serving model"):
            serving_model(tx)
        serve_model(tx, three[0].id, ModelStatus.CHAMPION, replaces=three[1].id)
        current = serving_model(tx)
        assert current is not None
        assert current.id == three[0].id


def test_a_status_that_does_not_serve_changes_nothing(store: Store, three: list[Bundle]) -> None:
    with store.ledger.begin() as tx:
        serve_model(tx, three[0].id, ModelStatus.CHAMPION, replaces=None)
        with pytest.raises(ContractError, match="retired does not serve"):
            serve_model(tx, three[1].id, ModelStatus.RETIRED, replaces=three[0].id)

    def serve_unknown() -> None:
        with store.ledger.begin() as tx:
            serve_model(tx, "unknown", ModelStatus.CHAMPION, replaces=three[0].id)

    with pytest.raises(UnknownIdError):
        serve_unknown()
    assert find_bundle(store, "champion") == three[0]


def test_the_id_is_over_three_files(bundle: Bundle) -> None:
    assert content_id(bundle.path) == bundle.id
    assert (bundles.DOCUMENT, bundles.WEIGHTS, bundles.GOLDEN) == FILES
