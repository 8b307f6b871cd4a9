"""Label Studio's API as far as Relook needs it: typed rows, retries, and errors as one sentence each.

This is the only module that imports Label Studio's SDK. Listings leave out the images of the tasks, so a poll
stays small however large the embedded images are. Calls that are safe to repeat are retried with growing pauses.
"""

import json
import time
import weakref
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
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

from labeling.refusals import refusal
from labeling.rows import ProjectRow, ProjectState, TaskRow, filter_by, task_row
from labeling.tasks import LIST_VIEW
from records.errors import LabelStudioError, LabelStudioRefusedError, RefusedError, UnknownIdError
from records.parts import in_parts
from records.types.base import LINE

PAGE_SIZE = 500
_PAUSES_S = (0.3, 1.0, 3.0)
_ONCE = RequestOptions(max_retries=0)
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"
_RETRIED = frozenset({429, 500, 502, 503, 504})
_SAMPLING = "Uncertainty sampling"  # the only mode that orders tasks by prediction score


class LabelStudioClient:
    """A connection to one Label Studio. Safe to use from several threads.

    Args:
        url: base URL of the server.
        token: an access token, personal or legacy.
        timeout_s: per request, seconds.
        server: name under which what is read is stored; default: its URL, or `local` on this machine.
    Raises:
        LabelStudioError: the token is not usable, for example an expired personal one.
    """

    def __init__(self, url: str, token: SecretStr | str, *, timeout_s: float = 60.0, server: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        secret = token.get_secret_value() if isinstance(token, SecretStr) else token
        local = urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        # Stored with every annotation. The local server may take another port at each start while its data stay
        # the same, so its URL cannot identify it.
        self.server = server or ("local" if local else self.url)
        # A proxy from the environment cannot reach the loopback of this machine.
        self._http = httpx.Client(timeout=timeout_s, follow_redirects=True, trust_env=not local)
        with self.translated_errors("log in"):
            self._sdk: LabelStudioBase = LabelStudio(  # type: ignore[no-untyped-call]
                # With a slash, or the SDK drops the end of a proxy's path when it renews a personal token.
                base_url=f"{self.url}/",
                api_key=secret,
                httpx_client=self._http,
                timeout=timeout_s,
                max_retries=len(_PAUSES_S),
            )
        # Closes the sockets of a client that is garbage-collected without having been closed.
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
        """Return the release of Label Studio, for example 1.23.2; raises LabelStudioError if it refuses the token."""
        # The version itself is public; this request is what checks the token.
        self.request("GET", "api/current-user/whoami", "check the token")
        with self.translated_errors("read its version"):
            return str(self._sdk.versions.get().release)

    def find_project(self, marker: str) -> int | None:
        """Return the id of the project whose description holds the marker, or None."""
        found = (project_id for project_id, text in self.descriptions().items() if marker in text)
        return next(found, None)

    def descriptions(self) -> dict[int, str]:
        """Return the description of every project that the token may see, by id."""
        with self.translated_errors("list projects"):
            found = self._sdk.projects.list(include="id,description", page_size=100)
            return {int(project.id): project.description or "" for project in found if project.id is not None}

    def ensure_project(self, title: str, label_config: str, marker: str, model_version: str) -> int:
        """Create the project that carries the marker, or update the one that exists. Idempotent.

        Args:
            title: shown to annotators, 3 to 50 characters.
            label_config: XML of the labeling page.
            marker: unique text that stays in the project's description.
            model_version: of the predictions whose scores order the tasks.
        Returns:
            The project's id.
        Raises:
            LabelStudioError: Label Studio cannot be reached, or refuses the label config.
        """
        # By its marker first: a create request whose response was lost has made the project all the same.
        found = self.find_project(marker)
        description = f"Tasks from Relook; annotations are read back. {marker}"
        if found is not None:
            present = self.project(found)
            if present is not None and present.label_config != label_config.strip():
                with self.translated_errors("update the label config"):
                    self._sdk.projects.update(found, label_config=label_config)
            project_id = found
        else:
            with self.translated_errors("create a project"):
                created = self._sdk.projects.create(
                    title=title,
                    description=description,
                    label_config=label_config,
                    sampling=_SAMPLING,
                    model_version=model_version,
                    show_collab_predictions=False,
                    enable_empty_annotation=False,
                    maximum_annotations=1,
                    request_options=_ONCE,
                )
                if created.id is None:
                    raise KeyError("id")
                project_id = created.id
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
        """Import tasks, all or none, and never retry: use `list_tasks` to see whether a failed import arrived.

        Args:
            project_id: of an existing project.
            tasks: each with `data`, `meta` and `predictions`.
        Returns:
            Task ids, in the order of `tasks`.
        Raises:
            LabelStudioRefusedError: the import was refused; after a failure of the server look whether it arrived.
            LabelStudioError: the response was lost; the import may have been carried out.
        """
        # An import has no idempotency key in Label Studio: sending it twice makes every task twice.
        action, path = f"import {len(tasks)} tasks", f"api/projects/{project_id}/import"
        found = self.request("POST", path, action, params={"return_task_ids": "true"}, body=list(tasks), repeat=False)
        with self.translated_errors(action):
            # The enterprise edition imports in the background, and responds with the number of the import.
            if "task_ids" not in found:
                found = self._finished(f"api/projects/{project_id}/imports/{int(found['import'])}/", action)
            task_ids = [int(task_id) for task_id in found["task_ids"]] if tasks else []
        if len(task_ids) != len(tasks):
            raise LabelStudioError(
                f"Label Studio at {self.url} imported {len(task_ids)} of {len(tasks)} tasks; "
                "run `relook label push` again"
            )
        return task_ids

    def _finished(self, path: str, action: str) -> Any:
        """Return the result of an import in the background, when it has one."""
        end_s = time.monotonic() + self._timeout_s
        while (found := self.request("GET", path, action))["status"] in ("created", "in_progress"):
            if time.monotonic() > end_s:
                raise LabelStudioError(
                    f"Label Studio at {self.url} needs over {self._timeout_s:g} s to {action}; the next push looks for "
                    "the tasks"
                )
            time.sleep(_PAUSES_S[0])
        if found["status"] != "completed":
            reason = LINE.keep(str(found.get("error")))
            raise LabelStudioRefusedError(f"Label Studio at {self.url} failed to {action}: {reason}")
        return found

    def state(self, project_id: int) -> ProjectState:
        """Return a project's counts and newest update in one request; UnknownIdError if the project is gone."""
        rows, total, num_annotations = self._tasks(project_id, {"ordering": ["-tasks:updated_at"]}, 1)
        return ProjectState(total, num_annotations, rows[0].updated_at if rows else None)

    def list_tasks(
        self,
        project_id: int,
        *,
        after_id: int = 0,
        updated_since: datetime | None = None,
        with_annotations: bool = False,
        with_data: bool = False,
        page_size: int = PAGE_SIZE,
    ) -> Iterator[list[TaskRow]]:
        """Yield tasks by ascending id, a page at a time.

        Args:
            project_id: of an existing project.
            after_id: only tasks with a larger id.
            updated_since: only tasks that changed at this time or later.
            with_annotations: whether to read their annotations as well.
            with_data: whether to read what they show as well, embedded images included.
            page_size: most tasks in a page.
        Yields:
            Pages; the last one is shorter than `page_size`. A task whose annotations Label Studio fails to list has a
            fault.
        Raises:
            UnknownIdError: the project is gone.
            LabelStudioError: Label Studio cannot be reached.
        """
        while True:
            # Pages by id rather than by page number: a task that is deleted, or leaves the time filter, between two
            # requests would shift later pages, and a task would be skipped.
            items = [filter_by("id", "greater", "Number", after_id)]
            if updated_since is not None:
                since = updated_since.astimezone(UTC).strftime(_TIME_FORMAT)
                items.append(filter_by("updated_at", "greater_or_equal", "Datetime", since))
            try:
                rows, _, _ = self._tasks(
                    project_id, _by_id(items), page_size, with_annotations=with_annotations, with_data=with_data
                )
            except LabelStudioRefusedError:
                if not with_annotations:
                    raise
                rows = self._readable_tasks(project_id, items, page_size, with_data)
            if rows:
                yield rows
                after_id = rows[-1].id
            if len(rows) < page_size:
                return

    def refresh_task(self, task_id: int, document: Mapping[str, Any]) -> bool:
        """Replace what a task shows and its priority; its annotations stay. Safe to repeat.

        Args:
            task_id: of a task that was imported earlier.
            document: as for `import_tasks`.
        Returns:
            False if the task is gone.
        Raises:
            LabelStudioError: it was refused, or the response was lost.
        """
        action = f"refresh task {task_id}"
        try:
            self.request(
                "PATCH", f"api/tasks/{task_id}/", action, body={"data": document["data"], "meta": document["meta"]}
            )
        except UnknownIdError:
            return False
        # The order of a project follows the score of a prediction, which is a row of its own beside the task.
        wanted = document["predictions"][0]
        found = self.request("GET", "api/predictions/", action, params={"task": task_id})
        with self.translated_errors(action):
            numbers = [int(one["id"]) for one in found if one["model_version"] == wanted["model_version"]]
        for number in numbers:
            self.request("PATCH", f"api/predictions/{number}/", action, body={"score": wanted["score"]})
        return True

    def change_data(self, task_id: int, changes: Mapping[str, Any]) -> None:
        """Change some of what a task shows; it is no error if the task is gone. Safe to repeat."""
        action, path = f"change task {task_id}", f"api/tasks/{task_id}/"
        try:
            found = self.request("GET", path, action)
            with self.translated_errors(action):
                data = {**found["data"], **{key: value for key, value in changes.items() if key in found["data"]}}
            self.request("PATCH", path, action, body={"data": data})
        except UnknownIdError:
            return

    def delete_task(self, task_id: int) -> None:
        """Delete a task; it is no error if the task is gone already."""
        try:
            self.request("DELETE", f"api/tasks/{task_id}", f"delete task {task_id}")
        except UnknownIdError:
            return

    def create_annotation(
        self, task_id: int, result: Sequence[Mapping[str, Any]], *, key: UUID, completed_by: int | None = None
    ) -> int | None:
        """Annotate a task.

        Args:
            task_id: of an existing task.
            result: one region per control.
            key: idempotency key; Label Studio refuses a second annotation with the same key.
            completed_by: user id of the annotator; default: the owner of the token.
        Returns:
            The annotation's id, or None if one with this key exists.
        Raises:
            UnknownIdError: the task is gone.
            LabelStudioError: it was refused, or the response was lost.
        """
        body: dict[str, Any] = {"result": list(result), "unique_id": str(key)}
        if completed_by is not None:
            body["completed_by"] = completed_by
        action = f"annotate task {task_id}"
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

    def transport(self) -> tuple[httpx.Client, dict[str, str]]:
        """Return the connection and the headers with the token, for files, which are not a part of the API."""
        with self.translated_errors("renew the token"):
            return self._http, self._sdk._client_wrapper.get_headers()

    def _ensure_view(self, project_id: int) -> None:
        # Without a view of its own a project lists its tasks by id, and annotators start with the first one listed.
        if self.request("GET", "api/dm/views/", "list views", params={"project": project_id}):
            return
        self.request(
            "POST", "api/dm/views/", "make a view", body={"project": project_id, "data": LIST_VIEW}, repeat=False
        )

    def _readable_tasks(
        self, project_id: int, items: Sequence[Mapping[str, Any]], page_size: int, with_data: bool
    ) -> list[TaskRow]:
        """Return a page of tasks with annotations, after Label Studio failed to list it as a whole."""

        def read(some: Sequence[TaskRow]) -> list[TaskRow]:
            among = filter_by("id", "in", "Number", {"min": some[0].id, "max": some[-1].id})
            query = _by_id([*items, among])
            return self._tasks(project_id, query, len(some), with_annotations=True, with_data=with_data, repeat=False)[
                0
            ]

        found: list[TaskRow] = []
        bare, _, _ = self._tasks(project_id, _by_id(items), page_size)
        for part in in_parts(bare, read, (LabelStudioRefusedError,)):
            if isinstance(part.result, Exception):
                found.append(replace(part.members[0], fault=str(part.result)))
            else:
                found.extend(part.result)
        return found

    def _tasks(
        self,
        project_id: int,
        query: Mapping[str, Any],
        page_size: int,
        *,
        with_annotations: bool = False,
        with_data: bool = False,
        repeat: bool = True,
    ) -> tuple[list[TaskRow], int, int]:
        """Return a page of tasks, the number of tasks that match, and the number of their annotations."""
        # One list for the fields of tasks and of annotations: the server applies it to both. `data` is left out
        # since it holds the embedded images.
        include = "id,meta,updated_at"
        if with_annotations:
            include += ",annotations,result,completed_by,was_cancelled,lead_time"
        if with_data:
            include += ",data,total_predictions"
        params = {
            "project": project_id,
            "fields": "all" if with_annotations else "task_only",
            "include": include,
            "query": json.dumps(query),
            "page_size": page_size,
        }
        action = f"list the tasks of project {project_id}"
        found = self.request("GET", "api/tasks/", action, params=params, repeat=repeat)
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
        """Send a request to a route that has no method here.

        Args:
            method: GET, POST, PATCH or DELETE.
            path: relative to the server's URL.
            action: what is tried, in words, for the error message.
            params: the query string.
            body: sent as JSON.
            repeat: whether the request is safe to repeat after a failure.
        Returns:
            The parsed response; None if it is empty.
        Raises:
            LabelStudioError: Label Studio cannot be reached, or refuses.
        """
        with self.translated_errors(action):
            # Connection errors and overload pass; any other refusal would come again, so it is raised at once. The
            # request after the loop is the last attempt, whose error reaches the caller.
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
        # The SDK's transport adds and renews the token. Its pydantic models are passed by: parsing them halves the
        # rate at which tasks are listed.
        transport = self._sdk._client_wrapper.httpx_client
        response = transport.request(path, method=method, params=params, json=body, request_options=_ONCE)
        if response.is_error:
            raise ApiError(status_code=response.status_code, body=_body(response))
        return response.json() if response.content else None

    @contextmanager
    def translated_errors(self, action: str) -> Generator[None]:
        """Raise every failure of the block, a request and the reading of its response, as one sentence.

        Args:
            action: what is tried, in words.
        Yields:
            Nothing.
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
                f"the server at {self.url}, asked to {action}, is not a Label Studio that Relook knows"
            ) from error


def _by_id(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"ordering": ["tasks:id"], "filters": {"conjunction": "and", "items": list(items)}}


def _body(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return response.text
