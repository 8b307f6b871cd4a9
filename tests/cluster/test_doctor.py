"""The checks of a healthy machine, and the fix that each failed check names."""

import shutil
import socket
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.doctor import Check, _holder, examine, fit_cpus
from cluster.presets import PRESETS
from cluster.settings import Settings
from cluster.sources import load_settings
from records.store import open_store
from tests.ports import free_port


def _settings(home: Path, *sets: str, **environ: str) -> Settings:
    return load_settings(sets=[f"records.home={home}", "labeling.port=0", *sets], environ=environ)


def _look(settings: Settings, name: str) -> Check:
    found = [check for check in examine(settings) if check.name == name]
    assert len(found) == 1
    return found[0]


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port that this very process listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_the_checks_create_nothing(tmp_path: Path) -> None:
    checks = examine(_settings(tmp_path / "home", f"serving.port={free_port()}"))
    assert [check.name for check in checks] == [
        "Python",
        "disk",
        "memory",
        "CPUs",
        "GPUs of the service",
        "GPU",
        "Ray",
        "port",
        "Label Studio port",
        "Label Studio",
        "ledger",
        "blobs",
        "Chromium",
    ]
    others = [check for check in checks if check.name != "Label Studio"]
    assert not [check for check in others if check.state == "fail"]
    assert not [check for check in checks if check.state == "fail" and check.fix is None]
    assert not (tmp_path / "home").exists()


def test_a_python_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _look(load_settings(), "Python").state == "ok"
    monkeypatch.setattr("importlib.metadata.metadata", lambda name: {"Requires-Python": ">=99.1,<100"})
    python = _look(load_settings(), "Python")
    assert (python.state, python.fix) == ("fail", "make setup")
    assert ">=99.1" in python.detail


def test_the_laptop_preset_fits_its_cpus() -> None:
    cpus = _look(load_settings(sets=["trainers.workers.threads=2"]), "CPUs")
    assert cpus.state == "ok"
    assert "ingress 0.5 + predictor 1 + explainer 0.5 + search or fit 2 = 4 of 4 CPUs" in cpus.detail


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_fits_the_cpus_it_asks_ray_for(name: str) -> None:
    settings = load_settings(preset=name)
    cores = settings.trainers.workers.threads or 2
    assert _look(load_settings(preset=name, sets=[f"trainers.workers.threads={cores}"]), "CPUs").state == "ok"


def test_replicas_are_part_of_the_sums() -> None:
    sets = ["serving.predictor_max_replicas=3", "serving.predictor_gpus=0.5", "trainers.workers.threads=2"]
    cpus = _look(load_settings(sets=sets), "CPUs")
    assert cpus.state == "fail"
    assert "ingress 0.5 + predictor 3 x 1 + explainer 0.5 + search or fit 2 = 6 of 4 CPUs" in cpus.detail
    gpus = _look(load_settings(sets=[*sets, "cluster.num_gpus=1"]), "GPUs of the service")
    assert (gpus.state, gpus.detail) == ("fail", "laptop: predictor 3 x 0.5 = 1.5 of 1 GPUs")
    assert _look(load_settings(sets=[*sets, "cluster.num_gpus=2"]), "GPUs of the service").state == "ok"
    assert _look(load_settings(), "GPUs of the service").detail == "the service uses none"


def test_too_few_cpus_name_the_number_that_would_do() -> None:
    cpus = _look(load_settings(sets=["cluster.logical_cpus=2", "trainers.workers.threads=2"]), "CPUs")
    assert cpus.state == "fail"
    assert cpus.fix == "--set cluster.logical_cpus=4, or fewer CPUs for a part"


def test_a_fit_takes_threads_times_workers() -> None:
    sets = ["trainers.workers.count=2", "trainers.workers.threads=3", "trainers.batch_size=64"]
    assert fit_cpus(load_settings(sets=sets)) == 6.0


def test_a_taken_port_names_who_holds_it_and_another_one(tmp_path: Path, taken_port: int) -> None:
    port = _look(_settings(tmp_path, f"serving.port={taken_port}"), "port")
    assert port.state == "fail"
    assert f"{taken_port} is taken by" in port.detail
    assert "process" in port.detail
    assert port.fix == f"stop it, or --set serving.port={taken_port + 1}"

    label_studio = _look(_settings(tmp_path, f"labeling.port={taken_port}"), "Label Studio port")
    assert label_studio.state == "fail"
    assert label_studio.fix == f"stop it, or --set labeling.port={taken_port + 1}"


def test_label_studio_that_is_not_installed(tmp_path: Path) -> None:
    check = _look(_settings(tmp_path, f"labeling.environment={tmp_path / 'none'}"), "Label Studio")
    assert (check.state, check.fix) == ("fail", "relook label install")


