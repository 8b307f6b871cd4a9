"""Runs, figures and models in MLflow. A server that is down never stops or slows what is tracked.

What is to be recorded is queued and sent by a thread, in order, and sent again until it arrives. A failure is said
once; what has not arrived when the run ends is listed. The run of a training that is resumed is found again by its
name, so that it has one run in MLflow, too.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from records.errors import ConfigError, RelookError
from records.ids import new_id
from records.models import current_rollout, find_model, registered_bundle, serving_id
from records.progress import say
from records.redaction import without_secrets
from records.types import ModelRecord, ModelStatus
from trainers.tracking.settings import TrackingSettings

if TYPE_CHECKING:
    from records.bundles import Bundle
    from records.store import Store
    from trainers.evaluation.figures import Evaluation
    from trainers.fitting.epoch_report import EpochReport, OnEpoch

MODEL_TAG = "relook.model_id"
_RUN_TAG = "relook.run"
_KIND_TAG = "relook.kind"
_PARAMS_AT_ONCE = 100
"""MLflow refuses more in one request."""
_MOST_PARAM_CHARS = 500
_ATTEMPTS_S = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Pauses before what failed is sent again; the last one repeats."""
_IDLE_S = 60.0
"""After a run ended: how long nothing may arrive before the rest is given up."""
_CLIENT_LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""Attempts are repeated here, where the end of a run can cut them short; MLflow's own take minutes each."""

Operation = Callable[["_Client"], None]


class Tracked:
    """One run in MLflow; without an address, every method does nothing.

    Args:
        settings: where to.
        kind: `train`, `tune`, `evaluate`, `round` or `promote`.
        name: of the run; the same name is the same run.
        params: settings, by dotted names.
    """

    def __init__(self, settings: TrackingSettings | None, kind: str, name: str, params: Mapping[str, Any]) -> None:
        self._settings = settings = settings or TrackingSettings()
        self._sender = None if settings.mlflow_uri is None else _Sender(settings, kind, name)
        self._trials: set[int] = set()
        self._put("the settings", lambda client: client.params(params))

    @property
    def is_on(self) -> bool:
        """Whether there is an address; what is recorded need not be looked up without one."""
        return self._sender is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        status = "FINISHED" if kind is None else ("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")
        self._put("the end of the run", lambda client: client.end(status))
        if self._sender is not None:
            self._sender.close()

    def epoch(self, report: "EpochReport") -> None:
        """Record the figures of an epoch."""
        from trainers.tracking.tensorboard import scalars_of

        self.figures(scalars_of(report), report.epoch)

    def before(self, on_epoch: "OnEpoch | None") -> "OnEpoch":
        """Return a callback of a training that records each epoch, then calls another one."""

        def recorded(report: "EpochReport") -> bool | None:
            self.epoch(report)
            return None if on_epoch is None else on_epoch(report)

        return recorded

    def figures(self, values: Mapping[str, float | None], step: int = 0) -> None:
        """Record figures; those that are undefined are left out."""
        known = {name: float(value) for name, value in values.items() if value is not None}
        self._put(f"figures of step {step}", lambda client: client.figures(known, step))

    def settings(self, values: Mapping[str, Any]) -> None:
        """Record settings that are known only now."""
        self._put("the settings", lambda client: client.params(values))

    def tags(self, values: Mapping[str, str]) -> None:
        """Record tags."""
        self._put("tags", lambda client: client.tags(values))

    def file(self, path: Path) -> None:
        """Record a file as an artifact."""
        self._put(path.name, lambda client: client.file(path))

    def text(self, name: str, text: str) -> None:
        """Record a text as an artifact."""
        self._put(name, lambda client: client.text(name, text))

    def trial(self, number: int, values: Mapping[str, Any], scores: Sequence[float]) -> None:
        """Record a trial of a search that ended, once, as a run below this one: settings, and a score per epoch."""
        if number not in self._trials:
            self._trials.add(number)
            self._put(f"trial {number}", lambda client: client.trial(number, dict(values), scores))

    def evaluation(self, found: "Evaluation") -> None:
        """Record the figures of a model on a split, or on a folder."""
        split, key = found.split or "folder", found.key_class
        names = ("balanced_accuracy", "accuracy", "macro_f1", "macro_auc", "ece", "answered_share", "mean_set_size")
        values = {name: getattr(found, name) for name in names}
        values |= {f"sensitivity/{code}": one.sensitivity for code, one in found.per_class.items()}
        if key is not None:
            values |= {"key_class_sensitivity": key.sensitivity, "key_class_specificity": key.specificity}
        self.figures({f"{split}/{name}": value for name, value in values.items()})
        self.tags({MODEL_TAG: found.model_id})
        self.text(f"evaluation-{split}.json", found.model_dump_json(indent=2) + "\n")

    def model(self, bundle: "Bundle") -> None:
        """Record a bundle as an artifact, and as a version of the registered model unless it is one."""
        name = self._settings.mlflow_model
        self._put(f"model {bundle.id[:12]}", lambda client: client.model(name, bundle))

    def fitted(self, bundle: "Bundle", metrics: Path) -> None:
        """Record a trained model, its own figures, and the file with a line per epoch."""
        split, own = bundle.document.measured
        self.figures({f"{split}/{name}": own[name] for name in ("macro_f1", "macro_auc", "ece")})
        self.tags({MODEL_TAG: bundle.id, "relook.dataset_id": bundle.document.dataset_id})
        self.file(metrics)
        self.model(bundle)

    def aliases(self, store: "Store") -> None:
        """Let the aliases `champion` and `candidate` name what serves and what may replace it now."""
        if self._sender is None:
            return
        wanted = aliases_of(store)
        for bundle in {bundle.id: bundle for bundle in wanted.values() if bundle is not None}.values():
            self.model(bundle)
        ids = {alias: None if bundle is None else bundle.id for alias, bundle in wanted.items()}
        self._put("the aliases", lambda client: client.aliases(self._settings.mlflow_model, ids))

    def _put(self, what: str, operation: Operation) -> None:
        if self._sender is not None:
            self._sender.put(what, operation)


