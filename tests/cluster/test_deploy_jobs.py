"""Files that run one command on a cluster of its own: the RayJobs of Kubernetes, and the batch file of Slurm."""

import copy
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import typer
import yaml

from cluster.cli import app

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "cluster" / "deploy" / "kubernetes" / "ray_job"
BATCH = ROOT / "cluster" / "deploy" / "slurm" / "relook.sbatch"


@cache
def _base() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((JOBS / "base" / "ray_job.yaml").read_text())
    return document


def _fields() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "kuberay_job_fields.yaml").read_text())
    of_cluster = yaml.safe_load((Path(__file__).parent / "kuberay_fields.yaml").read_text())
    found["properties"]["spec"]["properties"]["rayClusterSpec"] = of_cluster["properties"]["spec"]
    return found | {"$defs": of_cluster["$defs"]}


def _job(verb: str) -> dict[str, Any]:
    """The base with the overlay of a verb, as kustomize puts them together."""
    job, overlay = copy.deepcopy(_base()), yaml.safe_load((JOBS / verb / "kustomization.yaml").read_text())
    assert overlay["resources"] == ["../base"]
    (patch,) = overlay["patches"]
    assert patch["target"] == {"kind": job["kind"], "name": job["metadata"]["name"]}
    for change in yaml.safe_load(patch["patch"]):
        *way, last = change["path"].strip("/").split("/")
        place = job
        for step in way:
            place = place[step]
        assert (change["op"], last in place) == ("replace", True)
        place[last] = change["value"]
    return job


@pytest.mark.parametrize("verb", ["tune", "train"])
def test_a_ray_job_has_the_fields_that_kuberay_publishes_and_starts_its_verb(verb: str) -> None:
    job, validator = _job(verb), jsonschema.validators.Draft202012Validator
    validator.check_schema(_fields())
    jsonschema.validate(job, _fields(), cls=validator)
    program, name, *arguments = job["spec"]["entrypoint"].split()
    verbs: Any = typer.main.get_command(app)
    assert (program, name, job["metadata"]["name"]) == ("relook", verb, verb)
    verbs.commands[verb].make_context(verb, arguments)
    for wrong, sentence in (({"submissionMode": "Http"}, "Http"), ({"entryPoint": "x"}, "entryPoint")):
        with pytest.raises(jsonschema.ValidationError, match=sentence):
            jsonschema.validate(job | {"spec": job["spec"] | wrong}, _fields(), cls=validator)


def test_its_pods_fit_the_schemas_of_kubernetes_are_closed_and_join_their_own_cluster() -> None:
    spec = _base()["spec"]["rayClusterSpec"]
    assert spec["authOptions"] == {"mode": "token"}
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, "1.31", strict=True)
        (container,) = pod["spec"]["containers"]
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"name": "home", "mountPath": "/data"} in container["volumeMounts"]
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "RELOOK_RAY_ADDRESS", "value": "auto"} in head["env"]


