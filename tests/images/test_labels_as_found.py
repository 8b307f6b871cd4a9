"""Labels as tables write them: case, names, aliases, numbers, words that look like blanks; and what is then stored."""

import json
from pathlib import Path

import pytest

from cluster.cli import run
from images.import_plan import read_label
from images.importer import import_folder
from images.synth import render
from records.datasets import load_dataset
from records.errors import DataError, TaxonomyError
from records.ids import utc_now
from records.settings import RecordsSettings
from records.store import open_store
from records.taxonomy import Taxonomy, load_taxonomy
from records.types import Annotation, AnnotationKind, AuditEvent, Image, SourceLabel

HAM = load_taxonomy("ham10000")


def made(*codes: str, **aliases: list[str]) -> Taxonomy:
    classes = [{"code": c, "name": f"Class {c}", "malignant": False, "aliases": aliases.get(c, [])} for c in codes]
    return Taxonomy.model_validate({"name": "made", "version": 1, "classes": classes})


def write(folder: Path, labels: list[str]) -> Path:
    folder.mkdir()
    for n in range(len(labels)):
        (folder / f"i{n}.jpg").write_bytes(render("nv", seed=n))
    (folder / "t.csv").write_text("image_id,dx\n" + "".join(f"i{n},{label}\n" for n, label in enumerate(labels)))
    return folder


@pytest.mark.parametrize("text", ["mel", "MEL", "Mel", " mel ", "Melanoma", "MELANOMA", "melanoma ", "ＭＥＬ"])
def test_code_and_name_without_case(text: str) -> None:
    assert read_label(text, HAM) == "mel"


def test_aliases_numbers_and_given_labels() -> None:
    taxonomy = made("mel", "nv", mel=["Melanoma, NOS", "MM"], nv=["NEV"])
    assert [read_label(t, taxonomy) for t in ("melanoma,  nos", "mm", "Nev")] == ["mel", "mel", "nv"]
    assert read_label("Nevus", taxonomy, {"NEVUS": "nv"}) == "nv"
    numbers = made("0", "1", "10")
    assert [read_label(t, numbers) for t in ("0.0", "1.00", "10", "10.0")] == ["0", "1", "10", "10"]
    for text in ("0.5", "2.0", "1.0.0"):
        with pytest.raises(TaxonomyError, match="taxonomy 'made' has 0, 1, 10"):
            read_label(text, numbers)


@pytest.mark.parametrize("word", ["none", "na", "null", "unknown", "nan"])
def test_a_word_for_nothing_is_a_class_if_the_taxonomy_has_it(word: str) -> None:
    assert read_label(word.upper(), made(word, "scratch")) == word
    assert read_label(word, HAM) is None


def test_an_ambiguous_text_is_refused_and_an_exact_code_is_not() -> None:
    taxonomy = made("mel", "nv", mel=["tumour"], nv=["Tumour", "mel"])
    with pytest.raises(TaxonomyError, match="could be mel or nv"):
        read_label("TUMOUR", taxonomy)
    assert read_label("mel", taxonomy) == "mel"
    with pytest.raises(TaxonomyError, match="could be mel or nv"):
        read_label("MEL", taxonomy)


def test_aliases_do_not_change_the_hash() -> None:
    plain = made("mel", "nv")
    assert made("mel", "nv", mel=["MM"]).hash == plain.hash
    assert "aliases" not in plain.model_dump_json()
    assert HAM.hash == "9c542b3368e143062c52d47bd33bd31e2581e004f797d031266cfc341c74f71a"


def test_an_import_stores_what_it_counts(tmp_path: Path) -> None:
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    first = import_folder(store, write(tmp_path / "one", ["MEL", "Melanocytic nevus", "unknown", "zebra"]))
    assert first.classes == {"mel": 1, "nv": 1}
    assert first.unlabelled == 1
    assert [q.source_id for q in first.quarantined] == ["i3"]
    # The same images with another label of the same rank: refused, and what is stored is counted.
    second = import_folder(store, write(tmp_path / "two", ["nv", "NV"]))
    assert second.classes == {"mel": 1, "nv": 1}
    assert [(q.source_id, q.code) for q in second.quarantined] == [("i0", "label_conflict")]
    with store.ledger.read() as tx:
        assert sorted(label.label for label in tx.find(SourceLabel)) == ["mel", "nv", "nv"]
    store.close()


