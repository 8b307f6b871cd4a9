"""An exported model, run without Relook: equal to torch for every network, in any batch, from its own example."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster import cli
from records.errors import ConfigError, IntegrityError
from records.ids import sha256_hex
from tests.vision.checked import side_of, weights_hash, write_checked_bundle
from tests.vision.inference.foreign import foreign_images
from vision.calibration.conformal import prediction_set, thresholds_in_order
from vision.export import folder as export_folder
from vision.export.folder import FORMATS, TOLERANCE, compare, export_model
from vision.inference.loaded import load_model, plain_network
from vision.networks import MODELS

pytestmark = pytest.mark.engines
# Tracing takes seconds for each; the others with `make soak`.
IN_SUITE = ("custom_cnn",)
CASES = [pytest.param(name, marks=() if name in IN_SUITE else pytest.mark.soak) for name in MODELS]


@pytest.fixture(scope="module", autouse=True)
def written_once():
    """Trace each graph once for both bundles that are exported again and again."""
    known = {}

    def once(kind, write):
        def shared(graph, images, folder):
            key = (kind, graph.names, weights_hash(graph))
            if key not in known:
                write(graph, images, folder)
                known[key] = {path.name: path.read_bytes() for path in folder.iterdir()}
            for name, content in known[key].items():
                (folder / name).write_bytes(content)

        return shared

    with pytest.MonkeyPatch.context() as patch:
        writers = {kind: once(kind, write) for kind, write in export_folder._WRITERS.items()}
        patch.setattr(export_folder, "_WRITERS", writers)
        yield


@pytest.fixture(scope="module")
def checked_bundle(model_store):
    return lambda name: write_checked_bundle(model_store, name)


@pytest.fixture(scope="module")
def exported(checked_bundle, tmp_path_factory):
    """(name, format) -> its bundle and the folder; each is exported once."""
    made = {}

    def export(name, kind="onnx"):
        if (name, kind) not in made:
            bundle = checked_bundle(name)
            made[name, kind] = bundle, export_model(bundle, tmp_path_factory.mktemp(name) / kind, kind)
        return made[name, kind]

    return export


def torchs(bundle, pixels):
    output = load_model(bundle, precision="fp32").predict(pixels, gradcam=True)
    document = bundle.document
    sets = prediction_set(output.probabilities, thresholds_in_order(document.operating, document.taxonomy))
    return {
        "logits": output.logits, "probabilities": output.probabilities, "prediction_set": sets, "maps": output.maps,
        "ood_score": output.ood_scores,
    }  # fmt: skip


def runs(kind, folder):
    runner = {"onnx": export_folder._run_onnx, "openvino": export_folder._run_openvino}[kind]
    return lambda pixels: runner(folder, pixels)


def test_the_cases_are_the_whole_catalogue():
    assert {case.values[0] for case in CASES} == set(MODELS)
    assert set(IN_SUITE) < set(MODELS)


@pytest.mark.parametrize("name", CASES)
def test_an_onnx_graph_equals_torch_in_any_batch(name, exported):
    bundle, done = exported(name)
    pixels = foreign_images(side_of(name), 7, seed=9)[0]
    expected, run = torchs(bundle, pixels), runs("onnx", done.folder)
    assert set(done.outputs) == set(expected)
    found = run(pixels)
    assert max(compare(found, expected).values()) <= TOLERANCE, compare(found, expected)
    assert 0 < found["prediction_set"].sum() < found["prediction_set"].size
    assert found["maps"].max() > 0
    assert (found["ood_score"] > 0).all()
    for batch in (pixels[:1], pixels[2:5]):
        rows = {key: value[: len(batch)] if len(batch) == 1 else value[2:5] for key, value in expected.items()}
        assert max(compare(run(batch), rows).values()) <= TOLERANCE
    assert run(pixels[:0])["maps"].shape == (0, *expected["maps"].shape[1:])


@pytest.mark.long
@pytest.mark.parametrize("name", ["custom_cnn", pytest.param("mobilenet_v3", marks=pytest.mark.soak)])
def test_an_openvino_graph_equals_torch(name, exported):
    bundle, done = exported(name, "openvino")
    pixels = foreign_images(side_of(name), 5, seed=9)[0]
    found = runs("openvino", done.folder)(pixels)
    assert max(compare(found, torchs(bundle, pixels)).values()) <= TOLERANCE


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind == "onnx" else pytest.mark.long) for kind in FORMATS]
)
def test_the_example_runs_with_one_package_and_proves_the_golden_outputs(kind, exported):
    bundle, done = exported("custom_cnn", kind)
    source = (done.folder / "example.py").read_text()
    assert source.count("\n") <= 30
    # Isolated and elsewhere: nothing of the project can be imported.
    words = [sys.executable, "-I", "-W", "error", str(done.folder / "example.py")]
    ended = subprocess.run(words, cwd=done.folder.parent, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("equal to") == len(done.outputs)
    assert bundle.document.taxonomy.classes[0].name in source + ended.stdout + (done.folder / "model.json").read_text()


def test_the_example_fails_where_the_graph_is_another(exported, tmp_path):
    _, done = exported("custom_cnn")
    for path in done.folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    golden = dict(np.load(tmp_path / "golden.npz"))
    golden["probabilities"] = golden["probabilities"] + 1e-3
    np.savez(tmp_path / "golden.npz", **golden)
    words = [sys.executable, "-I", str(tmp_path / "example.py")]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert ended.returncode != 0
    assert "probabilities differs by 0.001" in ended.stderr


def test_the_folder_describes_itself(exported):
    bundle, done = exported("custom_cnn")
    about = json.loads((done.folder / "model.json").read_text())
    document = bundle.document
    assert [one["code"] for one in about["classes"]] == list(document.taxonomy.codes)
    assert about["model_id"] == bundle.id
    assert about["decode_version"] == document.geometry.decode_version
    assert about["geometry"]["mean"] == list(document.geometry.mean)
    assert about["thresholds"]["conformal_thresholds"] == document.operating.conformal_thresholds
    assert set(about["tolerance"]) == set(done.outputs) == {one["name"] for one in about["outputs"]}
    assert "Apache-2.0" in about["licence"]["code"]
    files = {path.name: sha256_hex(path.read_bytes()) for path in done.folder.iterdir() if path.name != "model.json"}
    assert about["files"] == files == done.files
    assert set(files) == {"model.onnx", "golden.npz", "example.py", "README.md"}
    golden = np.load(done.folder / "golden.npz")
    assert (golden["images"] == bundle.golden()["inputs"]).all()
    readme = (done.folder / "README.md").read_text()
    assert "uint8 [N, 32, 32, 3]" in readme
    assert "decoder" in readme


def test_a_model_without_checks_and_one_without_a_closed_form_say_what_is_missing(random_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr("vision.inference.graph.closed_form_of", lambda head: None)
    done = export_model(random_bundle("custom_cnn", side_px=32), tmp_path / "bare", "onnx")
    assert set(done.outputs) == {"logits", "probabilities", "prediction_set"}
    readme = (done.folder / "README.md").read_text()
    assert "no closed form" in readme
    assert "there is no score" in readme
    assert set(runs("onnx", done.folder)(random_bundle("custom_cnn", side_px=32).golden()["inputs"])) == set(
        done.outputs
    )


def test_a_row_that_is_not_finite_excludes_nothing_and_shows_nothing(checked_bundle):
    """As in the service: NaN throughout, every class in the set."""
    import torch

    from vision.inference.graph import DecisionGraph, ForwardGraph

    bundle = checked_bundle("custom_cnn")
    model, network = load_model(bundle, precision="fp32"), plain_network(bundle)
    network.head.get_submodule("norm").bias.data[2] = float("inf")
    graph = DecisionGraph(ForwardGraph(network, model.geometry, model.checks), bundle.document, model.checks).eval()
    found = graph(torch.tensor(bundle.golden()["inputs"]))
    assert torch.isnan(found["probabilities"]).all()
    assert torch.isnan(found["maps"]).all()
    assert found["prediction_set"].all()


@pytest.mark.parametrize("format", ["tflite", "ONNX", "", "onnx "])
def test_an_unknown_format_is_refused(format, random_bundle, tmp_path):
    with pytest.raises(ConfigError, match="it must be onnx or openvino"):
        export_model(random_bundle("custom_cnn", side_px=32), tmp_path / "new", format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "broken link"])
def test_what_exists_is_never_overwritten(kind, random_bundle, tmp_path):
    target = tmp_path / "there"
    if kind.endswith("folder"):
        target.mkdir()
    if kind == "folder":
        (target / "mine.txt").write_text("mine")
    if kind == "file":
        target.write_text("mine")
    if kind == "broken link":
        target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="overwrites nothing"):
        export_model(random_bundle("custom_cnn", side_px=32), target, "onnx")
    assert kind != "folder" or (target / "mine.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("format", "package"), [("onnx", "onnxscript"), ("onnx", "onnxruntime"), ("openvino", "openvino")]
)
def test_a_missing_extra_is_named(format, package, random_bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"pip install 'relook\[{format}\]'"):
        export_model(random_bundle("custom_cnn", side_px=32), tmp_path / "new", format)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_computes_something_else_is_not_kept(checked_bundle, tmp_path, monkeypatch):
    run = export_folder._run_onnx
    wrong = {"onnx": lambda folder, images: {k: v + 1 if k == "maps" else v for k, v in run(folder, images).items()}}
    monkeypatch.setattr(export_folder, "_RUNNERS", wrong)
    with pytest.raises(IntegrityError, match="differs from torch: maps by"):
        export_model(checked_bundle("custom_cnn"), tmp_path / "new", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_folder(model_store, checked_bundle, tmp_path: Path, monkeypatch, capsys):
    bundle = checked_bundle("custom_cnn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RELOOK_HOME", str(model_store.home.root))
    words = ["models", "export", str(bundle.path), "--json"]
    code, printed = cli.run(words), json.loads(capsys.readouterr().out)
    assert code == 0, printed
    assert printed["folder"] == f"{bundle.id[:12]}-onnx"
    assert (tmp_path / printed["folder"] / "example.py").is_file()
    assert cli.run(words) == 2
    assert "overwrites nothing" in capsys.readouterr().err
