"""From a project that people labelled by hand to a retrained model, through the Python interface and a real server."""

import io
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import relook
from cluster.cli import run
from labeling.client import LabelStudioClient
from labeling.local_server import ServerInfo
from labeling.simulated_annotator import annotate
from records.datasets import load_dataset
from records.types import Annotation, Image, ReviewItem
from tests.labeling.test_existing_project import embedded, make_project, result_of

PETS = runpy.run_path(str(Path(__file__).parents[1] / "e2e" / "pets.py"))
CHOICES = {"Kater": "cats", "Hund": "dogs", "Eule": "owls"}
PAGE = (
    '<View><Image name="photo" value="$photo"/><Choices name="dx" toName="photo">'
    + "".join(f'<Choice value="{choice}"/>' for choice in (*CHOICES, "Weiss nicht"))
    + "</Choices></View>"
)
SAID = ",".join([f"{choice}={code}" for choice, code in CHOICES.items()] + ["Weiss nicht=cant-tell"])
SMALL = {
    "trainers.model.side_px": 32, "trainers.epochs": 4, "trainers.batch_size": 16, "trainers.precision": "fp32",
    "trainers.workers.threads": 1, "labeling.blind_share": 0.0,
}  # fmt: skip


def jpeg(kind: str, random: np.random.Generator) -> bytes:
    file = io.BytesIO()
    PETS["draw"](kind, random).save(file, "JPEG", quality=92)
    return file.getvalue()


def labelled_project(client: LabelStudioClient, per_class: int = 20) -> int:
    """A project in which three people labelled, two of them each image; of the last image they say two things."""
    number, random = make_project(client, PAGE), np.random.default_rng(5)
    people = [client.ensure_user(f"person{n}@example.org", "Person", str(n)) for n in range(3)]
    tasks = []
    for choice, kind in CHOICES.items():
        for n in range(per_class):
            said = [choice, "Hund" if kind == "owls" and n == per_class - 1 else choice]
            annotations = [
                {"result": result_of(one), "completed_by": people[(n + m) % 3]} for m, one in enumerate(said)
            ]
            data = {"photo": embedded(jpeg(kind, random))}
            tasks.append({"data": data, "annotations": annotations})
    assert len(client.import_tasks(number, tasks)) == 3 * per_class
    return number


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")
def test_a_labelled_project_becomes_a_model_that_is_retrained_on_new_labels(
    server: ServerInfo,
    client: LabelStudioClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
) -> None:
    monkeypatch.setenv("RELOOK_LABELING__TOKEN", server.token.get_secret_value())
    monkeypatch.chdir(tmp_path)
    number = labelled_project(client)
    PETS["write_taxonomy"](tmp_path / "pets.yaml")
    settings = {**SMALL, "labeling.url": server.url, "records.taxonomy": str(tmp_path / "pets.yaml")}
    where = [f"--set={name}={value}" for name, value in {**settings, "records.home": tmp_path / "home"}.items()]
    assert (
        run(["data", "import", "--label-studio", server.url, "--project", str(number), "--labels", SAID, *where]) == 0
    )
    with relook.open_home(tmp_path / "home", set=settings) as home:
        with home.store.ledger.read() as tx:
            readers = Counter(row.annotator for row in tx.find(Annotation))
        assert (readers.total(), len(readers)) == (120, 3), "each annotation has its annotator"
        first = relook.train(home)
        assert run(["label", "link", "--project", str(number), "--labels", SAID, *where]) == 0

        random = np.random.default_rng(9)
        (tmp_path / "new").mkdir()
        for n in range(9):
            kind = list(CHOICES.values())[n % 3]
            (tmp_path / "new" / f"{kind}_{n}.jpg").write_bytes(jpeg(kind, random))
        assert relook.select(home, first, budget=6, rule="random", pool="new").selected == 6
        sent = relook.sync_labels(home)
        # The image that two people disagree about is asked about once more, in the same project.
        assert (sent.adjudications, sent.push.pushed, sent.push.unreadable) == (1, 7, [])
        with home.store.ledger.read() as tx:
            names = {image.id: str(image.source_id) for image in tx.find(Image)}
            assert {item.project_id for item in tx.find(ReviewItem)} == {None, number}
        truth = {i: name.partition("_")[0].rpartition("/")[2] for i, name in names.items() if "_" in name}
        assert len(annotate(client, home.store, truth)) == 6
        read = relook.sync_labels(home)
        assert (read.pull.new_labels, read.pull.not_understood, read.pull.failed) == (6, [], [])

        outcome = relook.run_round(home, set={"round.tune": "never", "round.select_budget": 2})
        assert outcome.record.finished_at is not None
        assert outcome.results["fit"]["model_id"] != first.id
        rows = load_dataset(home.store, outcome.results["version"]["dataset_id"]).rows
        sources = Counter(rows["label_source"].str.partition(":")[0])
        assert sources == {"import": 59, "annotator": 6}, "the disputed image waits for its adjudication"
        assert set(rows.loc[rows["label_source"].str.startswith("annotator"), "split"]) == {"train"}
        agree = {truth[image_id] == label for image_id, label in zip(rows["image_id"], rows["label"], strict=True)
                   if image_id in truth}  # fmt: skip
        assert agree == {True}
