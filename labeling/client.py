"""Label Studio's API, as far as Relook needs it: typed, retried, with one clear sentence per failure.

The only file that talks to its SDK. Lists leave the tasks' images out, so that a poll stays small
however large the embedded images are. A call that may be repeated without harm is retried with
growing pauses; an import is not, since the caller has to look first whether it arrived.
"""

import json
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Self
from urllib.parse import urlsplit
from uuid import UUID

import httpx
from label_studio_sdk import LabelStudio
from label_studio_sdk.base_client import LabelStudioBase
from label_studio_sdk.core.api_error import ApiError
from label_studio_sdk.core.parse_error import ParsingError
from label_studio_sdk.core.request_options import RequestOptions
from pydantic import SecretStr

from labeling.rows import ProjectRow, ProjectState, TaskRow, body_of, filter_by, known_id, task_row
from labeling.tasks import LIST_VIEW
from records.errors import LabelStudioError, RefusedError, RelookError, UnknownIdError

PAGE_SIZE = 500
_PAUSES_S = (0.3, 1.0, 3.0)
_ONCE = RequestOptions(max_retries=0)
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"
_RETRIED = frozenset({429, 500, 502, 503, 504})
_SAMPLING = "Uncertainty sampling"  # the only one that follows prediction scores


class LabelStudioClient:
    """A connection to one Label Studio. Safe to use from several threads.

    Args:
        url: its base URL.
        token: an access token, personal or legacy.
        timeout_s: per call, seconds.
    Raises:
        LabelStudioError: the token is not usable, for example an expired personal one.
    """

    def __init__(self, url: str, token: SecretStr | str, *, timeout_s: float = 60.0) -> None:
        self.url = url.rstrip("/")
        secret = token.get_secret_value() if isinstance(token, SecretStr) else token
        local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        # The port of the local server may change from start to start; its data stays the same.
        self.server = "local" if local else self.url
        # A proxy of the environment cannot reach this machine's own loopback.
        self._http = httpx.Client(timeout=timeout_s, follow_redirects=True, trust_env=not local)
        with self.translated_errors("log in"):
            self._sdk: LabelStudioBase = LabelStudio(  # type: ignore[no-untyped-call]
                base_url=self.url,
                api_key=secret,
                httpx_client=self._http,
                timeout=timeout_s,
                max_retries=len(_PAUSES_S),
            )

        # A client that is dropped rather than closed must not leave sockets behind.
        weakref.finalize(self, self._http.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"LabelStudioClient({self.url!r})"

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def version(self) -> str:
        """Return the release of Label Studio; needs a token that is accepted.

        Returns:
            For example 1.23.2.
        Raises:
            LabelStudioError: it does not answer, or refuses the token.
        """
        self.request("GET", "api/current-user/whoami", "check the token")
        with self.translated_errors("read its version"):
            return str(self._sdk.versions.get().release)

    def find_project(self, marker: str) -> int | None:
        """Return the id of the project whose description holds the marker, or None."""
        with self.translated_errors("list projects"):
            for project in self._sdk.projects.list(include="id,description", page_size=100):
                if project.id is not None and marker in (project.description or ""):
                    return int(project.id)
        return None

    def ensure_project(self, title: str, label_config: str, marker: str, model_version: str) -> int:
        """Make the project that carries the marker, or bring the one that exists up to date.

        Args:
            title: shown to annotators, 3 to 50 characters.
            label_config: XML of the labeling page.
            marker: unique text that stays in the project's description.
            model_version: of the predictions whose scores order the tasks.
        Returns:
            The project's id. Calling again changes nothing.
        Raises:
            LabelStudioError: it does not answer, or refuses the label config.
        """
        found = self.find_project(marker)
        description = f"Questions from Relook; answers are read back. {marker}"
        if found is not None:
            present = self.project(found)
            if present is not None and present.label_config != label_config.strip():
                with self.translated_errors("update the label config"):
                    self._sdk.projects.update(found, label_config=label_config)
            project_id = found
        else:
            with self.translated_errors("create a project"):
                project_id = known_id(
                    self._sdk.projects.create(
                        title=title,
                        description=description,
                        label_config=label_config,
                        sampling=_SAMPLING,
                        model_version=model_version,
                        show_collab_predictions=False,
                        enable_empty_annotation=False,
                        maximum_annotations=1,
                        request_options=_ONCE,
                    ).id
                )
        self._ensure_view(project_id)
        return project_id

    def project(self, project_id: int) -> ProjectRow | None:
        """Return a project, or None if it is gone."""
        action = f"read project {project_id}"
        try:
            found = self.request("GET", f"api/projects/{project_id}", action)
        except UnknownIdError:
            return None
        with self.translated_errors(action):
            return ProjectRow(project_id, str(found["description"] or ""), str(found["label_config"]).strip())

    def import_tasks(self, project_id: int, tasks: Sequence[Mapping[str, Any]]) -> list[int]:
        """Import tasks, all or none. Never repeated here: look with `list_tasks` whether it arrived.

        Args:
            project_id: of the project.
            tasks: each with `data`, `meta` and `predictions`.
        Returns:
            Task ids, in the order of `tasks`.
        Raises:
            LabelStudioError: it was refused, or no answer came; then it may have arrived all the same.
        """
        action, path = f"import {len(tasks)} tasks", f"api/projects/{project_id}/import"
        found = self.request("POST", path, action, params={"return_task_ids": "true"}, body=list(tasks), repeat=False)
        with self.translated_errors(action):
            task_ids = [int(task_id) for task_id in found["task_ids"]] if tasks else []
        if len(task_ids) != len(tasks):
            raise LabelStudioError(
                f"Label Studio at {self.url} imported {len(task_ids)} of {len(tasks)} tasks; "
                "run `relook label push` again"
            )
        return task_ids

    def state(self, project_id: int) -> ProjectState:
        """Return what changes whenever anything in the project does, in one request.

        Args:
            project_id: of the project.
        Returns:
            Counts and the newest update.
        Raises:
            UnknownIdError: the project is gone.
            LabelStudioError: it does not answer.
        """
        rows, total, num_annotations = self._tasks(project_id, {"ordering": ["-tasks:updated_at"]}, 1)
        return ProjectState(total, num_annotations, rows[0].updated_at if rows else None)

    def list_tasks(
        self,
        project_id: int,
        *,
        after_id: int = 0,
        updated_since: datetime | None = None,
        with_annotations: bool = False,
        page_size: int = PAGE_SIZE,
    ) -> Iterator[list[TaskRow]]:
        """Yield tasks by ascending id, a page at a time.

        Args:
            project_id: of the project.
            after_id: only tasks with a larger id.
            updated_since: only tasks that changed then or later.
            with_annotations: whether to read their annotations as well.
            page_size: tasks in a page.
        Yields:
            Pages. Each starts behind the last id of the one before, so nothing that changes or
            disappears meanwhile can make a task be passed over.
        Raises:
            UnknownIdError: the project is gone.
            LabelStudioError: it does not answer.
        """
        while True:
            items = [filter_by("id", "greater", "Number", after_id)]
            if updated_since is not None:
                since = updated_since.astimezone(UTC).strftime(_TIME_FORMAT)
                items.append(filter_by("updated_at", "greater_or_equal", "Datetime", since))
            query = {"ordering": ["tasks:id"], "filters": {"conjunction": "and", "items": items}}
            rows, _, _ = self._tasks(project_id, query, page_size, with_annotations=with_annotations)
            if rows:
                yield rows
                after_id = rows[-1].id
            if len(rows) < page_size:
                return

    def refresh_task(self, task_id: int, document: Mapping[str, Any]) -> bool:
        """Say anew what a task shows and where it stands in the order; its answers stay.

        Args:
            task_id: of the task.
            document: as for `import_tasks`.
        Returns:
            False if the task is gone.
        Raises:
            LabelStudioError: it was refused, or no answer came; refreshing again does no harm.
        """
        action = f"refresh task {task_id}"
        try:
            self.request(
                "PATCH", f"api/tasks/{task_id}/", action, body={"data": document["data"], "meta": document["meta"]}
            )
        except UnknownIdError:
            return False
        wanted = document["predictions"][0]
        found = self.request("GET", "api/predictions/", action, params={"task": task_id})
        with self.translated_errors(action):
            numbers = [int(one["id"]) for one in found if one["model_version"] == wanted["model_version"]]
        for number in numbers:
            self.request("PATCH", f"api/predictions/{number}/", action, body={"score": wanted["score"]})
        return True

    def delete_task(self, task_id: int) -> None:
        """Delete a task; one that is gone already is no error."""
        try:
            self.request("DELETE", f"api/tasks/{task_id}", f"delete task {task_id}")
        except UnknownIdError:
            return

    def create_annotation(
        self, task_id: int, result: Sequence[Mapping[str, Any]], *, key: UUID, completed_by: int | None = None
    ) -> int | None:
        """Answer a task.

        Args:
            task_id: of the task.
            result: one region per control.
            key: an annotation with the same key is made only once.
            completed_by: user id of the reader; default: the owner of the token.
        Returns:
            The annotation's id, or None if one with this key exists.
        Raises:
            UnknownIdError: the task is gone.
            LabelStudioError: it was refused, or no answer came.
        """
        body: dict[str, Any] = {"result": list(result), "unique_id": str(key)}
        if completed_by is not None:
            body["completed_by"] = completed_by
        action = f"answer task {task_id}"
        try:
            found = self.request("POST", f"api/tasks/{task_id}/annotations/", action, body=body)
        except RefusedError:
            return None
        with self.translated_errors(action):
            return int(found["id"])

    def users(self) -> dict[int, str]:
        """Return the e-mail address of every account, by user id."""
        action = "list users"
        found = self.request("GET", "api/users/", action)
        with self.translated_errors(action):
            return {int(user["id"]): str(user["email"]) for user in found}

    def ensure_user(self, email: str, first_name: str, last_name: str) -> int:
        """Return the id of the user with this e-mail address; one that is missing is added without a password."""
        for user_id, known in self.users().items():
            if known.lower() == email.lower():
                return user_id
        action = f"add the user {email}"
        body = {"username": email, "email": email, "first_name": first_name, "last_name": last_name}
        found = self.request("POST", "api/users/", action, body=body, repeat=False)
        with self.translated_errors(action):
            return int(found["id"])

    def invitation(self) -> str:
        """Return the sign-up link of this server; whoever has it can make an account."""
        action = "invite a person"
        found = self.request("GET", "api/invite", action)
        with self.translated_errors(action):
            link = urlsplit(found["invite_url"])
            return f"{self.url}{link.path}?{link.query}"

    def _ensure_view(self, project_id: int) -> None:
        if self.request("GET", "api/dm/views/", "list views", params={"project": project_id}):
            return
        self.request(
            "POST", "api/dm/views/", "make a view", body={"project": project_id, "data": LIST_VIEW}, repeat=False
        )

    def _tasks(
        self, project_id: int, query: Mapping[str, Any], page_size: int, *, with_annotations: bool = False
    ) -> tuple[list[TaskRow], int, int]:
        """Return a page of tasks, the number of tasks that match, and the number of their annotations."""
        # Names of the task's and of the annotations' fields: the server applies one list to both.
        include = "id,meta,updated_at"
        if with_annotations:
            include += ",annotations,result,completed_by,was_cancelled,lead_time"
        params = {
            "project": project_id,
            "fields": "all" if with_annotations else "task_only",
            "include": include,
            "query": json.dumps(query),
            "page_size": page_size,
        }
        action = f"list the tasks of project {project_id}"
        found = self.request("GET", "api/tasks/", action, params=params)
        with self.translated_errors(action):
            rows = [task_row(task) for task in found["tasks"]]
            return rows, int(found["total"]), int(found["total_annotations"])

    def request(
        self,
        method: str,
        path: str,
        action: str,
        *,
        params: dict[str, Any] | None = None,
        body: Any = None,
        repeat: bool = True,
    ) -> Any:
        """Call a route that has no method of its own.

        Args:
            method: GET, POST, PATCH or DELETE.
            path: under the server's URL.
            action: what is tried, in words, for the message of a failure.
            params: of the query.
            body: sent as JSON.
            repeat: whether a failed call may be made again.
        Returns:
            The parsed answer; None if it is empty.
        Raises:
            LabelStudioError: it does not answer, or refuses.
        """
        with self.translated_errors(action):
            for pause_s in _PAUSES_S if repeat else ():
                try:
                    return self._send(method, path, params, body)
                except httpx.TransportError:
                    time.sleep(pause_s)
                except ApiError as error:
                    if error.status_code not in _RETRIED:
                        raise
                    time.sleep(pause_s)
            return self._send(method, path, params, body)

    def _send(self, method: str, path: str, params: dict[str, Any] | None, body: Any) -> Any:
        """Call through the SDK's own transport, which knows the token, without its models: they halve a list's rate."""
        transport = self._sdk._client_wrapper.httpx_client
        response = transport.request(path, method=method, params=params, json=body, request_options=_ONCE)
        if response.is_error:
            raise ApiError(status_code=response.status_code, body=body_of(response))
        return response.json() if response.content else None

    @contextmanager
    def translated_errors(self, action: str) -> Generator[None]:
        """Turn every failure of a call into one sentence.

        Args:
            action: what is tried, in words.
        Yields:
            Nothing; the block makes the call and reads its answer.
        """
        try:
            yield
        except ApiError as error:
            raise refusal(self.url, action, error.status_code or 0, error.body) from error
        except httpx.TimeoutException as error:
            raise LabelStudioError(
                f"Label Studio at {self.url} took too long to {action}; it is overloaded, or "
                "labeling.request_timeout_s is too small"
            ) from error
        except httpx.HTTPError as error:
            raise LabelStudioError(
                f"Label Studio at {self.url} cannot be reached to {action} ({error}); "
                "`relook label status` says more, `relook label up` starts the local one"
            ) from error
        except (ParsingError, ValueError, KeyError, TypeError) as error:
            raise LabelStudioError(
                f"what answered at {self.url} when asked to {action} is not a Label Studio that Relook knows"
            ) from error


def refusal(url: str, action: str, status: int, body: Any) -> RelookError:
    """Return the error for an answer that is not a success.

    Args:
        url: base URL of the Label Studio.
        action: what was asked, as in `import 100 tasks`.
        status: HTTP status.
        body: what it answered, JSON or text.
    Returns:
        UnknownIdError for 404, RefusedError for 409 (it exists already), else LabelStudioError.
    """
    said = " ".join(_reason(body).split())[:300]
    where = f"Label Studio at {url}"
    if status in (401, 403):
        return LabelStudioError(
            f"{where} refused the token to {action} ({status}: {said}); for the local one it is kept in "
            "RELOOK_HOME/keys/label-studio.json, for another it comes from RELOOK_LABELING__TOKEN"
        )
    if status == 404:
        return UnknownIdError(f"{where} has nothing to {action}: {said}")
    if status == 409:
        return RefusedError(f"{where} has it already ({action}): {said}")
    if status == 429:
        return LabelStudioError(f"{where} asks for fewer requests ({action}); try again in a minute")
    if status >= 500:
        return LabelStudioError(f"{where} failed to {action} ({status}: {said}); its log says why")
    return LabelStudioError(f"{where} refused to {action} ({status}: {said})")


def _reason(body: Any) -> str:
    if not isinstance(body, dict):
        return str(body or "no reason given")
    detail, faults = body.get("detail") or body, body.get("validation_errors")
    return f"{detail}: {faults}" if faults else str(detail)
