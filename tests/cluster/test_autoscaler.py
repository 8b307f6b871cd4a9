"""Ray's autoscaler with the node types of `ray_cluster.yaml`: a GPU task starts a node, and an idle node is stopped.

The cloud is Ray's fake provider, which starts each node as a raylet on this machine. Processes are stopped by id, never
by name, since other Ray sessions may be running.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
DRIVER = """
    import json, sys, time
    from pathlib import Path

    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    def kinds():
        status = get_cluster_status(sys.argv[1])
        return sorted(node.ray_node_type_name for node in [*status.active_nodes, *status.idle_nodes])

    def until(wanted, timeout_s=600):
        end = time.monotonic() + timeout_s
        while (seen := kinds()) != wanted and time.monotonic() < end:
            time.sleep(0.2)
        return seen

    @ray.remote(num_gpus=1)
    def gpus():
        return ray.get_runtime_context().get_assigned_resources()["GPU"]

    ray.init(address=sys.argv[1], logging_level="ERROR")
    before = until(["ray.head.default"])
    found = {"before": before, "gpus": ray.get(gpus.remote()), "during": kinds(), "after": until(before)}
    Path(sys.argv[2]).write_text(json.dumps(found))
"""


def _fake_cloud(address: str) -> dict[str, Any]:
    """`ray_cluster.yaml`, with this machine in place of AWS."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    kinds = {name: {**kind, "node_config": {}} for name, kind in config["available_node_types"].items()}
    kinds[FAKE_HEAD_NODE_TYPE] = {**kinds.pop(config["head_node_type"]), "max_workers": 0}
    # As an external provider: the defaults of `fake_multinode` are a file that Ray's wheel leaves out.
    module = f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}"
    provider = {"type": "external", "module": module, "gcs_address": address, "head_node_id": FAKE_HEAD_NODE_ID}
    return {
        **{name: {} for name in ("auth", "file_mounts")},
        **{name: [] for name in ("setup_commands", "head_setup_commands", "worker_setup_commands")},
        **{name: [] for name in ("initialization_commands", "cluster_synced_files")},
        **{name: config[name] for name in ("cluster_name", "max_workers", "upscaling_speed")},
        **{name: config[name] for name in ("head_start_ray_commands", "worker_start_ray_commands")},
        "available_node_types": kinds,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "provider": {**provider, "launch_multiple": True, "disable_node_updaters": True},
        "idle_timeout_minutes": 0.05,
    }


@pytest.fixture
def environment() -> dict[str, str]:
    return {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",  # as `ray up` sets it
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": FAKE_HEAD_NODE_TYPE,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
    }


@pytest.fixture
def head(tmp_path: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address of a head with the autoscaler; every process below it is gone afterwards."""
    address = f"127.0.0.1:{free_port()}"
    config = tmp_path / "cluster.yaml"
    config.write_text(yaml.safe_dump(_fake_cloud(address)))
    folder = tempfile.mkdtemp(prefix="relook-", dir="/tmp")  # sockets need a short path
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += [f"--port={address.rpartition(':')[2]}", "--node-ip-address=127.0.0.1", f"--temp-dir={folder}"]
    command += ["--num-cpus=8", "--include-dashboard=false", f"--autoscaling-config={config}"]
    with (tmp_path / "head.log").open("w") as log:
        process = psutil.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)
    try:
        yield address
    finally:
        started = [*process.children(recursive=True), process]
        for one in started:
            one.kill()
        psutil.wait_procs(started, timeout=10)
        shutil.rmtree(folder)


def healthy(address: str, environment: dict[str, str]) -> bool:
    """Check a head as the containers' health checks do."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    return subprocess.run(command, env=environment, capture_output=True, timeout=600, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.soak
def test_a_gpu_task_starts_a_spot_node_and_an_idle_node_is_stopped(
    head: str, environment: dict[str, str], tmp_path: Path
) -> None:
    port = int(head.rpartition(":")[2])
    end = time.monotonic() + 600
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    # The health check of Compose and of KubeRay's waiting container; it needs the token.
    assert healthy(head, environment)
    assert not healthy(head, {**environment, "RAY_AUTH_TOKEN": "another token"})
    script = tmp_path / "driver.py"
    script.write_text(textwrap.dedent(DRIVER))
    done = subprocess.run(
        [sys.executable, str(script), head, str(tmp_path / "found.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:] + (tmp_path / "head.log").read_text()[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["gpus"] == 1
    assert found["before"] == found["after"] == [FAKE_HEAD_NODE_TYPE]
    assert found["during"] == ["gpu_spot", FAKE_HEAD_NODE_TYPE]