def track_evaluation(settings: TrackingSettings, found: "Evaluation") -> "Evaluation":
    """Record an evaluation as a run of its own, and return it."""
    name = f"evaluate-{found.model_id[:12]}-{new_id()[-8:]}"
    with Tracked(settings, "evaluate", name, {"model": found.model_id}) as tracked:
        tracked.evaluation(found)
    return found


def aliases_of(store: "Store") -> dict[str, "Bundle | None"]:
    """Return the model that serves, and the one that may replace it: of the rollout, else the newest candidate."""
    with store.ledger.read() as tx:
        rollout = current_rollout(tx)
        waiting = tx.find(
            ModelRecord, where={"status": ModelStatus.CANDIDATE}, order_by=("-status_changed_at",), limit=1
        )
        candidate = rollout.candidate_id if rollout is not None else (waiting[0].id if waiting else None)
        ids = {"champion": serving_id(tx), "candidate": candidate}
    return {alias: None if model_id is None else _stored(store, alias, model_id) for alias, model_id in ids.items()}


def _stored(store: "Store", alias: str, model_id: str) -> "Bundle | None":
    try:
        return registered_bundle(store, find_model(store, model_id))
    except RelookError as error:
        # The promotion that is being recorded has happened; what MLflow shows of it may lack an alias.
        say(f"MLflow gets no alias {alias}: {error}")
        return None


