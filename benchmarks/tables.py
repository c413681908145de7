"""What the benchmarks print: tables and a figure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.text import Text

from benchmarks.config import BenchDecode, BenchGap, BenchMemory, BenchRL
from benchmarks.decoding import bench_decode
from benchmarks.gap import bench_gap
from benchmarks.memory import bench_memory
from benchmarks.memory import table as memory_table
from benchmarks.update import bench_rl
from unmask.io.files import write_text
from unmask.io.terminal import console, fitting_table
from unmask.results.style import COLORS, MARKERS, save_figure
from unmask.results.tables import Table

Row = list[str]
_DROP_FIRST = ("% GEMM", "+GiB", "T", "trunk ms", "step ms", "passes")


def _run(config: Any, work: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    with console(stderr=True).status("") as status:
        return work(config, lambda what: status.update(Text(what)))


def _print(title: str, headings: Row, rows: list[Row], output: str) -> None:
    screen = console()
    screen.print(fitting_table(screen, title, headings, rows, drop_first=_DROP_FIRST))
    write_text(Path(output).with_suffix(".md"), Table(headings, rows).markdown())
    print(f"result  {output}")


def _range(found: dict[str, float], scale: float = 1.0, digits: int = 2) -> str:
    middle, low, high = (f"{scale * found[k]:.{digits}f}" for k in ("median", "low", "high"))
    return f"{middle} ({low}-{high})"


def decode_rows(result: dict[str, Any]) -> list[Row]:
    """One row a cell; ``-`` where something was not measured."""
    rows = []
    for cell in result["cells"]:
        timed = "step" in cell
        compared = "reference" in cell
        same = {True: "yes", False: "no", None: "-"}[cell.get("same_tokens")]
        if "ties" in cell:
            same += f", {cell['ties']} ties"
        rows.append(
            [
                f"{cell['model']} · {cell['decoder']}",
                f"{cell['temperature']:g}",
                str(cell["length"]),
                str(cell["passes"]),
                f"{1000 * cell['trunk']['median']:.0f}" if timed else "-",
                f"{1000 * cell['step']['median']:.0f}" if timed else "-",
                _range(cell["step_over_needed"]) if timed else "-",
                f"{cell['tokens_per_second']:.0f}",
                f"{cell['peak_gib'] - cell['before_gib']:.2f}",
                f"{100 * cell['of_gemm_peak']:.0f}" if timed else "-",
                _range(cell["reference_over_ours"]) if compared else "-",
                same,
            ]
        )
    return rows


DECODE_HEADINGS = [
    "decoder", "T", "L", "passes", "trunk ms", "step ms", "step / needed", "tokens/s", "+GiB", "% GEMM", "released / ours",
    "same",
]  # fmt: skip


def lengths_figure(result: dict[str, Any]) -> Figure:
    """Seconds a sequence against the canvas length, one panel a model and temperature, one line a decoder."""
    panels = list(dict.fromkeys((c["model"], c["temperature"]) for c in result["cells"]))
    decoders = list(dict.fromkeys(c["decoder"] for c in result["cells"]))
    figure = Figure(figsize=(5.2 * len(panels), 4.2))
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (model, temperature) in zip(axes[0], panels, strict=True):
        mine = [c for c in result["cells"] if (c["model"], c["temperature"]) == (model, temperature)]
        for i, decoder in enumerate(decoders):
            cells = [c for c in mine if c["decoder"] == decoder]
            axis.plot(
                [c["length"] for c in cells],
                [c["length"] / c["tokens_per_second"] for c in cells],
                marker=MARKERS[(i + i // len(COLORS)) % len(MARKERS)],
                color=COLORS[i % len(COLORS)],
                label=decoder,
            )
        timed = [c for c in mine if "trunk" in c]
        forward = {c["length"]: c["trunk"]["median"] / result["config"]["rows"] for c in timed}
        axis.plot(forward.keys(), forward.values(), "k:", label="one pass of the trunk")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("canvas length, tokens")
        axis.set_title(f"{model}, T = {temperature:g}")
        axis.grid(alpha=0.3, which="both")
        axis.xaxis.set_major_formatter(lambda v, _: f"{v:g}")
    axes[0][0].set_ylabel("seconds a sequence")
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    return figure


def decode(config: BenchDecode) -> None:
    """Measure, write and print."""
    result = _run(config, bench_decode)
    title = f"decoding {config.rows} rows, {config.dtype}; median (range) of {config.repeats}"
    _print(title, DECODE_HEADINGS, decode_rows(result), config.output)
    if len(config.length) > 1:
        for path in save_figure(lengths_figure(result), Path(config.output).with_suffix("")):
            print(f"figure  {path}")


def update_rows(result: dict[str, Any]) -> list[Row]:
    """One row a cell, those that were not run at the end."""
    rows = [
        [
            cell["way"],
            str(cell["steps"]),
            _range(cell["seconds"]),
            _range(cell["peak_gib"]),
            f"{cell['before_gib']['median']:.2f}",
            f"{100 * cell['of_gemm_peak']:.0f}",
        ]
        for cell in result["cells"]
    ]
    return rows + [[c["way"], str(c["steps"]), "not run", f"> {c['needs_gib']:.0f}", "", ""] for c in result["not_run"]]


UPDATE_HEADINGS = ["way", "S", "seconds", "peak GiB", "before", "% GEMM"]


def rl(config: BenchRL) -> None:
    """Measure, write and print."""
    result = _run(config, bench_rl)
    title = (
        f"one update, {config.rows} rows of {config.prompt} + {config.length} tokens, V = {config.vocabulary}; "
        f"median (range) of {config.repeats}"
    )
    _print(title, UPDATE_HEADINGS, update_rows(result), config.output)


def gap(config: BenchGap) -> None:
    """Measure, write and print."""
    result = _run(config, bench_gap)

    def shown(cell: dict[str, Any], key: str) -> str:
        return "{:.2g} [{:.2g}, {:.2g}]".format(cell[key], *cell[f"{key}_interval"])

    rows = [[c["task"], c["decoder"], c["objective"], shown(c, "gap"), shown(c, "text_gap")] for c in result["cells"]]
    title = f"log-prob mismatch, nats a token, {config.limit} completions, T = {config.temperature:g} [95 %]"
    headings = ["task", "decoder", "objective", "all tokens", "up to the first end token"]
    _print(title, headings, rows, config.output)


def memory(config: BenchMemory) -> None:
    """Measure, write and print."""
    result = _run(config, bench_memory)
    shape = f"{config.n_layers} layers of {config.d_model}, V = {config.vocabulary}"
    title = f"peak memory, {shape}, P = {config.prompt}, S = {config.steps}"
    _print(title, *memory_table(result), config.output)
