"""What `relook data` shows people: the report of an import and of an audit as tables."""

from typing import TYPE_CHECKING

from rich.console import Group as Stack
from rich.table import Table

from records.command import stderr

if TYPE_CHECKING:
    from images.audit import AuditReport
    from images.importer import ImportReport
    from trainers.fitting.pretend import PretendReport

_SHOWN_REFUSALS = 20


def print_refusals(report: "ImportReport") -> None:
    """Say on stderr what an import could not use, and what it left out."""
    for refused in report.quarantined[:_SHOWN_REFUSALS]:
        stderr.print(f"not used ({refused.code}): {refused.reason}", highlight=False, markup=False)
    if len(report.quarantined) > _SHOWN_REFUSALS:
        stderr.print(f"... and {len(report.quarantined) - _SHOWN_REFUSALS} more; --json lists them all")
    for note in report.notes:
        stderr.print(f"note: {note}", highlight=False, markup=False)


def import_table(report: "ImportReport") -> Table:
    """Return what an import did, for people."""
    table = Table(show_header=False, title=f"import {report.import_id}")
    table.add_row("images", f"{report.images} ({report.new_images} new, {report.decoded} decoded)")
    table.add_row("lesions", str(report.lesions))
    table.add_row("classes", ", ".join(f"{code} {count}" for code, count in report.classes.items()))
    table.add_row("splits", ", ".join(f"{split} {count}" for split, count in report.splits.items()))
    table.add_row("not used", str(len(report.quarantined)))
    table.add_row("same image twice", str(len(report.same_bytes)))
    apart = sum(not pair.same_diagnosis for pair in report.near_duplicates)
    table.add_row("near-duplicate pairs", f"{len(report.near_duplicates)} ({apart} of two diagnoses, not joined)")
    table.add_row("dataset", report.dataset_id[:12])
    table.add_row("seconds", f"{report.seconds:.1f}")
    return table


def audit_tables(report: "AuditReport") -> Stack:
    """Return what an audit found, for people."""
    splits = Table("split", "images", "lesions", title=f"dataset {report.dataset_id[:12]}")
    for split, count in report.splits.items():
        splits.add_row(split, str(count), str(report.split_lesions[split]))
    splits.add_row("all", str(report.images), str(report.lesions), style="bold")
    classes = Table("class", "images", "share")
    for code, count in report.classes.items():
        classes.add_row(code, str(count), f"{count / max(1, report.images):.1%}")
    random = report.random_split
    return Stack(
        splits,
        classes,
        f"lesions on two splits: {report.leaked_lesions}",
        f"near-duplicate pairs: {report.near_duplicate_pairs}, label conflicts: {report.label_conflicts}, "
        f"rows not used: {report.quarantined}",
        f"images taken unlike the rest: {len(report.quality_outliers)}{_worst(report)}",
        f"a random split of the images would have put {random.leaked_lesions} lesions on two splits; "
        f"{random.leaked_test_share:.1%} of its test images would show a lesion that was trained on",
    )


def pretend_table(report: "PretendReport") -> Table:
    """Return what each split makes of the same model.

    Args:
        report: of the demonstration.
    Returns:
        A table, honest split first.
    """
    title = f"{report.model} at {report.side_px} px, {report.epochs} epochs: what a split pretends (balanced accuracy)"
    table = Table("split", "test images whose lesion is trained on", "pretended", "honest", "gap", title=title)
    for split in report.splits:
        pretended, honest = split.pretended.balanced_accuracy, split.honest.balanced_accuracy
        table.add_row(
            split.name, f"{split.leaked_test_share:.1%}", f"{pretended:.3f}", f"{honest:.3f}", f"{split.gap:+.3f}"
        )
    return table


def _worst(report: "AuditReport") -> str:
    if not report.quality_outliers:
        return ""
    shown = [f"{o.image} {o.what}" for o in report.quality_outliers[:3]]
    return f" ({', '.join(shown)}{', ...' if len(report.quality_outliers) > 3 else ''})"