class _Sender:
    """A queue of operations, and the thread that sends them."""

    def __init__(self, settings: TrackingSettings, kind: str, name: str) -> None:
        if find_spec("mlflow") is None:
            raise ConfigError(
                "tracking.mlflow_uri is set, and MLflow's client is not installed; pip install 'relook[tracking]' "
                "brings it"
            )
        self._place = without_secrets(str(settings.mlflow_uri))
        self._client = _Client(settings, kind, name)
        self._waiting: deque[tuple[str, Operation]] = deque()
        self._lost: list[str] = []
        self._changed = threading.Event()
        self._closing = False
        self._said = False
        self._arrived_at = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="mlflow", daemon=True)
        self._thread.start()

    def put(self, what: str, operation: Operation) -> None:
        """Queue an operation."""
        self._waiting.append((what, operation))
        self._changed.set()

    def close(self) -> None:
        """Send what waits; give up at the first failure, or if nothing arrives for a minute. Say what is missing."""
        self._arrived_at = time.monotonic()
        self._closing = True
        self._changed.set()
        while self._thread.is_alive() and time.monotonic() - self._arrived_at < _IDLE_S:
            self._thread.join(0.5)
        missing = [*self._lost, *(what for what, _ in list(self._waiting))]
        if missing:
            shown = ", ".join(dict.fromkeys(missing[:5])) + (
                f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            )
            say(f"MLflow at {self._place} lacks {len(missing)} records of this run: {shown}; all of it is in the home")

    def _run(self) -> None:
        failures = 0
        while self._waiting or not self._closing:
            if not self._waiting:
                self._changed.wait()
                self._changed.clear()
                continue
            what, operation = self._waiting[0]
            reason = self._attempt(operation)
            if reason is None:
                failures, self._arrived_at = 0, time.monotonic()
            elif reason.refused:
                self._say(reason)
                self._lost.append(what)
            else:
                self._say(reason)
                if self._closing:
                    return
                # The end of the run wakes the thread for its last attempt.
                self._pause(_ATTEMPTS_S[min(failures, len(_ATTEMPTS_S) - 1)])
                failures += 1
                continue
            self._waiting.popleft()

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._closing and (left := until - time.monotonic()) > 0:
            self._changed.wait(left)
            self._changed.clear()

    def _attempt(self, operation: Operation) -> "_Failure | None":
        try:
            operation(self._client)
        except Exception as error:  # noqa: BLE001 - whatever MLflow or its store raises, the training goes on
            return _Failure(error)
        return None

    def _say(self, failure: "_Failure") -> None:
        if not self._said:
            self._said = True
            say(f"MLflow at {self._place}: {without_secrets(failure.text)}; the work goes on, and it is sent again")


class _Failure:
    """Why something did not arrive."""

    def __init__(self, error: Exception) -> None:
        self.text = " ".join(str(error).split())[:300] or type(error).__name__
        status = getattr(error, "get_http_status_code", lambda: 500)()
        self.refused = 400 <= status < 500 and status not in (408, 429)
        """Whether the server understood and does not want it: sending it again would block what comes after it."""