def test_another_taxonomy_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "birds.yaml").write_text(
        "name: birds\nversion: 1\nclasses:\n"
        "  - {code: owl, name: Owl, malignant: false}\n  - {code: none, name: Nothing, malignant: false}\n"
    )
    birds = RecordsSettings(home=tmp_path / "home", taxonomy=str(tmp_path / "birds.yaml"))
    store = open_store(birds)
    assert import_folder(store, write(tmp_path / "one", ["owl", "none", "NONE"])).classes == {"none": 2, "owl": 1}
    store.close()
    for another in ("ham10000", str(tmp_path / "more.yaml")):
        (tmp_path / "more.yaml").write_text((tmp_path / "birds.yaml").read_text().replace("owl", "eagle"))
        with pytest.raises(TaxonomyError, match=r"is not that of this home, 'birds'.*it lacks owl"):
            open_store(RecordsSettings(home=tmp_path / "home", taxonomy=another))
    forgotten = open_store(RecordsSettings(home=tmp_path / "home"))
    assert forgotten.taxonomy.name == "birds"
    assert import_folder(forgotten, write(tmp_path / "two", ["owl"] * 5)).new_images == 2
    with forgotten.ledger.read() as tx:
        assert tx.count(Image) == 5
    forgotten.close()
    renamed = (tmp_path / "birds.yaml").read_text().replace("Owl", "Barn owl, miss_cost: 2.0")
    (tmp_path / "costs.yaml").write_text(renamed)
    monkeypatch.setenv("RELOOK_HOME", str(tmp_path / "home"))
    assert run(["taxonomy", "use", "ham10000"]) == 2
    assert run(["taxonomy", "use", str(tmp_path / "costs.yaml")]) == 0
    with pytest.raises(TaxonomyError, match="names, order, costs or key classes differ"):
        open_store(birds)


def test_a_choice_that_never_was_a_class_stops_no_import(tmp_path: Path) -> None:
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    choice = Annotation(
        id="a", created_at=utc_now(), review_item_id="item", image_id="image", kind=AnnotationKind.CLASS,
        label="no class", annotator="anna", annotated_at=utc_now(), server="local", project_id=1, task_id=1,
        annotation_id=1, revision="1",
    )  # fmt: skip
    with store.ledger.begin() as tx:
        tx.add(choice)
    assert import_folder(store, write(tmp_path / "data", ["mel", "nv"])).classes == {"mel": 1, "nv": 1}
    store.close()


def test_a_home_without_labels_takes_a_taxonomy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELOOK_HOME", str(tmp_path / "home"))
    assert run(["taxonomy", "use", "ham10000"]) == 0
    assert "dataset" not in capsys.readouterr().out


def test_two_first_imports_cannot_bring_two_taxonomies(tmp_path: Path) -> None:
    (tmp_path / "birds.yaml").write_text(
        "name: birds\nversion: 1\nclasses:\n"
        "  - {code: owl, name: Owl, malignant: false}\n  - {code: jay, name: Jay, malignant: false}\n"
    )
    one = open_store(RecordsSettings(home=tmp_path / "home", taxonomy=str(tmp_path / "birds.yaml")))
    other = open_store(RecordsSettings(home=tmp_path / "home"))
    import_folder(one, write(tmp_path / "one", ["owl", "jay"] * 3))
    with pytest.raises(TaxonomyError, match=r"taxonomy 'ham10000' .* is not that of this home, 'birds'"):
        import_folder(other, write(tmp_path / "two", ["nv"] * 8))
    with other.ledger.read() as tx:
        assert tx.count(Image) == 6
    for store in (one, other):
        store.close()


