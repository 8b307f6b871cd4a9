"""The verbs `relook hooks list` and `relook hooks test`; hooks themselves are set in the settings."""

from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.table import Table

from records.command import Call, verb
from records.errors import UnknownIdError

if TYPE_CHECKING:
    from serving.settings import ServingSettings

hooks_app = typer.Typer(help="Signed requests that tell other programs about events.", no_args_is_help=True)


@verb(hooks_app, "list")
def list_hooks(call: Call) -> None:
    """List the hooks of the settings: where they lead, and whether they are delivered."""
    from records.keys import key_file
    from serving.hooks.delivery import state_of

    settings: ServingSettings = call.compose().serving
    listed: list[dict[str, Any]] = []
    table = Table("name", "address", "organisation", "state", "secret")
    with call.store() as store:
        for hook in settings.hooks:
            state = state_of(store, hook)
            parts = urlsplit(hook.url)
            # Without its query, which may hold a token.
            address = f"{parts.scheme}://{parts.netloc}{parts.path}"
            secret = str(hook.secret_file or key_file(store.home, f"hook-{hook.name}"))
            said = (
                f"{state.failures} failed: {state.error}" if state.failures else "delivered" if state.after else "new"
            )
            table.add_row(hook.name, address, hook.organisation, said, secret)
            body = {"name": hook.name, "address": address, "organisation": hook.organisation, "secret_file": secret}
            listed.append({**body, **state.position(), "dead": state.is_dead})
    call.emit({"hooks": listed}, table if listed else "there is no hook; the setting serving.hooks adds one")


@verb(hooks_app, "test")
def test_hook(call: Call, name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the hook.")]) -> None:
    """Send a signed event of the kind `test` to a hook, once."""
    from serving.hooks.delivery import send_test

    settings: ServingSettings = call.compose().serving
    hook = next((hook for hook in settings.hooks if hook.name == name), None)
    if hook is None:
        raise UnknownIdError(f"no hook is called {name!r}; `relook hooks list` lists them")
    with call.store() as store:
        event_id = send_test(store.home, hook)
    call.emit({"hook": name, "event_id": event_id}, f"hook {name} accepted the event {event_id}")