class _Client:
    """MLflow's client for one run; it connects with the first operation."""

    def __init__(self, settings: TrackingSettings, kind: str, name: str) -> None:
        self._settings, self._kind, self._name = settings, kind, name
        self._opened: tuple[Any, str] | None = None

    def params(self, values: Mapping[str, Any]) -> None:
        """Log parameters, those that are there already once more with the same values."""
        from mlflow.entities import Param

        client, run_id = self._open()
        known = client.get_run(run_id).data.params
        # MLflow refuses another value; a resumed run may have other threads, for example.
        params = [Param(key, str(value)[:_MOST_PARAM_CHARS]) for key, value in values.items() if key not in known]
        for start in range(0, len(params), _PARAMS_AT_ONCE):
            client.log_batch(run_id, params=params[start : start + _PARAMS_AT_ONCE])

    def figures(self, values: Mapping[str, float], step: int) -> None:
        """Log metrics of a step."""
        from mlflow.entities import Metric

        client, run_id = self._open()
        now_ms = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(name, value, now_ms, step) for name, value in values.items()])

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        client, run_id = self._open()
        for name, value in values.items():
            client.set_tag(run_id, name, value)

    def trial(self, number: int, values: Mapping[str, Any], scores: Sequence[float]) -> None:
        """Log a run below this one."""
        from mlflow.entities import Metric, Param

        client, run_id = self._open()
        below = self._run_of(client, f"{self._name}/trial-{number}", "trial", {"mlflow.parentRunId": run_id})
        now_ms = int(time.time() * 1000)
        client.log_batch(
            below,
            metrics=[Metric("val/balanced_accuracy", score, now_ms, epoch) for epoch, score in enumerate(scores, 1)],
            params=[Param(key, str(value)[:_MOST_PARAM_CHARS]) for key, value in values.items()],
        )
        client.set_terminated(below)

    def file(self, path: Path) -> None:
        """Log an artifact."""
        client, run_id = self._open()
        client.log_artifact(run_id, str(path))

    def text(self, name: str, text: str) -> None:
        """Log a text as an artifact."""
        client, run_id = self._open()
        client.log_text(run_id, text, name)

    def end(self, status: str) -> None:
        """Set the status of the run."""
        client, run_id = self._open()
        client.set_terminated(run_id, status)

    def model(self, name: str, bundle: "Bundle") -> None:
        """Log a bundle, and register it."""
        client, run_id = self._open()
        if bundle.id in self._versions(client, name):
            return
        folder = f"models/{bundle.id[:12]}"
        for path in sorted(bundle.path.iterdir()):
            # Not the folder of the report, which is written again and is no part of the model.
            if path.is_file():
                client.log_artifact(run_id, str(path), folder)
        source = f"{client.get_run(run_id).info.artifact_uri}/{folder}"
        tags = {MODEL_TAG: bundle.id, "relook.dataset_id": bundle.document.dataset_id}
        client.create_model_version(name, source, run_id, tags=tags)

    def aliases(self, name: str, wanted: Mapping[str, str | None]) -> None:
        """Move aliases to the versions that are these models, and delete those of no model."""
        client, _ = self._open()
        versions = self._versions(client, name)
        for alias, model_id in wanted.items():
            if model_id is None:
                client.delete_registered_model_alias(name, alias)
            else:
                client.set_registered_model_alias(name, alias, versions[model_id])

    def _versions(self, client: Any, name: str) -> dict[str, str]:
        """Return the version of each model by its id; the registered model is created."""
        from mlflow.exceptions import MlflowException

        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found: dict[str, str] = {}
        token = None
        while True:
            page = client.search_model_versions(f"name='{name}'", page_token=token)
            found |= {version.tags[MODEL_TAG]: version.version for version in page if MODEL_TAG in version.tags}
            token = page.token
            if not token:
                return found

    def _open(self) -> tuple[Any, str]:
        if self._opened is None:
            for name, value in _CLIENT_LIMITS.items():
                os.environ.setdefault(name, value)
            # MLflow reports its use to its makers otherwise.
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            from mlflow import MlflowClient

            uri = self._settings.mlflow_uri
            client = MlflowClient(tracking_uri=uri, registry_uri=uri)
            self._opened = client, self._run_of(client, self._name, self._kind, {})
        return self._opened

    def _run_of(self, client: Any, name: str, kind: str, tags: Mapping[str, str]) -> str:
        """Return the id of the run with a name, created if there is none."""
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(self._settings.mlflow_experiment)
        try:
            experiment_id = (
                experiment.experiment_id if experiment else client.create_experiment(self._settings.mlflow_experiment)
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            # Another process was faster.
            experiment_id = client.get_experiment_by_name(self._settings.mlflow_experiment).experiment_id
        earlier = client.search_runs([experiment_id], f"tags.`{_RUN_TAG}` = '{name}'", max_results=1)
        if earlier:
            run_id: str = earlier[0].info.run_id
            client.update_run(run_id, "RUNNING")
            return run_id
        tags = {_RUN_TAG: name, _KIND_TAG: kind, **tags}
        created: str = client.create_run(experiment_id, tags=tags, run_name=name).info.run_id
        return created
