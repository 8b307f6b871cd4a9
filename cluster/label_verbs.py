"""Verbs of `relook label` that need a model beside the annotators: `select`, `second-opinions`."""

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from labeling.cli import label_app
from records.command import ConfigOption, JsonOption, PresetOption, SetOption, emit, settings_of, stderr
from records.errors import ConfigError


@label_app.command("select")
def select_command(
    ctx: typer.Context,
    budget: Annotated[int, typer.Option("--budget", min=1, help="How many images at most.")] = 40,
    rule: Annotated[str, typer.Option("--rule", help="See `relook catalog acquisition_rules`.")] = "least_confidence",
    mix: Annotated[
        list[str] | None, typer.Option("--mix", help="RULE=N instead of --rule, as often as there are parts.")
    ] = None,
    pool: Annotated[
        Path | None, typer.Option("--pool", help="Folder of unlabelled images; default: those in the store.")
    ] = None,
    model: Annotated[str, typer.Option("--model", help="Whose doubt counts.")] = "champion",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of rules with chance in them.")] = 0,
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Choose what annotators should see next; `relook label push` sends it. One image per lesion at most."""
    from cluster.pool import take_in_folder
    from cluster.selection import select_images
    from labeling.acquisition.registry import rule_named
    from records.models import find_bundle
    from records.store import open_store

    parts = dict(_part(text) for text in mix or [])
    for name in parts or [rule]:
        rule_named(name)
    with closing(open_store(settings_of(ctx, config, preset, sets).records)) as store:
        bundle = find_bundle(store, model)
        among, refused = None, list[str]()
        if pool is not None:
            among, refused = take_in_folder(store, pool, bundle.document.geometry.side_px)
        for sentence in refused:
            stderr.print(f"[yellow]{sentence}[/]")
        most = sum(parts.values()) if parts else budget
        chosen = select_images(store, bundle, most, rule, among=among, mix=parts or None, seed=seed)
    found = {
        "selected": chosen,
        "rule": rule if not parts else None,
        "mix": parts or None,
        "model_id": bundle.id,
        "pool": None if among is None else len(among),
        "refused": refused,
    }
    emit(as_json, found, f"{chosen} images wait for `relook label push`")


@label_app.command("second-opinions")
def second_opinions_command(
    ctx: typer.Context,
    budget: Annotated[int, typer.Option("--budget", min=1, help="How many questions at most.")] = 40,
    model: Annotated[str, typer.Option("--model", help="Whose features describe the images.")] = "champion",
    config: ConfigOption = None,
    preset: PresetOption = None,
    sets: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find training labels that are probably wrong and ask about them; `relook label push` sends them."""
    from cluster.second_opinions import ask_second_opinions
    from records.models import find_bundle
    from records.store import open_store

    with closing(open_store(settings_of(ctx, config, preset, sets).records)) as store:
        bundle = find_bundle(store, model)
        suspicious, asked = ask_second_opinions(store, bundle, bundle.document.dataset_id, budget)
    found = {"suspicious": suspicious, "asked": asked, "model_id": bundle.id}
    emit(as_json, found, f"{suspicious} training labels are suspicious; {asked} questions wait for `relook label push`")


def _part(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not number.isdigit() or int(number) < 1:
        raise ConfigError(f"--mix {text!r} is not RULE=N; write for example margin=20")
    return name, int(number)
