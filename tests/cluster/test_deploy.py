"""Deploy files: each fits the published schema of its engine, and names verbs, settings and files that exist.

No engine is started. `make check` runs this file, too.
"""

import copy
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import cfnlint
import jsonschema
import kubernetes_validate
import pytest
import typer.main
import yaml
from compose_spec import PyOptions
from packaging.requirements import Requirement
from typer._click.exceptions import NoSuchOption

from cluster.cli import app
from cluster.sources import load_settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "cluster" / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
KUBERNETES_VERSIONS = ("1.31", "1.37")
COMPOSE_VARIABLE = re.compile(r"\$\{(\w+):([-?])([^}]*)\}")
OF_RELOOK = "relook"

Change = Callable[[dict[str, Any]], object]


@cache
def _locked(name: str) -> str:
    words = (ROOT / "requirements.lock").read_text().split()
    pins = dict(word.split("==") for word in words if "==" in word)
    return pins[name]


def _compose_text() -> str:
    text = (DEPLOY / "compose.yaml").read_text()
    return COMPOSE_VARIABLE.sub(lambda found: found[3] if found[2] == "-" else "a-secret", text)


@cache
def _compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(_compose_text())
    return document


@cache
def _documents() -> list[dict[str, Any]]:
    """Every object of the kustomization."""
    names = _kustomization()["resources"]
    return [document for name in names for document in yaml.safe_load_all((KUBERNETES / name).read_text())]


@cache
def _kustomization() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())
    return document


def _ray_cluster() -> dict[str, Any]:
    (found,) = (copy.deepcopy(document) for document in _documents() if document["kind"] == "RayCluster")
    return found