@pytest.mark.parametrize("one", ["1", "1.0"])
@pytest.mark.parametrize("head", ["image", "image_id"])
def test_a_column_per_class(tmp_path: Path, one: str, head: str) -> None:
    folder = write(tmp_path / "data", ["nv"] * 5)
    rows = [f"i0,{one},0,0", f"i1,0,{one},0.0", f"i2,0,0.0,{one}", "i3,0,0,0", f"i4,{one},{one},0"]
    (folder / "t.csv").write_text(f"{head},MEL,NV,UNK\n" + "\n".join(rows) + "\n")
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    report = import_folder(store, folder)
    store.close()
    assert (report.classes, report.unlabelled) == ({"mel": 1, "nv": 1}, 2)
    assert [q.reason for q in report.quarantined if "MEL and NV" in q.reason] == [q.reason for q in report.quarantined]
    assert len(report.quarantined) == 1


def test_columns_of_probabilities_are_no_labels(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", ["nv"])
    (folder / "t.csv").write_text("image_id,MEL,NV\ni0,0.7,0.3\n")
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    with pytest.raises(DataError, match="has no column 'dx'"):
        import_folder(store, folder)
    store.close()


def test_the_verb_takes_labels_and_names_the_unlabelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RELOOK_HOME", str(tmp_path / "home"))
    folder = write(tmp_path / "data", ["SEK", "NEV", "n/a"])
    assert run(["data", "import", str(folder), "--labels", "SEK=bkl,nev=nv", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["classes"] == {"bkl": 1, "nv": 1}
    assert run(["data", "import", str(folder), "--labels", "SEK=bkl,nev=nv"]) == 0
    assert "without a label" in capsys.readouterr().out
    assert run(["data", "import", str(folder), "--labels", "SEK=sek"]) == 2
    assert "unknown class 'sek'" in capsys.readouterr().err
    assert run(["data", "import", str(folder), "--labels", "SEK"]) == 2
    assert "--labels cannot read 'SEK'" in capsys.readouterr().err


def test_a_corrected_label_is_a_further_row(tmp_path: Path) -> None:
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    tables = [["mel", "nv", "bkl"], ["nv", "nv", "bkl"], ["mel", "nv", ""]]
    first, second, third = [write(tmp_path / f"t{n}", labels) for n, labels in enumerate(tables)]
    before = import_folder(store, first)
    refused = import_folder(store, second)
    assert "1 images carry another label than before: i0 (mel -> nv); --correct takes it over" in refused.notes
    assert (refused.classes, refused.dataset_id) == (before.classes, before.dataset_id)
    corrected = import_folder(store, second, correct=True)
    assert corrected.classes == {"bkl": 1, "nv": 2}
    assert corrected.dataset_id != before.dataset_id
    assert "1 labels were corrected, as single_reader (rank 3): i0 (mel -> nv)" in corrected.notes
    # Again changes nothing; the first table is the one that differs now, and a blank takes no label away.
    assert import_folder(store, second, correct=True).dataset_id == corrected.dataset_id
    assert import_folder(store, first).classes == corrected.classes
    back = import_folder(store, third, correct=True)
    assert (back.classes, back.dataset_id, back.unlabelled) == (before.classes, before.dataset_id, 0)
    assert import_folder(store, second, correct=True).dataset_id == corrected.dataset_id
    with store.ledger.read() as tx:
        assert sorted(row.source.split(":")[0] for row in tx.find(SourceLabel)).count("correction") == 3
        assert [e.details for e in tx.find(AuditEvent, where={"action": "labels.corrected"})] == [
            {"mel -> nv": 1}, {"nv -> mel": 1}, {"mel -> nv": 1},
        ]  # fmt: skip
    assert load_dataset(store, corrected.dataset_id).rows["label_source"].str.startswith("correction:1:").sum() == 1
    store.close()


def test_images_without_a_label_are_named(tmp_path: Path) -> None:
    store = open_store(RecordsSettings(home=tmp_path / "home"))
    report = import_folder(store, write(tmp_path / "one", ["nv", "mel", "", "unknown", "na", "null", "none", "nan"]))
    assert report.unlabelled == 6
    assert "6 images have no label: i2, i3, i4, i5, i6, ..." in report.notes
    store.close()
