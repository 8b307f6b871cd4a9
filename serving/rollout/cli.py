"""The verbs `relook rollout` and `relook rollback`; a running service follows within a second.

relook rollout MODEL --percent 10
relook rollback --reason "too many complaints"
"""

from contextlib import closing
from typing import Annotated

import typer

from records.command import ConfigOption, JsonOption, PresetOption, SetOption, emit, settings_of
from records.errors import ConfigError

app = typer.Typer()


@app.command()
def rollout(
    ctx: typer.Context,
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Without it: show the one under way.")] = None,
    percent: Annotated[
        int, typer.Option("--percent", min=0, max=100, help="Share of lesions; 0 mirrors, 100 promotes.")
    ] = 0,
    reason: Annotated[
        str | None, typer.Option("--reason", help="Why a model that the gate has not passed is tried.")
    ] = None,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Try a candidate beside the model that answers: in shadow, for a share, then for all."""
    from records.models import find_bundle
    from records.store import open_store
    from serving.answers import rollout_body
    from serving.rollout.control import begin, current_rollout, promote

    with closing(open_store(settings_of(ctx, config, preset, sets).records)) as store:
        if model is None:
            with store.ledger.read() as tx:
                running = current_rollout(tx)
            if running is None:
                raise ConfigError("no rollout is under way; `relook rollout MODEL` begins one")
        else:
            bundle = find_bundle(store, model)
            running = begin(store, bundle.id, min(percent, 99), actor="relook rollout", reason=reason)
            if percent == 100:
                running = promote(store, actor="relook rollout")
        body = rollout_body(running)
    seen = ", ".join(f"{h.name} {h.seen} of {h.looked}" for h in body.harms)
    emit(as_json, body, f"model {body.candidate_id[:12]} is in {body.stage} ({body.percent} %); seen: {seen}")


@app.command()
def rollback(
    ctx: typer.Context,
    reason: Annotated[str, typer.Option("--reason", help="Why; it is kept.")] = "taken back by hand",
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take the candidate under way back, or undo the last promotion."""
    from records.store import open_store
    from serving.answers import rollout_body
    from serving.rollout.control import roll_back

    with closing(open_store(settings_of(ctx, config, preset, sets).records)) as store:
        body = rollout_body(roll_back(store, actor="relook rollback", why=reason))
    emit(as_json, body, f"model {body.candidate_id[:12]} was rolled back: {body.why}")