def _pods_of_ray(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pods that the operator creates for a RayCluster, and one with the autoscaler container that it adds."""
    spec = cluster["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield _pod(group["template"]["spec"])
    of_container = ("resources", "securityContext", "env", "envFrom", "volumeMounts")
    options = {key: value for key, value in spec["autoscalerOptions"].items() if key in of_container}
    yield _pod({"containers": [{"name": "autoscaler", "image": OF_RELOOK, **options}]})


def _pod(spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": spec}


def _pod_specs() -> dict[str, dict[str, Any]]:
    found = {
        document["metadata"]["name"]: document["spec"]["template"]["spec"]
        for document in _documents()
        if document["kind"] in ("Deployment", "StatefulSet")
    }
    spec = _ray_cluster()["spec"]
    found["ray head"] = spec["headGroupSpec"]["template"]["spec"]
    return found | {f"ray {group['groupName']}": group["template"]["spec"] for group in spec["workerGroupSpecs"]}


def _stack() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((DEPLOY / "ecs" / "relook.json").read_text())
    return document


def _task_containers() -> list[dict[str, Any]]:
    tasks = [entry for entry in _stack()["Resources"].values() if entry["Type"] == "AWS::ECS::TaskDefinition"]
    return [container for task in tasks for container in task["Properties"]["ContainerDefinitions"]]


def _commands() -> list[list[str]]:
    """Every `relook` command line that a deploy file starts."""
    lines = [service["command"] for service in _compose()["services"].values() if service.get("image") == OF_RELOOK]
    lines += [
        container["args"] for spec in _pod_specs().values() for container in spec["containers"] if "args" in container
    ]
    lines += [container["Command"] for container in _task_containers()]
    texts = [(DEPLOY / "compose.yaml").read_text(), (KUBERNETES / "service.yaml").read_text()]
    lines += [found.split() for text in texts for found in re.findall(r"exec relook ([^\"\n]*)", text)]
    return [line for line in lines if line]


def _no_database(compose: dict[str, Any]) -> None:
    compose["services"]["service"]["depends_on"]["database"] = {"condition": "healthy"}


# ---------------------------------------------------------------- compose


def test_the_compose_file_is_valid() -> None:
    parsed = PyOptions(apply_merge=True).from_yaml(_compose_text())
    parsed.validate()
    assert set(parsed.to_spec().services or {}) == set(_compose()["services"])
    assert set(_compose()["services"]) == {
        *("head", "worker", "service", "watcher", "sync", "database", "objects", "bucket", "label-studio"),
        *("prometheus", "grafana"),
    }


@pytest.mark.parametrize(
    "spoil",
    [
        lambda compose: compose["services"]["service"].update(prots=["8000:8000"]),
        lambda compose: compose["services"]["service"].update(ports=["8000:eight"]),
        lambda compose: compose["services"]["database"]["healthcheck"].update(interval="5 parsecs"),
        _no_database,
    ],
)
def test_a_spoilt_compose_file_is_refused(spoil: Change) -> None:
    compose = copy.deepcopy(_compose())
    spoil(compose)
    with pytest.raises(ValueError, match=r"prots|eight|parsecs|healthy"):
        PyOptions(apply_merge=True).from_yaml(yaml.safe_dump(compose)).validate()


def test_references_of_compose_services_exist() -> None:
    compose = _compose()
    for name, service in compose["services"].items():
        others = service.get("depends_on", [])
        assert set(others) <= set(compose["services"]), name
        awaited = [o for o in others if isinstance(others, dict) and others[o]["condition"] == "service_healthy"]
        assert all("test" in compose["services"][other]["healthcheck"] for other in awaited), name
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith("./") else source in compose["volumes"]
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), "published on this machine only"
    example = (DEPLOY / "compose.env.example").read_text()
    asked = {name for name, kind, _ in COMPOSE_VARIABLE.findall((DEPLOY / "compose.yaml").read_text()) if kind == "?"}
    asked |= {secret["environment"] for secret in compose["secrets"].values()}
    assert asked == set(re.findall(r"^(\w+)=", example, re.MULTILINE))


def test_prometheus_has_the_key_that_the_service_asks_for() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"]
    compose = _compose()
    (name,) = compose["services"]["prometheus"]["secrets"]
    assert job["authorization"] == {"type": "Bearer", "credentials_file": f"/run/secrets/{name}"}
    assert name in compose["secrets"]


def test_a_driver_of_compose_has_a_node_of_the_cluster_beside_it_or_a_ray_of_its_own() -> None:
    # Ray's driver looks for a node among the processes of its own container, and finds none over an address alone.
    services = _compose()["services"]
    assert "ray start --address=head:6379" in " ".join(services["watcher"]["entrypoint"])
    assert load_settings(environ=services["service"]["environment"]).cluster.ray_address in ("", None)


# ---------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_the_kubernetes_files_fit_its_schemas(version: str) -> None:
    checked = [document for document in _documents() if document["kind"] != "RayCluster"]
    for document in [*checked, *_pods_of_ray(_ray_cluster())]:
        kubernetes_validate.validate(document, version, strict=True)
    assert len(checked) == len(_documents()) - 1 == 14


def test_a_spoilt_kubernetes_file_is_refused() -> None:
    cluster = _ray_cluster()
    cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMonts"] = []
    head, *_ = _pods_of_ray(cluster)
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMonts"):
        kubernetes_validate.validate(head, KUBERNETES_VERSIONS[0], strict=True)


def test_the_ray_cluster_has_the_fields_that_kuberay_publishes() -> None:
    fields = yaml.safe_load((Path(__file__).parent / "kuberay_fields.yaml").read_text())
    jsonschema.validators.Draft202012Validator.check_schema(fields)
    jsonschema.validate(_ray_cluster(), fields, cls=jsonschema.validators.Draft202012Validator)
    spoilt = _ray_cluster()
    spoilt["spec"]["workerGroupSpecs"][0]["maxReplica"] = 4
    with pytest.raises(jsonschema.ValidationError, match="maxReplica"):
        jsonschema.validate(spoilt, fields, cls=jsonschema.validators.Draft202012Validator)


def test_rays_autoscaler_reads_the_ray_cluster() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    cluster = _ray_cluster()
    cluster["metadata"]["namespace"] = _kustomization()["namespace"]
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    kinds = config["available_node_types"]
    assert kinds["gpu"]["resources"] == {"CPU": 8, "memory": 32 * 2**30, "GPU": 1}
    assert (kinds["gpu"]["min_workers"], kinds["gpu"]["max_workers"]) == (0, 4)
    assert kinds["headgroup"]["resources"]["CPU"] == 0
    assert config["idle_timeout_minutes"] == 10
    assert cluster["spec"]["rayVersion"] == _locked("ray")


def test_only_the_autoscaler_may_talk_to_kubernetes() -> None:
    mounted = {name: spec.get("automountServiceAccountToken", True) for name, spec in _pod_specs().items()}
    assert {name for name, value in mounted.items() if value} == {"ray head"}


def test_containers_that_the_operator_adds_get_rays_token() -> None:
    # It copies `env`, not `envFrom`, into the container that waits for the head; the autoscaler has options of its own.
    spec = _ray_cluster()["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    given = [spec["autoscalerOptions"]["env"]]
    given += [group["template"]["spec"]["containers"][0]["env"] for group in groups]
    for env in given:
        assert {entry["name"] for entry in env} == {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
        assert next(entry["value"] for entry in env if entry["name"] == "RAY_AUTH_MODE") == "token"


def test_pods_run_without_root_and_without_rights() -> None:
    for name, spec in _pod_specs().items():
        assert spec["securityContext"]["runAsNonRoot"], name
        for container in spec["containers"]:
            rights = container["securityContext"]
            assert not rights["allowPrivilegeEscalation"], name
            assert rights["capabilities"] == {"drop": ["ALL"]}, name
            assert rights.get("readOnlyRootFilesystem", False) or container["image"] != OF_RELOOK, name


def test_the_kustomization_is_complete_and_lists_its_secrets() -> None:
    files = {path.name for path in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(_kustomization()["resources"]) == files
    assert [image["name"] for image in _kustomization()["images"]] == [OF_RELOOK]
    text = "".join((KUBERNETES / name).read_text() for name in files)
    keys = set(re.findall(r"name: relook,\s+key: (\w+)", text)) | set(re.findall(r"name: relook\n\s+key: (\w+)", text))
    header = (KUBERNETES / "kustomization.yaml").read_text()
    assert {"RAY_AUTH_TOKEN", "POSTGRES_PASSWORD", "LABEL_STUDIO_PASSWORD"} <= keys
    assert not [key for key in keys if key not in header]


# ---------------------------------------------------------------- ECS


def test_the_ecs_template_is_valid() -> None:
    found = cfnlint.lint((DEPLOY / "ecs" / "relook.json").read_text(), regions=["eu-central-1"])
    assert [str(match) for match in found] == []


def test_a_spoilt_ecs_template_is_refused() -> None:
    stack = _stack()
    stack["Resources"]["ServiceTask"]["Properties"]["Cpu"] = "2000"
    stack["Resources"]["Service"]["Properties"]["TaskDefinitoin"] = {"Ref": "ServiceTask"}
    found = " ".join(match.message for match in cfnlint.lint(json.dumps(stack), regions=["eu-central-1"]))
    assert "TaskDefinitoin" in found
    assert "2000" in found


def test_ecs_serves_on_fargate_and_trains_on_gpus() -> None:
    resources = _stack()["Resources"]
    assert resources["ServiceTask"]["Properties"]["RequiresCompatibilities"] == ["FARGATE"]
    assert resources["WatcherTask"]["Properties"]["RequiresCompatibilities"] == ["EC2"]
    round_container = resources["WatcherTask"]["Properties"]["ContainerDefinitions"][0]
    assert round_container["ResourceRequirements"] == [{"Type": "GPU", "Value": "1"}]
    for container in _task_containers():
        assert container["User"] == "10001:10001"
        assert container["ReadonlyRootFilesystem"]
        assert container["LinuxParameters"]["Capabilities"]["Drop"] == ["ALL"]
    described = len(_stack()["Description"].encode())
    assert described <= 1024, "CloudFormation takes no longer one"


# ---------------------------------------------------------------- Ray's own cluster launcher


@pytest.fixture(scope="module")
def ray_up_file() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())
    return document


def test_ray_up_accepts_the_cluster_file(ray_up_file: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(ray_up_file)
    validate_config(prepared)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0
    prepared["available_node_types"]["gpu_spot"]["min_worker"] = 1
    with pytest.raises(jsonschema.ValidationError, match="min_worker"):
        validate_config(prepared)


def test_the_cluster_is_closed_autoscaled_and_of_our_versions(ray_up_file: dict[str, Any]) -> None:
    kinds = ray_up_file["available_node_types"]
    workers = {name: kind for name, kind in kinds.items() if name != ray_up_file["head_node_type"]}
    assert "GPU" not in kinds["head"]["resources"]
    assert all(kind["resources"]["GPU"] > 0 and kind["min_workers"] == 0 for kind in workers.values())
    assert ray_up_file["max_workers"] == sum(kind["max_workers"] for kind in workers.values())
    assert workers["gpu_spot"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    for kind in kinds.values():
        # Left to Ray, the group would take SSH from everywhere.
        assert kind["node_config"]["SecurityGroupIds"]
        assert kind["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    docker = ray_up_file["docker"]
    assert "-e RAY_AUTH_MODE=token" in docker["run_options"]
    version = f":{_locked('ray')}-py311-"
    assert version in docker["head_image"]
    assert version in docker["worker_image"]
    assert any("--dashboard-host=127.0.0.1" in line for line in ray_up_file["head_start_ray_commands"])
    assert "disabled" not in (ROOT / "ray_cluster.yaml").read_text()


# ---------------------------------------------------------------- what all of them start


def _parse(command: Any, name: str, words: list[str], parent: Any = None) -> None:
    """Parse a command line down to its last verb; KeyError or a usage error if it does not exist."""
    context = command.make_context(name, list(words), parent=parent)
    if verbs := getattr(command, "commands", None):
        verb, *rest = [*context._protected_args, *context.args]
        _parse(verbs[verb], verb, rest, context)


@pytest.mark.parametrize("words", _commands(), ids=" ".join)
def test_a_deploy_file_starts_a_verb_that_exists(words: list[str]) -> None:
    relook = typer.main.get_command(app)
    _parse(relook, "relook", words)
    # What was parsed is looked at to its end.
    for wrong in ([*words, "--no-such-option"], ["no-such-verb", *words[1:]]):
        with pytest.raises((KeyError, NoSuchOption), match="no-such"):
            _parse(relook, "relook", wrong)


def test_every_setting_in_a_deploy_file_exists() -> None:
    variables = dict(_compose()["services"]["head"]["environment"])
    (config,) = [document["data"] for document in _documents() if document["kind"] == "ConfigMap"]
    variables |= config
    for container in _task_containers():
        variables |= {entry["name"]: "x" for entry in container.get("environment", ())}
    for path in (p for p in DEPLOY.rglob("*") if p.is_file()):
        for name in re.findall(r"RELOOK_[A-Z_]*[A-Z]", path.read_text()):
            variables.setdefault(name, "/data" if name == "RELOOK_HOME" else "value")
    build_only = {"RELOOK_IMAGE"}
    given = {name: value for name, value in variables.items() if name not in build_only}
    load_settings(environ=given | {"RELOOK_DATABASE": "postgresql+psycopg://relook:secret@database/relook"})
    assert {"RELOOK_DATABASE", "RELOOK_BLOBS", "RELOOK_STORAGE", "RELOOK_LABELING__TOKEN"} <= set(given)


def test_the_image_installs_the_locked_packages_and_every_room() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())
    rooms = [name.rstrip("*") for name in document["tool"]["setuptools"]["packages"]["find"]["include"]]
    assert re.findall(r"^COPY (\w+) \1$", text, re.MULTILINE) == rooms
    (files,) = re.findall(r"^COPY (.+) \./$", text, re.MULTILINE)
    modules = [f"{name}.py" for name in document["tool"]["setuptools"]["py-modules"]]
    assert modules == ["relook.py"]
    assert set(modules) < set(files.split())
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == {*rooms, *files.split()}
    assert "*" in ignored, "data, environments and history stay out of what is sent to the builder"
    assert "--require-hashes -r requirements.lock" in text
    assert "USER 10001:10001" in text
    locked = (ROOT / "requirements.lock").read_text().split()
    assert any(Requirement(pin).name == "psycopg-binary" for pin in locked if "==" in pin), "the ledger of a cluster"