def test_an_external_label_studio_needs_a_token_and_has_to_respond(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    missing = _look(_settings(tmp_path, f"labeling.url={url}"), "Label Studio")
    assert missing.state == "fail"
    assert "RELOOK_LABELING__TOKEN" in f"{missing.detail} {missing.fix}"

    silent = _look(_settings(tmp_path, f"labeling.url={url}", RELOOK_LABELING__TOKEN="0" * 40), "Label Studio")
    assert silent.state == "fail"
    assert url in silent.detail
    assert silent.fix == "check RELOOK_LABELING__URL and RELOOK_LABELING__TOKEN"


def test_ledger_and_blobs_of_a_home_in_use(tmp_path: Path) -> None:
    settings = _settings(tmp_path / "home")
    open_store(settings.records).close()
    assert "schema" in _look(settings, "ledger").detail
    assert "written and read" in _look(settings, "blobs").detail


def test_a_ledger_that_is_no_database_or_has_a_newer_schema(tmp_path: Path) -> None:
    settings = _settings(tmp_path / "home")
    open_store(settings.records).close()
    file = tmp_path / "home" / "ledger.db"
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'from-the-future'")
    usable = _look(settings, "ledger")
    assert (usable.state, usable.fix) == ("warn", "install the newer version here, too")
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute("UPDATE schema_floor SET oldest = 'from-the-future'")
    newer = _look(settings, "ledger")
    assert newer.state == "fail"
    assert "from-the-future" in newer.detail

    for companion in file.parent.glob("ledger.db-*"):
        companion.unlink()
    file.write_bytes(b"this is no database" * 100)
    broken = _look(settings, "ledger")
    assert broken.state == "fail"
    assert broken.fix == "restore a backup"


def test_blobs_that_cannot_be_written(tmp_path: Path) -> None:
    settings = _settings(tmp_path / "home")
    open_store(settings.records).close()
    # A file where the folder of the first two hash characters would be: nobody can write below it, root neither.
    folder = tmp_path / "home" / "blobs"
    shutil.rmtree(folder)
    folder.mkdir()
    for number in range(256):
        (folder / f"{number:02x}").write_text("")
    check = _look(settings, "blobs")
    assert check.state == "fail"
    assert check.fix == f"make {folder} writable"


def test_little_disk_and_little_memory_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = _settings(tmp_path)
    for name, fix in (("disk", "free some, or RELOOK_HOME=/a/larger/disk"), ("memory", "close other programs")):
        assert _look(settings, name).state == "ok"
        monkeypatch.setattr(f"cluster.doctor.{name.upper()}_WARN_BYTES", 2**62)
        check = _look(settings, name)
        assert (check.state, check.fix) == ("warn", fix)
        monkeypatch.setattr(f"cluster.doctor.{name.upper()}_FAIL_BYTES", 2**62)
        assert _look(settings, name).state == "fail"
    monkeypatch.setattr("cluster.doctor.os.access", lambda path, mode: False)
    check = _look(settings, "disk")
    assert (check.state, check.detail) == ("fail", f"{tmp_path} cannot be written")


def test_gpus_of_the_service_are_compared_with_what_there_is(tmp_path: Path) -> None:
    replica = ("serving.predictor_gpus=0.5",)
    elsewhere = _settings(tmp_path, *replica, f"cluster.ray_address=127.0.0.1:{free_port()}")
    counted = _look(elsewhere, "GPUs of the service")
    assert counted.state == "ok"
    assert counted.detail.endswith("; Ray counts what there is")
    assert _look(_settings(tmp_path, *replica, "cluster.num_gpus=0"), "GPUs of the service").state == "fail"


def test_a_port_of_a_process_that_may_not_be_seen_is_taken_all_the_same(
    taken_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.doctor.psutil.net_connections", lambda kind: [])
    assert _holder("127.0.0.1", taken_port) == "another program"
    assert _holder("127.0.0.1", free_port()) is None


def test_a_cluster_that_responds_and_shared_memory_that_is_too_small(
    tmp_path: Path, taken_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = _look(_settings(tmp_path, f"cluster.ray_address=127.0.0.1:{taken_port}"), "Ray")
    assert cluster.state == "ok"
    assert cluster.detail.endswith(f"cluster at 127.0.0.1:{taken_port}")
    assert _look(_settings(tmp_path, "cluster.ray_address=auto"), "Ray").state == "ok"
    monkeypatch.setattr("cluster.doctor.shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    small = _look(_settings(tmp_path), "Ray")
    assert small.state == "warn"
    assert "objects go to disk" in small.detail


def test_ray_without_authentication_or_that_does_not_respond(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = _look(_settings(tmp_path, f"cluster.ray_address=127.0.0.1:{free_port()}"), "Ray")
    assert cluster.state == "fail"
    assert cluster.fix is not None
    assert "RELOOK_RAY_ADDRESS" in cluster.fix
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    opened = _look(_settings(tmp_path), "Ray")
    assert opened.state == "fail"
    assert "unset it, or set token" in opened.detail


def test_a_required_gpu_has_to_exist(tmp_path: Path) -> None:
    import torch

    check = _look(_settings(tmp_path, "trainers.workers.use_gpu=true"), "GPU")
    assert check.state == ("ok" if torch.cuda.is_available() else "fail")
    assert _look(_settings(tmp_path), "GPU").state == "ok"
