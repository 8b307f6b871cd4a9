"""What `relook data` shows people: the report of an import and of an audit as tables."""

from typing import TYPE_CHECKING

from rich.console import Group as Stack
from rich.table import Table

from records.command import stderr

if TYPE_CHECKING:
    from trainers.data.audit import AuditReport
    from trainers.data.importer import ImportReport

_SHOWN_REFUSALS = 20


def print_refusals(report: "ImportReport") -> None:
    for refused in report.quarantined[:_SHOWN_REFUSALS]:
        stderr.print(f"not used ({refused.code}): {refused.reason}", highlight=False, markup=False)
    if len(report.quarantined) > _SHOWN_REFUSALS:
        stderr.print(f"... and {len(report.quarantined) - _SHOWN_REFUSALS} more; --json lists them all")
    for note in report.notes:
        stderr.print(f"note: {note}", highlight=False, markup=False)


def import_table(report: "ImportReport") -> Table:
    table = Table(show_header=False, title=f"import {report.import_id}")
    table.add_row("pictures", f"{report.images} ({report.new_images} new, {report.decoded} decoded)")
    table.add_row("lesions", str(report.lesions))
    table.add_row("classes", ", ".join(f"{code} {count}" for code, count in report.classes.items()))
    table.add_row("sides", ", ".join(f"{side} {count}" for side, count in report.sides.items()))
    table.add_row("not used", str(len(report.quarantined)))
    table.add_row("same picture twice", str(len(report.same_bytes)))
    apart = sum(not pair.same_diagnosis for pair in report.near_duplicates)
    table.add_row("near-duplicate pairs", f"{len(report.near_duplicates)} ({apart} of two diagnoses, not joined)")
    table.add_row("dataset", report.dataset_id[:12])
    table.add_row("seconds", f"{report.seconds:.1f}")
    return table


def audit_tables(report: "AuditReport") -> Stack:
    sides = Table("side", "pictures", "lesions", title=f"dataset {report.dataset_id[:12]}")
    for side, count in report.sides.items():
        sides.add_row(side, str(count), str(report.side_lesions[side]))
    sides.add_row("all", str(report.images), str(report.lesions), style="bold")
    classes = Table("class", "pictures", "share")
    for code, count in report.classes.items():
        classes.add_row(code, str(count), f"{count / max(1, report.images):.1%}")
    random = report.random_split
    return Stack(
        sides,
        classes,
        f"lesions on two sides: {report.leaked_lesions}",
        f"near-duplicate pairs: {report.near_duplicate_pairs}, label conflicts: {report.label_conflicts}, "
        f"rows not used: {report.quarantined}",
        f"a random split of the pictures would have put {random.leaked_lesions} lesions on two sides; "
        f"{random.leaked_test_share:.1%} of its test pictures would show a lesion that was trained on",
    )
