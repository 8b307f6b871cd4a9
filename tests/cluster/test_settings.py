"""Where settings come from, which one wins, and what is said when one cannot be used."""

from operator import attrgetter
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from cluster.presets import PRESETS
from cluster.settings import Settings, public_dump, settings_hash
from cluster.sources import SHORT_NAMES, load_settings
from records.errors import ConfigError
from records.redaction import MASK, without_secrets
from records.settings import RoomSettings


def _file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return path


def test_each_source_beats_the_one_before_it(tmp_path: Path) -> None:
    config = _file(tmp_path, "preset: dissertation\ntrainers: {epochs: 2, batch_size: 32, seed: 1}\n")
    environ = {"RELOOK_TRAINERS__EPOCHS": "3", "RELOOK_TRAINERS__SEED": "2", "HOME": "/home/someone"}
    settings = load_settings(config, None, ["trainers.seed=3", "trainers.seed=4"], environ)
    trainers = settings.trainers
    assert settings.preset == "dissertation"
    assert trainers.model.side_px == 224  # preset
    assert trainers.batch_size == 32  # file over preset
    assert trainers.epochs == 3  # environment over file
    assert trainers.seed == 4  # the last --set over all


@pytest.mark.parametrize(
    ("preset", "environ", "document", "expected"),
    [
        (None, {}, "", "laptop"),
        (None, {}, "preset: clinical", "clinical"),
        (None, {"RELOOK_PRESET": "single_gpu"}, "preset: clinical", "single_gpu"),
        ("multi_gpu", {"RELOOK_PRESET": "single_gpu"}, "preset: clinical", "multi_gpu"),
    ],
)
def test_the_preset_named_nearest_to_the_command_is_taken(
    tmp_path: Path, preset: str | None, environ: dict[str, str], document: str, expected: str
) -> None:
    assert load_settings(_file(tmp_path, document), preset, (), environ).preset == expected


def test_every_preset_is_whole_distinct_and_survives_the_loader() -> None:
    assert set(PRESETS) == {
        "laptop",
        "demo",
        "single_gpu",
        "multi_gpu",
        "clinical",
        "dissertation",
        "dissertation_mini",
        "dissertation_leaky",
        "ham10000_cpu",
        "ham10000_gpu",
        "ham10000_vit",
    }
    hashes = set()
    for name, make in PRESETS.items():
        settings = load_settings(preset=name)
        assert settings.preset == name == make().preset
        hashes.add(settings_hash(settings))
    assert len(hashes) == len(PRESETS)


def test_clinical_is_strict() -> None:
    clinical = load_settings(preset="clinical")
    assert clinical.round.approval == "person"
    assert clinical.serving.default_consent == "none"
    assert clinical.serving.audit_share > 0
    with pytest.raises(ConfigError, match=r"serving\.audit_share may not be 0 with preset clinical"):
        load_settings(preset="clinical", sets=["serving.audit_share=0"])


def test_home_is_made_absolute_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_settings().records.home == tmp_path / ".relook"
    assert load_settings(environ={"RELOOK_HOME": "kept/here"}).records.home == tmp_path / "kept/here"
    assert load_settings(environ={"RELOOK_HOME": "~/kept"}).records.home == Path("~/kept").expanduser()


def test_the_process_environment_is_read_only_if_it_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELOOK_TRAINERS__EPOCHS", "77")
    assert load_settings().trainers.epochs != 77


