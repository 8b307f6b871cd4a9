"""`relook doctor`: one check per requirement of a command, each failed one with a fix.

In: `Settings`. Out: a list of `Check`. It starts no server, migrates no database and creates no home; a home or
database that does not exist yet passes.
"""

import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel
from rich.table import Table
from rich.text import Text

from cluster.session import PROBE_TIMEOUT_S, is_listening, require_token_mode
from cluster.settings import Settings
from records.errors import ConfigError, RelookError
from records.home import Home
from records.redaction import without_secrets

GB = 10**9
DISK_FAIL_BYTES, DISK_WARN_BYTES = 1 * GB, 5 * GB
MEMORY_FAIL_BYTES, MEMORY_WARN_BYTES = 2 * GB, 6 * GB


class Check(BaseModel):
    """One requirement and its state."""

    name: str
    state: Literal["ok", "warn", "fail"]
    detail: str
    fix: str | None = None


def examine(settings: Settings) -> list[Check]:
    """Return all checks in the order in which to fix them; an error inside a check is a failed check."""
    checks: list[Check] = []
    for name, look in _CHECKS.items():
        try:
            checks.append(look(settings))
        except RelookError as error:
            checks.append(Check(name=name, state="fail", detail=str(error)))
    return checks


def report(checks: list[Check]) -> Table:
    """Return the checks as a table for people."""
    signs = {"ok": ("ok", "green"), "warn": ("note", "yellow"), "fail": ("FAIL", "red")}
    table = Table.grid(padding=(0, 2))
    for check in checks:
        fix = ("\n", ("fix:", "bold"), f" {check.fix}") if check.fix else ()
        table.add_row(Text(*signs[check.state]), check.name, Text.assemble(check.detail, *fix))
    return table


def _python(settings: Settings) -> Check:
    # pip checks this only when it installs, not when a checkout or an old environment is used with another Python.
    required = importlib.metadata.metadata("relook")["Requires-Python"]
    oldest = tuple(int(part) for part in required.removeprefix(">=").partition(",")[0].split("."))
    detail = f"{platform.python_version()} in {sys.prefix}"
    if sys.version_info[: len(oldest)] < oldest:
        return Check(name="Python", state="fail", detail=f"{detail}; {required} is needed", fix="make setup")
    return Check(name="Python", state="ok", detail=detail)


def _disk(settings: Settings) -> Check:
    folder = _existing_parent(settings.records.home)
    free = shutil.disk_usage(folder).free
    detail = f"{free / GB:.0f} GB free at {folder}"
    if not os.access(folder, os.W_OK):
        fix = "RELOOK_HOME=/a/folder/of/yours"
        return Check(name="disk", state="fail", detail=f"{folder} cannot be written", fix=fix)
    if free < DISK_WARN_BYTES:
        state: Literal["warn", "fail"] = "fail" if free < DISK_FAIL_BYTES else "warn"
        return Check(name="disk", state=state, detail=detail, fix="free some, or RELOOK_HOME=/a/larger/disk")
    return Check(name="disk", state="ok", detail=detail)


def _memory(settings: Settings) -> Check:
    free = psutil.virtual_memory().available
    detail = f"{free / GB:.0f} GB available"
    if free < MEMORY_WARN_BYTES:
        state: Literal["warn", "fail"] = "fail" if free < MEMORY_FAIL_BYTES else "warn"
        return Check(name="memory", state=state, detail=detail, fix="close other programs")
    return Check(name="memory", state="ok", detail=detail)


