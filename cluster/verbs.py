"""Verbs that need several rooms: demo, rounds, promotion, deletion, monitoring, some of `relook label` and `models`.

Everything that they compute with is imported inside them, so that `relook --help` stays fast.
"""

import os
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from labeling.cli import label_app
from records.command import Call, advises_resume, until_stopped, verb
from records.errors import ConfigError, IntegrityError
from records.progress import duration, progress, say
from serving.cli import models_app

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from rich.progress import Progress, TaskID

    from cluster.round import RoundEvent
    from records.store import Store

app = typer.Typer()

DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Folder that `relook data import` reads; default: generated images."),
]
ModelOption = Annotated[str, typer.Option("--model", help="Id prefix, bundle path, champion or candidate.")]


@verb(app, "demo", preset="demo")
def demo(
    call: Call,
    data: DataOption = None,
    columns: Annotated[
        str | None, typer.Option("--columns", help="Columns of the table in --data: image=..,dx=..,lesion=..")
    ] = None,
    annotator: Annotated[
        Literal["simulated", "human"], typer.Option("--annotator", help="Who annotates in Label Studio.")
    ] = "simulated",
    reopen: Annotated[bool, typer.Option("--reopen", help="Start the servers of a finished demo again.")] = False,
) -> None:
    """Run the whole loop once: search, train, serve, review, annotate, retrain, swap."""
    from cluster.demo.command import reopen_demo, run_demo
    from images.pairs import parse_columns

    if reopen:
        reopen_demo(call.settings, as_json=call.as_json)
    else:
        named = parse_columns(columns)
        run_demo(call.settings, data=data, columns=named, annotator=annotator, as_json=call.as_json)


@verb(app, "promote")
def promote(
    call: Call,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Id prefix (8 characters) or bundle path.")],
    provisional: Annotated[
        bool, typer.Option("--provisional", help="Serve it without the gate; every response says so.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Overrule the gate; needs --reason and an admin's key in RELOOK_KEY.")
    ] = False,
    reason: Annotated[str, typer.Option("--reason", help="Reason for --force, for the audit log.")] = "",
) -> None:
    """Make a model the champion if the gate promotes it; a running service switches by itself."""
    from cluster.promotion import KEY_VARIABLE, caller_of, promote_model

    # Provisional serves without the gate's verdict, force against it: their audit records would contradict each other.
    if force and provisional:
        raise ConfigError("--force and --provisional exclude each other; give one of them")
    with call.store() as store:
        promoted = promote_model(
            store,
            call.settings,
            model,
            provisional=provisional,
            forced_because=reason if force else None,
            # The key comes from the environment: an option would show it to everyone who lists the processes.
            caller=caller_of(store, os.environ.get(KEY_VARIABLE)),
        )
    replaced = promoted["replaces"]
    undo = f"relook models undo-promotion {promoted['model_id'][:12]} --back-to {(replaced or '')[:12]}"
    told = f"model {promoted['model_id'][:12]} is {promoted['status']} and serves"
    call.emit(promoted, told + (f"; `{undo}` undoes it" if replaced not in (None, promoted["model_id"]) else ""))


@verb(models_app, "combine")
def combine_command(
    call: Call,
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Id prefix, bundle path, or champion; one or more.")
    ],
    weights: Annotated[
        str | None, typer.Option("--weights", help="Weight of each model's logits, as 1,0.5; default: equal.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Dataset id that calibrates it, or folder; default: the newest.")
    ] = None,
) -> None:
    """Make several models one: the weighted mean of their logits, calibrated anew; context, views and decision rule
    are the first model's unless `--set` says otherwise. One model alone gets these without being trained again.
    """
    from images.importer import open_dataset
    from records.models import find_bundle
    from trainers.fitting.combine import choices_of, combine_and_register, shares_of
    from trainers.fitting.run import REPORT

    shares = shares_of(weights, len(models))
    with call.store() as store, progress() as bar:
        bundles = [find_bundle(store, name) for name in models]
        settings = call.compose(before=choices_of(bundles[0])).trainers
        dataset = open_dataset(store, data, progress=bar)
        bundle = combine_and_register(store, bundles, shares, dataset, settings, bar)
    (split, figures), members = bundle.document.measured, bundle.document.members
    body = {
        "model_id": bundle.id, "path": str(bundle.path), "report": str(bundle.path / REPORT), "dataset_id": dataset.id,
        "members": {member.model_id: member.weight for member in members}, **bundle.document.metrics,
    }  # fmt: skip
    listed = ", ".join(f"{member.model_id[:12]} x {member.weight:.3g}" for member in members)
    call.emit(
        body,
        f"model {bundle.id[:12]} is the mean of {listed}; {split} balanced accuracy "
        f"{figures['balanced_accuracy']:.3f}, calibration error {figures['ece']:.3f}; "
        f"`relook evaluate {bundle.id[:12]} --split test` measures it",
    )


