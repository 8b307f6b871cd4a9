"""TLS between nodes, as docs/operate.md sets it up: nodes and drivers with certificates meet, one without stays out."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CLUSTER = """
import os, sys
import ray
from ray.cluster_utils import Cluster

common = {"node_ip_address": "127.0.0.1", "temp_dir": sys.argv[1], "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **common})
cluster.add_node(num_cpus=1, **{name: value for name, value in common.items() if name != "include_dashboard"})
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.shutdown()
"""

DRIVER = """
import sys
from cluster.presets import PRESETS
from cluster.session import start_ray

settings = PRESETS["laptop"]()
settings = settings.model_copy(update={"cluster": settings.cluster.model_copy(update={"ray_address": sys.argv[1]})})
with start_ray(settings):
    import ray

    print(ray.get(ray.remote(num_cpus=1)(lambda: 6 * 7).remote(), timeout=90))
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, since sockets lie under it."""
    with tempfile.TemporaryDirectory(prefix="rt", ignore_cleanup_errors=True) as path:
        yield Path(path)


def documented_commands() -> str:
    """The commands of the page that make an authority and a node's certificate."""
    text = (ROOT / "docs" / "operate.md").read_text()
    (block,) = [part.split("```")[0] for part in text.split("```sh\n")[1:] if part.startswith("openssl req -x509")]
    return block


def environment(folder: Path, **more: str) -> dict[str, str]:
    token = folder / "token"
    token.write_text("0123456789abcdef" * 4)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
    return kept | own | {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "PYTHONPATH": str(ROOT)} | more


def drive(address: str, folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    # In a folder of its own: Ray uploads the folder of the program.
    command = [sys.executable, "-c", DRIVER, address]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=180, check=False)


@pytest.mark.soak
def test_nodes_meet_over_tls_and_a_driver_without_a_certificate_stays_out(folder: Path) -> None:
    made = ["sh", "-euc", documented_commands().replace("NODE.ADDRESS", "127.0.0.1")]
    subprocess.run(made, cwd=folder, check=True, capture_output=True)
    files = {"SERVER_CERT": "node.crt", "SERVER_KEY": "node.key", "CA_CERT": "ca.crt"}
    paths = {f"RAY_TLS_{name}": str(folder / file) for name, file in files.items()}
    secured = environment(folder, RAY_USE_TLS="1", **paths)
    command = [sys.executable, "-c", CLUSTER, str(folder / "r")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=folder, env=secured, stdin=pipe, stdout=pipe, text=True) as cluster:
        assert cluster.stdout is not None
        address = cluster.stdout.readline().strip()
        try:
            with_certificate = drive(address, folder, secured)
            without = drive(address, folder, environment(folder))
        finally:
            cluster.communicate("\n", timeout=60)
    assert with_certificate.stdout.strip() == "42", with_certificate.stderr[-2000:]
    assert without.returncode != 0
    assert "42" not in without.stdout