def _resources(settings: Settings) -> Check:
    """Add up the CPUs of what runs at the same time: the service, and a search or a fit."""
    serving, tuning, cluster = settings.serving, settings.tuning, settings.cluster
    service = serving.needed_cpus
    fit = fit_cpus(settings)
    needed = service + max(float(tuning.cpus_per_trial), fit)
    trials = int((cluster.logical_cpus - service) // tuning.cpus_per_trial)
    if cluster.num_gpus and tuning.gpus_per_trial:
        trials = min(trials, int(cluster.num_gpus // tuning.gpus_per_trial))
    trials = min(trials, tuning.max_concurrent or trials)
    detail = (
        f"{settings.preset}: {serving.cpu_sum} + search or fit {max(float(tuning.cpus_per_trial), fit):g} = "
        f"{needed:g} of {cluster.logical_cpus} CPUs; {max(trials, 0)} trials at once beside the service"
    )
    # The CPUs of a cluster are known to Ray only, and it may add nodes on demand.
    if cluster.ray_address:
        detail = (
            f"decided by the cluster at {cluster.ray_address}; the service may need {serving.cpu_sum} = {service:g}"
        )
        return Check(name="CPUs", state="ok", detail=detail)
    if needed > cluster.logical_cpus or trials < 1:
        fix = f"--set cluster.logical_cpus={int(-(-needed // 1))}, or fewer CPUs for a part"
        return Check(name="CPUs", state="fail", detail=detail, fix=fix)
    return Check(name="CPUs", state="ok", detail=detail)


def _gpus(settings: Settings) -> Check:
    """Add up the GPUs of the replicas of the service; a search or a fit takes what is left."""
    serving, cluster, name = settings.serving, settings.cluster, "GPUs of the service"
    if not serving.needed_gpus:
        return Check(name=name, state="ok", detail="the service uses none")
    total = f"{serving.gpu_sum} = {serving.needed_gpus:g}"
    if cluster.ray_address or cluster.num_gpus is None:
        return Check(name=name, state="ok", detail=f"the service may need {total}; Ray counts what there is")
    detail = f"{settings.preset}: {total} of {cluster.num_gpus:g} GPUs"
    if serving.needed_gpus > cluster.num_gpus:
        fix = "fewer serving.*_max_replicas, or a smaller part of a GPU for each"
        return Check(name=name, state="fail", detail=detail, fix=fix)
    return Check(name=name, state="ok", detail=detail)


def fit_cpus(settings: Settings) -> float:
    """Return the CPUs of a fit: workers times threads per worker."""
    workers = settings.trainers.workers.count
    threads = settings.trainers.workers.threads or max(1, (os.cpu_count() or 1) // workers)
    return float(workers * threads)


def _ray(settings: Settings) -> Check:
    require_token_mode(os.environ)
    found = f"{importlib.metadata.version('ray')}, token authentication"
    address = settings.cluster.ray_address
    if address:
        if not is_listening(address):
            fix = "start the cluster (ray up ray_cluster.yaml), or unset RELOOK_RAY_ADDRESS"
            return Check(name="Ray", state="fail", detail=f"nothing responds at {address}", fix=fix)
        return Check(name="Ray", state="ok", detail=f"{found}, cluster at {address}")
    # Ray keeps its objects in shared memory and falls back to /tmp, which is slow; containers get 64 MB by default.
    shared = Path("/dev/shm")
    if shared.is_dir() and shutil.disk_usage(shared).free < settings.cluster.object_store_mb * 2**20:
        fix = "docker run --shm-size=1g, or a smaller --set cluster.object_store_mb"
        return Check(name="Ray", state="warn", detail=f"{found}; /dev/shm is too small, objects go to disk", fix=fix)
    return Check(name="Ray", state="ok", detail=f"{found}, starts here with each command that needs it")


def _serving_port(settings: Settings) -> Check:
    from serving.client import Client
    from serving.tls import trust_of

    host, port = settings.serving.host, settings.serving.port
    holder = _holder(host, port)
    if holder is None:
        return Check(name="port", state="ok", detail=f"{port} is free for the service")
    # A Relook service on this port is what the user wants; only a program that does not speak its API is in the way.
    try:
        trust = trust_of(settings.serving)
    except ConfigError as error:
        return Check(name="port", state="fail", detail=str(error), fix="see docs/operate.md")
    with Client(settings.serving.url, timeout_s=PROBE_TIMEOUT_S, retry_s=0.0, verify=trust) as client:
        try:
            client.models()
            ready = client.ready()
        except RelookError:
            fix = f"stop it, or --set serving.port={port + 1}"
            return Check(name="port", state="fail", detail=f"{port} is taken by {holder}", fix=fix)
    model = f"with model {ready.model.id[:12]} ({ready.model.status})" if ready.model else "without a model yet"
    return Check(name="port", state="ok", detail=f"{port} is a Relook service {model}")


def _label_studio_port(settings: Settings) -> Check:
    from labeling.local_server import LocalLabelStudio

    labeling = settings.labeling
    name = "Label Studio port"
    if labeling.url is not None or labeling.port == 0:
        return Check(name=name, state="ok", detail="no fixed port is set")
    running = LocalLabelStudio(Home(settings.records.home), labeling).status()
    if running is not None and running.url.endswith(f":{labeling.port}"):
        return Check(name=name, state="ok", detail=f"{labeling.port} is our Label Studio")
    holder = _holder("127.0.0.1", labeling.port)
    if holder is not None:
        fix = f"stop it, or --set labeling.port={labeling.port + 1}"
        return Check(name=name, state="fail", detail=f"{labeling.port} is taken by {holder}", fix=fix)
    return Check(name=name, state="ok", detail=f"{labeling.port} is free")


def _label_studio(settings: Settings) -> Check:
    from labeling.connection import connect
    from labeling.environment import environment_of, is_ready

    name, labeling = "Label Studio", settings.labeling
    if labeling.url is None and not is_ready(environment_of(labeling)):
        return Check(name=name, state="fail", detail="not installed", fix="relook label install")
    quick = labeling.model_copy(update={"request_timeout_s": PROBE_TIMEOUT_S})
    try:
        client = connect(Home(settings.records.home), quick)
        if client is None:
            return Check(name=name, state="ok", detail="installed; not started yet (relook label up)")
        version = client.version()
        client.close()
    except RelookError as error:
        fix = "relook label up" if labeling.url is None else "check RELOOK_LABELING__URL and RELOOK_LABELING__TOKEN"
        return Check(name=name, state="fail", detail=str(error), fix=fix)
    return Check(name=name, state="ok", detail=f"{version} at {client.url}, token accepted")


def check_ledger(settings: Settings) -> Check:
    """Open the ledger and compare its schema with this program's; nothing is migrated."""
    from records.ledger.engine import make_engine
    from records.ledger.migrate import is_newer_and_usable, refuse_newer, schema_versions

    records, name = settings.records, "ledger"
    file = records.home / "ledger.db"
    if records.database is None and not file.is_file():
        return Check(name=name, state="ok", detail=f"{file} is made at first use")
    url = records.database or f"sqlite:///{file}"
    engine = make_engine(url, durability=records.durability, busy_timeout_s=PROBE_TIMEOUT_S)
    try:
        found, wanted = schema_versions(engine)
        is_usable = is_newer_and_usable(engine, found)
    except Exception as error:  # noqa: BLE001 - every driver has its own errors, and each means that the database is out of reach
        fix = "start the database, or unset RELOOK_DATABASE" if records.database else "restore a backup"
        reason = " ".join(str(error).split())[:200]
        return Check(name=name, state="fail", detail=f"{without_secrets(url)} does not open: {reason}", fix=fix)
    finally:
        engine.dispose()
    if is_usable:
        detail = f"{without_secrets(url)} has schema {found}, newer than this program's {wanted} but compatible"
        return Check(name=name, state="warn", detail=detail, fix="install the newer version here, too")
    if found != wanted:
        refuse_newer(found)
        detail = f"{without_secrets(url)} has schema {found or 'none'}; the next command brings it to {wanted}"
        return Check(name=name, state="ok", detail=detail)
    return Check(name=name, state="ok", detail=f"{without_secrets(url)}, schema {found}")


def check_blobs(settings: Settings) -> Check:
    """Write, read and delete a blob."""
    from records.blobs import open_blobs

    records, name = settings.records, "blobs"
    folder = records.home / "blobs"
    if records.blobs is None and not folder.is_dir():
        return Check(name=name, state="ok", detail=f"{folder} is made at first use")
    url = records.blobs or folder.as_uri()
    try:
        store = open_blobs(url)
        # Random bytes: removing them afterwards cannot remove a blob that somebody stored.
        probe = os.urandom(16)
        blob_id = store.put(probe)
        store.get(blob_id)
        store.delete(blob_id)
    except RelookError as error:
        fix = "check the bucket and its credentials" if records.blobs else f"make {folder} writable"
        return Check(name=name, state="fail", detail=str(error), fix=fix)
    return Check(name=name, state="ok", detail=f"{without_secrets(url)}, written and read")


def _gpu(settings: Settings) -> Check:
    if settings.trainers.workers.use_gpu is not True:
        return Check(name="GPU", state="ok", detail="not asked for")
    import torch

    if not torch.cuda.is_available():
        fix = "--set trainers.workers.use_gpu=auto, or a preset for CPUs"
        return Check(name="GPU", state="fail", detail="trainers.workers.use_gpu is true and there is none", fix=fix)
    return Check(name="GPU", state="ok", detail=f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")


def _browser(settings: Settings) -> Check:
    found = shutil.which("chromium") or shutil.which("google-chrome")
    return Check(name="Chromium", state="ok", detail=found or "not here; only the browser tests need it")


_CHECKS: dict[str, Callable[[Settings], Check]] = {
    "Python": _python,
    "disk": _disk,
    "memory": _memory,
    "CPUs": _resources,
    "GPUs of the service": _gpus,
    "GPU": _gpu,
    "Ray": _ray,
    "port": _serving_port,
    "Label Studio port": _label_studio_port,
    "Label Studio": _label_studio,
    "ledger": check_ledger,
    "blobs": check_blobs,
    "Chromium": _browser,
}


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _holder(host: str, port: int) -> str | None:
    """Return the program that listens on a port, None if none does."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As servers do: a port in TIME_WAIT of a service that has just ended counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return None
        except PermissionError:
            return "no program, but this user may not open it"
        except OSError:
            pass
    # Processes of other users have no pid here without root, and then the program stays unnamed.
    for found in psutil.net_connections("tcp"):
        if found.status == psutil.CONN_LISTEN and found.laddr and found.laddr.port == port and found.pid:
            return f"{psutil.Process(found.pid).name()} (process {found.pid})"
    return "another program"
