"""Print protocol 2's tables and draw its curves from the folders that `bench.label.acquisition_arms` wrote.

.venv/bin/python -m bench.label.acquisition_tables FOLDER [FOLDER ...] --plot docs/images/acquisition_2.png

The panels have one row per folder. An arm is compared on the seeds that it has; its p-value is adjusted for all arms
of the protocol, those that were not run included.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from bench.label import acquisition_arms as arms
from bench.label import acquisition_curves as curves
from records.errors import DataError

DRAWN = ("mix", "rare_margin", "badge", "margin", "mix+atlas")


def curves_in(work: Path) -> list[dict[str, Any]]:
    """Return the curves of a folder by seed; DataError if random has none."""
    found = [json.loads(path.read_text()) for path in sorted(work.glob("*-*.json"))]
    if not any(one["arm"] == "random" for one in found):
        raise DataError(f"{work} has no curve of random; run bench.label.acquisition_arms")
    return sorted(found, key=lambda one: int(one["seed"]))


def table(figures: dict[str, Any]) -> list[str]:
    """Return the lines of a Markdown table of all arms."""
    lines = [
        "| arm | seeds | labels to 95 % of full | never | ratio to random | Holm p | area - random | below random at "
        "| melanomas per 100, to 600 | to 1,600 | rarest per 100, to 600 | to 1,600 |",
        "|" + "---|" * 12,
    ]
    for name, one in figures["arms"].items():
        below = [str(step) for step, (_, _, high) in zip(arms.STEPS, one["gain_by_step"], strict=True) if high < 0]
        ratio, low, high = one["ratio"]
        rates = [one[f"{what}_per_100_to_{n}"] for what in ("melanomas", "rarest") for n in arms.COUNTED_UNTIL]
        adjusted = "" if one["holm_p"] is None else f"{one['holm_p']:.3f}"
        area, half = one["area_gain"][0], one["area_gain"][2] - one["area_gain"][0]
        cells = [f"`{name}`", str(one["seeds"]), f"{one['labels_mean']:,.0f}", str(one["not_reached"])]
        cells += [f"{ratio:.2f} ({low:.2f} to {high:.2f})", adjusted, f"{area:+.3f} ± {half:.3f}"]
        cells += [", ".join(below) or "no step", *(f"{mean:.1f} ± {high - mean:.1f}" for mean, _, high in rates)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(folders: list[Path], out: Path) -> None:
    """Draw the mean curve of some arms beside random's, with the band of the paired difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in DRAWN if all(name in arms.summarise(curves_in(folder))["arms"] for folder in folders)]
    size = (3.4 * len(names), 3.2 * len(folders))
    figure, rows = pyplot.subplots(
        len(folders), len(names), figsize=size, sharex=True, sharey="row", layout="constrained", squeeze=False
    )
    for row, folder in zip(rows, folders, strict=True):
        ones = {(one["arm"], one["seed"]): one for one in curves_in(folder)}
        for panel, name in zip(row, names, strict=True):
            seeds = [seed for arm, seed in ones if arm == name and ("random", seed) in ones]
            found, base = (np.array([ones[arm, s]["balanced_accuracy"] for s in seeds]) for arm in (name, "random"))
            target = 0.95 * np.mean([ones["random", seed]["full"] for seed in seeds])
            mean, half = found.mean(axis=0), curves.half_width(found - base)
            panel.plot(arms.STEPS, base.mean(axis=0), color="0.5", label="random")
            panel.plot(arms.STEPS, mean, color="tab:blue", label=name)
            panel.fill_between(arms.STEPS, mean - half, mean + half, color="tab:blue", alpha=0.2)
            panel.axhline(target, color="0.7", linestyle=":")
            panel.set_title(f"{folder.name}: {name}")
    figure.supxlabel("labels; grey: random; band: 95 % of the paired difference; dotted: 95 % of all labelled")
    figure.supylabel("held-out balanced accuracy")
    figure.savefig(out, dpi=80)


def main() -> None:
    """Print one table per folder and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    for folder in options.folders:
        figures = arms.summarise(curves_in(folder))
        digest = (folder / "features.sha256").read_text().strip()
        print(
            f"{folder.name}: {figures['seeds']} seeds, {figures['full']:.3f} with all labelled, rarest classes "
            f"{', '.join(figures['rarest'])}, features {digest[:16]}\n"
        )
        print("\n".join(table(figures)) + "\n")
    if options.plot:
        plot(options.folders, options.plot)


if __name__ == "__main__":
    main()
