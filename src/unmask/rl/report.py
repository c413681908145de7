"""``unmask report``: the curves of runs, one line a setting with a band over its seeds."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from unmask.config import read_config
from unmask.evaluation.report import COLOURS, save_figure
from unmask.files import read_lines, writing_to
from unmask.rl.run import RLConfig
from unmask.spec import UserError

Curve = dict[int, float]
PANELS = (
    ("reward", "mean reward of the rollouts"),
    ("length", "tokens before the first end token"),
    ("replay_gap", "replay gap (nats a token)"),
    ("entropy", "entropy of scored tokens (nats)"),
    ("groups_without_variance", "groups without variance"),
    ("kl", "KL to the starting policy (nats a token)"),
)
_SAME = ("seed", "output", "eval_every", "save_every", "report_to", "log_completions", "rows_per_forward")


def read_run(folder: Path) -> tuple[RLConfig, dict[str, Curve]]:
    """A run's configuration and its curves by name. Raises UserError where the folder holds no run."""
    if not (folder / "config.yaml").is_file() or not (folder / "metrics.jsonl").is_file():
        raise UserError(
            f"{folder} holds no reinforcement-learning run (config.yaml and metrics.jsonl): give a run folder"
        )
    config = read_config(RLConfig, folder / "config.yaml")
    curves: dict[str, Curve] = {}
    for entry in read_lines(folder / "metrics.jsonl"):
        for key, value in entry.items():
            if key != "step":
                curves.setdefault(key, {})[entry["step"]] = value
    if not curves:
        raise UserError(f"{folder / 'metrics.jsonl'} is empty: let the run make its first update")
    return config, curves


def _labels(configs: list[RLConfig]) -> list[str]:
    """What tells the runs apart: the fields that differ between them, the seed aside."""
    tables = [{k: v for k, v in asdict(c).items() if k not in _SAME} for c in configs]
    differing = [k for k in tables[0] if len({str(t[k]) for t in tables}) > 1] or ["objective", "decoder"]
    return [", ".join(" ".join(v) if isinstance(v := t[k], list) else f"{v}" for k in differing) for t in tables]


def smooth(curve: Curve, window: int) -> Curve:
    """Running mean over the last ``window`` entries."""
    steps = sorted(curve)
    values = [curve[s] for s in steps]
    return {s: sum(part := values[max(0, i + 1 - window) : i + 1]) / len(part) for i, s in enumerate(steps)}


def curves_figure(runs: list[tuple[RLConfig, dict[str, Curve]]]) -> Figure:
    """Reward, validation accuracy, length, replay gap and more over the updates; the mean over seeds and their range."""
    labels = _labels([config for config, _ in runs])
    names = list(dict.fromkeys(k for _, curves in runs for k in curves))
    panels = [
        (k, f"{k.removeprefix('eval_').removesuffix('_solved')}: validation solved")
        for k in names
        if k.endswith("_solved")
    ]
    panels += [(k, title) for k, title in PANELS if k in names]
    columns = 3
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(4.6 * columns, 3.1 * lines), squeeze=False)
    for axis, (key, title) in zip(axes.flat, panels, strict=False):
        for number, label in enumerate(dict.fromkeys(labels)):
            seeds = [
                curves[key] for (_, curves), own in zip(runs, labels, strict=True) if own == label and key in curves
            ]
            if not seeds:
                continue
            seeds = seeds if key.startswith("eval_") else [smooth(c, 10) for c in seeds]
            steps = sorted(set.intersection(*(set(c) for c in seeds)))
            values = [[c[s] for c in seeds] for s in steps]
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": ("-", "--", "-.", ":")[number % 4]}
            marker = "o" if key.startswith("eval_") else ""
            axis.plot(steps, [sum(v) / len(v) for v in values], label=label, marker=marker, markersize=4, **style)
            if len(seeds) > 1:
                axis.fill_between(
                    steps, list(map(min, values)), list(map(max, values)), alpha=0.2, color=style["color"]
                )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
        if key == "replay_gap":
            axis.set_yscale("symlog", linthresh=1e-6)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    handles = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=9, loc="lower center", ncol=4, frameon=False)
    figure.tight_layout(rect=(0, 0.4 / figure.get_figheight(), 1, 1))
    return figure


def markdown(runs: list[tuple[RLConfig, dict[str, Curve]]], folders: list[Path]) -> str:
    """First, best and last validation accuracy of every run."""
    lines = [
        "| run | objective | decoder | updates | validation | first | best (update) | last |",
        "|---|---|---|---:|---|---:|---:|---:|",
    ]
    for (config, curves), folder in zip(runs, folders, strict=True):
        updates = max(s for c in curves.values() for s in c)
        for key in (k for k in curves if k.endswith("_solved")):
            curve = curves[key]
            best = max(curve, key=lambda s: (curve[s], -s))
            cells: list[Any] = [
                folder.name,
                config.objective,
                config.decoder,
                updates,
                key.removeprefix("eval_").removesuffix("_solved"),
            ]
            cells += [
                f"{100 * curve[min(curve)]:.1f} %",
                f"{100 * curve[best]:.1f} % ({best})",
                f"{100 * curve[max(curve)]:.1f} %",
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def report(folders: list[Path], output: Path) -> tuple[str, list[Path]]:
    """Draw the runs' curves into ``output``; returns a table and the files written.

    Raises:
        UserError: for a folder without a run, or where ``output`` cannot be written.
    """
    runs = [read_run(folder) for folder in folders]
    with writing_to(output):
        output.mkdir(parents=True, exist_ok=True)
        return markdown(runs, folders), save_figure(curves_figure(runs), output / "curves")