@verb(models_app, "undo-promotion")
def undo_promotion_command(
    call: Call,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model that serves: id prefix (8 characters).")],
    back_to: Annotated[str, typer.Option("--back-to", help="Model that it replaced: id prefix (8 characters).")],
    reason: Annotated[str, typer.Option("--reason", help="Reason, for the audit log.")] = "undone by hand",
) -> None:
    """Take a promoted model away: the one that it replaced serves again; nothing happens if another model serves."""
    from cluster.promotion import KEY_VARIABLE, caller_of, name_of, track_aliases
    from records.models import named_model
    from records.types import Scope
    from serving.responses import model_body
    from serving.rollout.control import undo_promotion

    with call.store() as store:
        caller = caller_of(store, os.environ.get(KEY_VARIABLE))
        if caller is not None:
            caller.require(Scope.ADMIN)
        taken, back = (named_model(store, name).id for name in (model, back_to))
        body = model_body(undo_promotion(store, taken, back, actor=name_of(caller), why=reason))
        track_aliases(store, call.settings, taken)
    call.emit(body, f"model {body.id[:12]} is {body.status} and serves again; model {taken[:12]} is refused")


@verb(app, "retention")
def retention_command(
    call: Call,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted; delete nothing.")] = False,
) -> None:
    """Delete served images and predictions that have expired and are not needed; each deletion is audited."""
    from cluster.deletion import retain, sentence
    from records.retention import find_due

    with call.store() as store, progress() as bar:
        if dry_run:
            found = find_due(store)
        else:
            # The call itself counts what is due, so the total is known only with its first report.
            task = bar.add_task("images and predictions", total=None)
            found = retain(store, call.settings, lambda done, total: bar.update(task, completed=done, total=total))
    call.emit({"dry_run": dry_run, **found.model_dump(mode="json")}, sentence(found, dry_run=dry_run))


