"""`relook doctor --cluster`: what it says about nodes that lack something, and about a real one."""

from pathlib import Path
from typing import Any

import pytest

from cluster.doctor import Check
from cluster.doctor_nodes import Node, Placed, examine_cluster, judge, look
from cluster.session import RaySession
from cluster.settings import Settings
from cluster.sources import load_settings
from tests.ports import free_port

GB = 10**9


@pytest.fixture
def shared(tmp_path: Path) -> Settings:
    """Settings whose ledger and blobs every node reaches."""
    sets = [f"records.home={tmp_path}", "records.database=postgresql+psycopg://db/relook", "records.blobs=s3://b/blobs"]
    return load_settings(sets=sets, environ={})


def _good(**changes: Any) -> Node:
    made = Node(
        versions={"python": "3.11.7", "ray": "2.60.0"},
        gpus=0,
        disk_free=50 * GB,
        clock=105.0,
        sees_home=True,
        checks=[],
    )
    return made.model_copy(update=changes)


def _placed(found: Node | None, **changes: Any) -> Placed:
    return Placed(name="n1", cpus=8, gpus=0, asked_at=100.0, returned_at=110.0, found=found).model_copy(update=changes)


def test_each_thing_that_a_node_lacks_is_named(shared: Settings) -> None:
    unreachable = Check(name="ledger", state="fail", detail="db does not open: no route to host")
    old = {"python": "3.11.7", "ray": "2.59.0"}
    cases = [
        (_placed(_good()), "ok", "8 CPUs, 0 GPUs, 50 GB free, sees RELOOK_HOME"),
        (_placed(_good(sees_home=False)), "ok", "has a RELOOK_HOME of its own"),
        (_placed(_good(versions=old)), "fail", "ray 2.59.0, here 2.60.0"),
        (_placed(_good(checks=[unreachable])), "fail", "ledger: db does not open: no route to host"),
        (_placed(_good(), gpus=4), "fail", "Ray counts 4 GPUs there, and PyTorch finds none"),
        (_placed(_good(disk_free=GB // 2)), "fail", "0 GB of disk free"),
        (_placed(_good(disk_free=3 * GB)), "warn", "3 GB of disk free"),
        (_placed(_good(clock=170.0)), "warn", "its clock differs by +60 s"),
        (_placed(_good(clock=40.0)), "warn", "its clock differs by -60 s"),
        (_placed(None, error="did not respond within 120 s"), "fail", "did not respond within 120 s"),
    ]
    whole, *checks = judge([placed for placed, _, _ in cases], _good(), shared)
    assert (whole.state, whole.detail[:17]) == ("ok", "10 nodes, 80 CPUs")
    assert [check.name for check in checks[:2]] == ["node n1 (1)", "node n1 (2)"], "of one machine, too"
    for check, (_, state, text) in zip(checks, cases, strict=True):
        assert (check.state, text in check.detail) == (state, True), check
        assert (check.fix is None) == (state == "ok")


def test_files_in_the_home_need_one_home_and_the_service_its_cpus(shared: Settings, tmp_path: Path) -> None:
    local = load_settings(sets=[f"records.home={tmp_path}", "serving.predictor_max_replicas=8"], environ={})
    whole, check = judge([_placed(_good(sees_home=False), cpus=1)], _good(), local)
    assert check.state == "fail"
    assert "RELOOK_HOME is another folder there, and ledger or blobs are in it" in check.detail
    assert (whole.state, "more nodes" in (whole.fix or "")) == ("warn", True)


def test_a_look_tells_whether_the_home_is_the_drivers(tmp_path: Path) -> None:
    local = load_settings(sets=[f"records.home={tmp_path}"], environ={})
    mark = tmp_path / "mark"
    mark.write_text("abc")
    assert look(local, (str(mark), "abc")).sees_home
    assert not look(local, (str(mark), "another")).sees_home
    assert not look(local, (str(tmp_path / "missing"), "abc")).sees_home
    assert [check.state for check in look(local, None).checks] == ["ok", "ok"]


def test_a_cluster_that_does_not_respond_is_a_failed_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The Ray of the other tests may run in this process.
    for module in ("cluster.session", "cluster.doctor_nodes"):
        monkeypatch.setattr(f"{module}.ray_is_running", lambda: False)
    gone = load_settings(sets=[f"records.home={tmp_path}", f"cluster.ray_address=127.0.0.1:{free_port()}"], environ={})
    (check,) = examine_cluster(gone)
    assert check.state == "fail"
    assert "no Ray responds at 127.0.0.1" in check.detail


def test_a_real_node_is_looked_at_from_there(ray_session: RaySession, ray_settings: Settings) -> None:
    whole, node = examine_cluster(ray_settings)
    assert whole.detail.startswith("1 node, 4 CPUs")
    assert node.state in ("ok", "warn"), node
    assert "CPUs" in node.detail or "disk" in node.detail
    assert not list(ray_settings.records.home.glob(".doctor-*"))