FAKES = {
    "scontrol": 'echo "node1"; echo "node2"; echo "node3"',
    # Options of srun begin with two dashes and hold their value; what follows is the command.
    "srun": 'echo "srun $*" >> "$LOG"; while [ "${1#--}" != "$1" ]; do shift; done; exec "$@"',
    "hostname": 'echo "10.0.0.7 fe80::1"',
    "ray": """
        [ "$1" != health-check ] || { [ -e "$LOG.up" ] && exit "${HEALTH:-0}"; exit 1; }
        [ -s "$RAY_AUTH_TOKEN_PATH" ] || exit 9
        stat -c 'token %a' "$RAY_AUTH_TOKEN_PATH" >> "$LOG"
        touch "$LOG.up"
        exec sleep 600
    """,
    "relook": """
        # The workers' step starts beside the command.
        until [ "$SLURM_JOB_NUM_NODES" = 1 ] || [ "$(grep -c ^token "$LOG")" = 2 ]; do sleep 0.05; done
        echo "relook $* at $RELOOK_RAY_ADDRESS with $RAY_AUTH_MODE" >> "$LOG"
        if [ "$1" = wait ]; then
            trap 'kill %1; echo stopped >> "$LOG"; exit 7' TERM
            sleep 600 &
            echo ready >> "$LOG"
            wait
        fi
        exit "${CODE:-0}"
    """,
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a Slurm job of three nodes, whose programs write what they were asked to."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, script in FAKES.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "home").mkdir()
    return {
        "PATH": f"{programs}:{os.environ['PATH']}", "LOG": str(tmp_path / "log"), "RELOOK_HOME": str(tmp_path / "home"),
        "SLURM_JOB_ID": "20011", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_CPUS_PER_TASK": "8", "SLURM_GPUS_PER_TASK": "a100:2",
    }  # fmt: skip


def _run(environ: dict[str, str], *words: str) -> tuple[int, str, list[str]]:
    done = subprocess.run(["bash", str(BATCH), *words], env=environ, capture_output=True, text=True, timeout=300)
    log = Path(environ["LOG"])
    return done.returncode, done.stderr, log.read_text().splitlines() if log.exists() else []


def test_the_batch_file_starts_head_then_workers_runs_the_command_and_leaves_nothing(slurm: dict[str, str]) -> None:
    code, _, lines = _run({**slurm, "CODE": "3"}, "tune", "--preset", "multi_gpu")
    assert code == 3, "the exit code is the command's"
    head, worker = (next(n for n, line in enumerate(lines) if text in line) for text in (" --head ", " --exclude="))
    assert head < worker
    assert "--nodelist=node1 ray start --head --node-ip-address=10.0.0.7 --port=20011" in lines[head]
    assert "--nodes=2 --ntasks=2 --exclude=node1 ray start --address=10.0.0.7:20011" in lines[worker]
    assert all(line.endswith("--num-cpus=8 --num-gpus=2 --block") for line in (lines[head], lines[worker]))
    assert "relook tune --preset multi_gpu at 10.0.0.7:20011 with token" in lines
    assert "token 600" in lines
    assert list(Path(slurm["RELOOK_HOME"]).iterdir()) == [], "nor the token"
    _, _, alone = _run({**slurm, "SLURM_JOB_NUM_NODES": "1", "LOG": f"{slurm['LOG']}2"}, "train")
    assert not any("--exclude" in line for line in alone)


def test_what_is_missing_is_said_and_a_head_that_does_not_come_up_ends_the_job(slurm: dict[str, str]) -> None:
    assert "give the command to run" in _run(slurm)[1]
    assert "submit it with sbatch" in _run({**slurm, "SLURM_JOB_ID": ""}, "tune")[1]
    assert "RELOOK_HOME has to be a folder" in _run({**slurm, "RELOOK_HOME": "/nowhere"}, "tune")[1]
    code, said, lines = _run({**slurm, "HEALTH": "1", "RAY_HEAD_TRIES": "1"}, "tune")
    assert (code, "does not respond at 10.0.0.7:20011" in said) == (2, True)
    assert not any(line.startswith("relook") for line in lines)
    assert list(Path(slurm["RELOOK_HOME"]).iterdir()) == []


def test_the_signal_before_the_end_of_the_job_reaches_the_command(slurm: dict[str, str]) -> None:
    running = subprocess.Popen(["bash", str(BATCH), "wait"], env=slurm)
    log = Path(slurm["LOG"])
    for _ in range(6000):
        if log.exists() and "ready" in log.read_text():
            break
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(0.05)
    running.terminate()
    assert running.wait(300) == 7
    assert log.read_text().splitlines()[-1] == "stopped"


def test_the_shell_and_its_checker_take_the_batch_file() -> None:
    assert subprocess.run(["bash", "-n", str(BATCH)], check=False).returncode == 0
    wanted = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.+)$", BATCH.read_text(), re.MULTILINE))
    assert wanted["ntasks-per-node"] == "1", "one Ray node on each"
    assert wanted["signal"].startswith("B:TERM@")
    checker = shutil.which("shellcheck")
    assert checker is None or subprocess.run([checker, str(BATCH)], check=False).returncode == 0