@verb(app, "erase")
def erase_command(
    call: Call,
    images: Annotated[list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Full ids of images.")] = None,
    patient: Annotated[
        str | None, typer.Option("--patient", help="All images of this patient, named as in the import or request.")
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option("--name", help="Images imported under this name, and its quarantined rows; may be repeated."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the images; erase nothing.")] = False,
    list_erased: Annotated[
        bool, typer.Option("--list", help="Print the ids of all erased images, for `relook restore --erased`.")
    ] = False,
) -> None:
    """Erase images on a person's request: bytes, heat maps, personal data; each erasure is audited."""
    from cluster.deletion import erase, images_to_erase, models_trained_on
    from records.erasure import erased_ids

    if list_erased:
        with call.store() as store, store.ledger.read() as tx:
            gone = sorted(erased_ids(tx))
        call.emit({"images": gone}, "\n".join(gone))
        return
    # After an interruption the same call erases the rest.
    with call.store() as store, progress() as bar:
        wanted = images_to_erase(store, images or (), patient, name or ())
        task = bar.add_task("images", total=len(wanted))
        models = models_trained_on(store, wanted)
        show = partial(bar.update, task)
        erased = None if dry_run else erase(store, call.settings, wanted, lambda n: show(completed=n), name or ())
    left = erased.left_in_place if erased is not None else []
    blobs = erased.blobs if erased is not None else 0
    said = [f"{len(wanted)} images {'would be erased' if dry_run else 'are erased'}"]
    said += wanted if dry_run else []
    said += [f"{path} was imported in place: delete it yourself" for path in left]
    said += [
        f"model {model[:12]} was trained on them and keeps what it learned; retrain to replace it" for model in models
    ]
    body = {"dry_run": dry_run, "images": wanted, "blobs": blobs, "left_in_place": left, "models": models}
    call.emit(body, "\n".join(said))


@verb(app, "consent")
def consent_command(
    call: Call,
    to: Annotated[
        Literal["training", "review", "none"],
        typer.Option("--to", help="The new, lower consent; none erases the images."),
    ],
    images: Annotated[list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Full ids of images.")] = None,
    patient: Annotated[
        str | None, typer.Option("--patient", help="All images of this patient, named as in the import or request.")
    ] = None,
) -> None:
    """Take consent back: no dataset version that is built or loaded from now on holds the images."""
    from cluster.deletion import images_to_erase, take_back_consent
    from records.types import Consent

    with call.store() as store:
        wanted = images_to_erase(store, images or (), patient)
        erased = take_back_consent(store, call.settings, wanted, Consent(to))
    left = erased.left_in_place if erased is not None else []
    said = [f"the consent of {len(wanted)} images is {to}" + (": they are erased" if erased is not None else "")]
    said += [f"{path} was imported in place: delete it yourself" for path in left]
    call.emit({"images": wanted, "consent": to, "left_in_place": left}, "\n".join(said))


@verb(app, "monitor")
def monitor_command(call: Call) -> None:
    """Estimate the quality of served predictions from the random audit sample."""
    from cluster.monitor import monitor, report

    with call.store() as store:
        found = monitor(store, call.settings.serving.audit_share)
    empty = "no image of the audit sample is annotated yet; `relook label sync` reads annotations"
    call.emit({"quality": [q.model_dump(mode="json") for q in found]}, report(found) if found else empty)


@verb(app, "round")
def round_command(
    call: Call,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the interrupted round.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Start a round whenever one is due, until Ctrl-C.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what a round would do and cost.")] = False,
    replay: Annotated[int | None, typer.Option("--replay", help="Run round N again and compare.")] = None,
) -> None:
    """Run a round: collect, version, tune, fit, evaluate, gate, roll out, select, push."""
    from cluster.promotion import KEY_VARIABLE, caller_of, name_of, require_key_to_start

    if resume + watch + dry_run + (replay is not None) > 1:
        raise ConfigError("--resume, --watch, --dry-run and --replay exclude one another; give one of them")
    with call.store() as store:
        person = name_of(caller_of(store, os.environ.get(KEY_VARIABLE)))
        if dry_run:
            _show_plan(call, store)
        elif replay is not None:
            _replay(call, store, replay)
        elif resume:
            _run(call, store, person, resume=True)
        else:
            # At once: a watcher takes a round that is refused for another watcher's, and polls again.
            require_key_to_start(call.settings, person)
            if watch:
                with until_stopped():
                    _watch(call, store, person)
            else:
                _run(call, store, person, resume=False)


@verb(app, "rounds")
def rounds(call: Call) -> None:
    """List the rounds and how they ended."""
    from records.types import RoundRecord

    with call.store() as store, store.ledger.read() as tx:
        found = tx.find(RoundRecord, order_by=("number",))
    table = Table("round", "began", "model", "dataset", "verdict", "because")
    for record in found:
        began = f"{record.started_at:%Y-%m-%d %H:%M}"
        model, dataset = (record.model_id or "")[:12], (record.dataset_id or "")[:12]
        table.add_row(str(record.number), began, model, dataset, record.verdict or "unfinished", record.why or "")
    call.emit({"rounds": [record.model_dump(mode="json") for record in found]}, table)


def _run(call: Call, store: "Store", person: str, *, resume: bool) -> None:
    from cluster.round import run_round

    with advises_resume(lambda: _is_unfinished(store)), call.ray(), show_round() as show:
        outcome = run_round(store, call.settings, resume=resume, started_by=person, on_event=show)
    call.emit({"round": outcome.record.number, "steps": outcome.results}, f"round {outcome.record.number} is done")


def _is_unfinished(store: "Store") -> bool:
    from records.types import RoundRecord

    with store.ledger.read() as tx:
        return tx.count(RoundRecord, where={"finished_at": None}) > 0


def _watch(call: Call, store: "Store", person: str) -> None:
    from cluster.schedule import watch

    with call.ray(), show_round() as show:
        ran = watch(store, call.settings, started_by=person, on_event=show, tell=say)
    call.emit({"rounds": ran}, f"{ran} rounds ran here")


def _show_plan(call: Call, store: "Store") -> None:
    from cluster.schedule import plan_round

    plan = plan_round(store, call.settings)
    table = Table.grid(padding=(0, 2))
    table.add_row("round", f"{plan.round}" + (" (resumed)" if plan.resumes else ""))
    for step in plan.steps:
        table.add_row("", step)
    took = f"about {plan.expected_s:.0f} s, as earlier rounds" if plan.expected_s is not None else "not known yet"
    table.add_row("time", took)
    call.emit(plan, table)


def _replay(call: Call, store: "Store", number: int) -> None:
    from cluster.replay import replay_round

    with call.ray():
        found = replay_round(store, number)
    # The most frequent cause goes into the message: another version of a package rounds differently.
    if not found.within_tolerance:
        packages = f"; packages differ: {', '.join(found.other_packages)}" if found.other_packages else ""
        raise IntegrityError(f"round {number} came out differently: {found.differences}{packages}")
    call.emit(found, f"round {number} came out the same" + ("" if found.same_model else " within its tolerance"))


@contextmanager
def show_round() -> "Generator[Callable[[RoundEvent], None]]":
    """Show a round on stderr while the block runs; yields what `run_round` calls with its events."""
    with progress() as bar:
        yield _RoundDisplay(bar)


class _RoundDisplay:
    """Shows a round: a task for the step that runs, and a line for each step that is done.

    Args:
        bar: where to show it.
    """

    def __init__(self, bar: "Progress") -> None:
        self._bar = bar
        self._task: TaskID | None = None
        self._began_s = time.monotonic()

    def __call__(self, event: "RoundEvent") -> None:
        if event.state == "started":
            self._end_task()  # of a step that failed: with --watch the next round shares this display
            self._began_s = time.monotonic()
            self._task = self._bar.add_task(f"round {event.round_number}: {event.step}", total=None)
        elif event.state == "progress" and self._task is not None:
            if event.text == "step":
                self._bar.update(self._task, within=event.payload)
            elif detail := _detail(event):
                self._bar.update(self._task, within="", detail=detail)
        elif event.state == "done":
            # The task first: its bar would stay below the line that says that the step is done.
            self._end_task()
            say(f"✓ {event.step}: {event.text} ({duration(time.monotonic() - self._began_s)})")
        elif event.state == "kept":
            say(f"✓ {event.text}")

    def _end_task(self) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None


def _detail(event: "RoundEvent") -> str | None:
    """Return what an epoch of the fit, or a trial that ended, has to tell; None for anything else."""
    from trainers.fitting.epoch_report import EpochReport, epoch_text
    from tuning.live import line_of
    from tuning.trials import SearchEvent

    # A step passes on what its engine reports; epochs of trials would be too many lines, so trials count when they end.
    if isinstance(event.payload, EpochReport):
        return f"epoch {event.payload.epoch}, {epoch_text(event.payload)}"
    return line_of(event.payload) if isinstance(event.payload, SearchEvent) else None


def _rules() -> list[str]:
    from labeling.acquisition.registry import acquisition_catalogue

    return [row["name"] for row in acquisition_catalogue()]


@verb(label_app, "select")
def select_command(
    call: Call,
    budget: Annotated[int, typer.Option("--budget", min=1, help="How many images at most.")] = 40,
    rule: Annotated[
        str | None,
        typer.Option("--rule", help="Acquisition rule: {choices}; default: a mix.", autocompletion=_rules),
    ] = None,
    mix: Annotated[
        list[str] | None, typer.Option("--mix", help="RULE=N instead of --rule and --budget; may be repeated.")
    ] = None,
    pool: Annotated[
        Path | None, typer.Option("--pool", help="Folder of unlabelled images; default: those in the store.")
    ] = None,
    model: ModelOption = "champion",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of rules that draw at random.")] = 0,
) -> None:
    """Select images for annotators, at most one per lesion; `relook label push` sends them."""
    from dataclasses import asdict

    from cluster.selection import select_from
    from records.models import find_bundle

    parts = dict(_part(text) for text in mix or [])
    with call.store() as store:
        bundle = find_bundle(store, model)
        at = call.settings.labeling.prevalence
        found = select_from(store, bundle, budget=budget, rule=rule, mix=parts, folder=pool, seed=seed, prevalence=at)
    for sentence in found.refused:
        say(sentence)
    sentence = f"{found.selected} images, scored by model {found.model_id[:12]}, wait for `relook label push`"
    call.emit(asdict(found), sentence)


@verb(label_app, "second-opinions")
def second_opinions_command(
    call: Call,
    budget: Annotated[int, typer.Option("--budget", min=1, help="How many review items at most.")] = 40,
    model: ModelOption = "champion",
) -> None:
    """Find training labels that are probably wrong and open review items; `relook label push` sends them."""
    from cluster.selection import request_second_opinions
    from records.models import find_bundle

    with call.store() as store:
        bundle = find_bundle(store, model)
        suspicious, asked = request_second_opinions(store, bundle, bundle.document.dataset_id, budget)
    found = {"suspicious": suspicious, "asked": asked, "model_id": bundle.id}
    by = f"by model {bundle.id[:12]}"
    call.emit(
        found, f"{suspicious} training labels are suspicious {by}; {asked} review items wait for `relook label push`"
    )


def _part(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not number.isdigit() or int(number) < 1:
        raise ConfigError(f"--mix {text!r} is not RULE=N; write for example margin=20")
    return name, int(number)