@pytest.mark.parametrize("variable", SHORT_NAMES)
def test_each_short_name_reaches_its_field(variable: str, tmp_path: Path) -> None:
    room, field = SHORT_NAMES[variable].split(".")
    settings = load_settings(environ={variable: str(tmp_path)})
    assert str(getattr(getattr(settings, room), field)) == str(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("trainers.early_stop_patience_epochs=null", None),
        ("trainers.workers.use_gpu=true", True),
        ("trainers.workers.use_gpu=auto", "auto"),
        ("trainers.optimizer.weight_decay=1e-3", 1e-3),
        ("tuning.search=[optimizer, scheduler]", ("optimizer", "scheduler")),
        ("serving.default_consent=none", "none"),
    ],
)
def test_text_becomes_the_type_of_its_field(text: str, expected: object) -> None:
    assert attrgetter(text.partition("=")[0])(load_settings(sets=[text])) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "trainers.epochs=many",
            r"trainers\.epochs = 'many' \(from --set\) .*valid integer.*; a valid value is \d+ \(",
        ),
        ("trainers.epochs=0", r"trainers\.epochs = '0' \(from --set\) .*greater than or equal to 1; a valid value is"),
        ("trainers.epoch=3", r"no setting trainers\.epoch \(from --set\); did you mean trainers\.epochs\?"),
        ("trainer.epochs=3", r"no setting trainer\.epochs \(from --set\); did you mean trainers\?"),
        (
            "xyzzy.epochs=3",
            r"no setting xyzzy\.epochs \(from --set\); the rooms are records, images, trainers, tuning, serving",
        ),
        ("gate.xyzzy=3", r"no setting gate\.xyzzy \(from --set\); gate has margin, "),
        (
            "trainers.momentum=0.5",
            r"no setting trainers\.momentum \(from --set\); did you mean trainers\.optimizer\.momentum\?",
        ),
        (
            "trainers.optimizer.momentun=0.5",
            r"no setting trainers\.optimizer\.momentun \(from --set\); did you mean trainers\.optimizer\.momentum\?",
        ),
        ("trainers.optimizer=adam", r"holds fields, not a value; give them by name, such as trainers\.optimizer\.name"),
        (
            "trainers.optimizer.momentum=2",
            r"trainers\.optimizer\.momentum = '2' \(from --set\) .*less than 1; a valid value is 0\.9 \(of sgd\)",
        ),
        ("trainers.model.side_px=16", r"trainers\.model: trainers\.model\.side_px is 16, and custom_cnn needs"),
        ("trainers.model.crop=padded", r"trainers\.model\.crop = 'padded' .*it should be 'center' or 'whole'"),
        ("trainers.epochs.x=3", r"no setting trainers\.epochs\.x \(from --set\); trainers\.epochs is a value"),
        ("trainers.optimizer.name=adm", r"unknown optimizer 'adm'; there are .*sgd.*; a valid value is 'sgd'"),
        ("trainers.workers.use_gpu=perhaps", r"it should be 'auto' or it should be a valid boolean"),
        ("round.tune=sometimes", r"it should be 'always', 'every_n', 'on_drop' or 'never'; a valid value is 'always'"),
        ("tuning.search=[optimzer]", r"it should be 'optimizer', .* or 'sampler'; a valid value is \["),
        ("epochs=3", r"--set 'epochs=3' must read room\.field=value, for example --set trainers\.epochs=5"),
        ("trainers.epochs", r"--set 'trainers\.epochs' must read room\.field=value"),
    ],
)
def test_a_wrong_setting_is_one_sentence_with_field_value_source_and_a_valid_one(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_settings(sets=[text])
    assert "\n" not in str(caught.value)


def test_fields_that_do_not_fit_together_name_the_room() -> None:
    with pytest.raises(ConfigError, match=r"trainers: batch_size 63 cannot be shared evenly by 2 workers"):
        load_settings(sets=["trainers.batch_size=63", "trainers.workers.count=2"])


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(ConfigError, match=r"\(from RELOOK_TRAINERS__EPOCHES\); did you mean trainers\.epochs\?"):
        load_settings(environ={"RELOOK_TRAINERS__EPOCHES": "3"})
    with pytest.raises(ConfigError, match=r"RELOOK_DATABSE means nothing; did you mean RELOOK_DATABASE\?"):
        load_settings(environ={"RELOOK_DATABSE": "sqlite:///x"})
    assert load_settings(environ={"RELOOK_TEST_DATA": "anything"}) == load_settings()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("trainers: 5", "holds fields, not a value"),
        ("- 1", "must read `room: "),
        ("trainers: {epochs: [1", "is not YAML"),
        ("preset: 7", "no preset 7; there are laptop"),
        ("preset: labtop", "no preset 'labtop'; there are laptop"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_settings(_file(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read \(No such file"):
        load_settings(tmp_path / "nowhere.yaml")


def test_secrets_come_from_the_environment_only_and_are_never_shown(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"labeling\.token is a secret.*from --set; set RELOOK_LABELING__TOKEN"
    ) as caught:
        load_settings(sets=["labeling.token=hush"])
    assert "hush" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"labeling\.token is a secret"):
        load_settings(_file(tmp_path, "labeling: {token: hush}"))
    url = "postgresql+psycopg://relook:hush@db.example/relook"
    with pytest.raises(ConfigError, match=r"records\.database is a secret.*set RELOOK_DATABASE") as caught:
        load_settings(sets=[f"records.database={url}"])
    assert "hush" not in str(caught.value)

    settings = load_settings(environ={"RELOOK_LABELING__TOKEN": "hush", "RELOOK_DATABASE": url})
    assert settings.labeling.token == SecretStr("hush")
    assert settings.records.database == url
    dumped = public_dump(settings)
    assert dumped["records"]["database"] == f"postgresql+psycopg://relook:{MASK}@db.example/relook"
    assert "hush" not in repr(settings) + str(dumped)


def test_the_hash_knows_what_decides_a_result_and_nothing_else(tmp_path: Path) -> None:
    plain = settings_hash(load_settings())
    elsewhere = {
        "RELOOK_HOME": str(tmp_path),
        "RELOOK_DATABASE": "sqlite:////tmp/other.db",
        "RELOOK_BLOBS": "s3://bucket/blobs",
        "RELOOK_RAY_ADDRESS": "10.0.0.1:6379",
        "RELOOK_LABELING__TOKEN": "another",
    }
    assert settings_hash(load_settings(environ=elsewhere)) == plain
    assert settings_hash(load_settings(sets=["trainers.seed=9"])) != plain
    assert settings_hash(load_settings(sets=["gate.margin=0.01"])) != plain


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:p@h/d", f"postgresql://u:{MASK}@h/d"),
        ("postgresql://u@h/d", "postgresql://u@h/d"),
        ("sqlite:////a/b@c:d.db", "sqlite:////a/b@c:d.db"),
        ("plain:text@here", "plain:text@here"),
    ],
)
def test_passwords_in_urls_are_masked(url: str, shown: str) -> None:
    assert without_secrets(url) == shown


def test_every_field_of_every_room_says_what_it_means() -> None:
    rooms = [field.annotation for name, field in Settings.model_fields.items() if name != "preset"]
    assert len(rooms) == 11
    while rooms:
        room = rooms.pop()
        assert isinstance(room, type)
        assert issubclass(room, RoomSettings)
        silent = [name for name, field in room.model_fields.items() if not field.description]
        assert not silent, f"{room.__name__}: {silent}"
        inner = [field.annotation for field in room.model_fields.values()]
        rooms += [part for part in inner if isinstance(part, type) and issubclass(part, RoomSettings)]


def test_parts_of_a_room_come_from_every_source(tmp_path: Path) -> None:
    config = _file(tmp_path, "trainers:\n  optimizer: {name: adam, weight_decay: 0.1}\n  model: {side_px: 96}\n")
    environ = {"RELOOK_TRAINERS__OPTIMIZER__WEIGHT_DECAY": "0.2", "RELOOK_TRAINERS__LOSS__NAME": "focal"}
    trainers = load_settings(config, "dissertation", ["trainers.optimizer.clip_norm=1"], environ).trainers
    assert trainers.scheduler.name == "step"  # preset
    assert (trainers.optimizer.name, trainers.model.side_px) == ("adam", 96)  # file
    assert (trainers.optimizer.weight_decay, trainers.loss.name) == (0.2, "focal")  # environment over file
    assert trainers.optimizer.clip_norm == 1  # --set
    assert trainers.optimizer.nesterov is False  # still the preset's: a source changes only the fields that it names


def test_settings_are_frozen_and_closed() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError):
        settings.trainers.epochs = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Settings.model_validate({"nonsense": 1})
