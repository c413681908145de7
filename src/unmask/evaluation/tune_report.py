"""What a search leaves: the Pareto front as table and figure, the winner as a decoder file, and what to take."""

from __future__ import annotations

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from unmask.config import default_of
from unmask.decoding import Decoder
from unmask.evaluation.tune_config import TuneConfig
from unmask.evaluation.tune_space import unfit_presets
from unmask.io.files import as_yaml, write_text, writing_to
from unmask.io.terminal import console, fitting_table
from unmask.results.figures import accuracy
from unmask.results.style import save_figure
from unmask.results.tables import Table, percent, points

Result = dict[str, Any]
HEADINGS = ["decoder", "plan", "NFE", "solved % [95 %]", "score % [95 %]", "problems", "what it is"]


def write(result: Result, config: TuneConfig) -> list[Path]:
    """front.md, front.png, front.svg and decoder.yaml into the run folder."""
    output = Path(config.output)
    said = f"{title(result)}\n\n{Table(HEADINGS, rows(result)).markdown()}\n" + "".join(
        f"{line}\n" for line in sentences(result)
    )
    with writing_to(output):
        for name, text in (("front.md", said), ("decoder.yaml", decoder_file(result, config))):
            write_text(output / name, text)
        return [output / "front.md", *save_figure(front_figure(result), output / "front"), output / "decoder.yaml"]


def show(result: Result, written: list[Path]) -> None:
    """The table, the sentences and where the files are, on stdout."""
    screen, body = console(), rows(result)
    ends = (len(result["front"]) - 1, len(body) - len(result["run_off"]) - 1)
    screen.print(fitting_table(screen, title(result), HEADINGS, body, 1, ["problems", "score % [95 %]"], ends))
    for line in sentences(result):
        print(line)
    for path in written:
        if path.suffix != ".svg":
            print(f"{'decoder' if path.suffix == '.yaml' else 'front'}  {path}")


def title(result: Result) -> str:
    """One line over the table."""
    settings = result["config"]
    task = next(iter(settings["tasks"]))
    return (
        f"{settings['model']['name']}, {task}: decoders within {settings['budget']} passes a problem, validation split"
    )


def rows(result: Result) -> list[list[str]]:
    """The front by passes, the presets that are not on it with the problems that each came to, and the run-off."""
    found = {entry["decoder"]: entry for entry in result["candidates"]}
    presets = [entry for entry in found.values() if entry["preset"] and entry["decoder"] not in result["front"]]
    presets.sort(key=lambda e: (-e["problems"], e["nfe"]))
    decided = sorted(result["run_off"], key=lambda e: -e[result["config"]["metric"]])
    first = [_row(entry, result, []) for entry in (*(found[name] for name in result["front"]), *presets)]
    return first + [_row(entry, result, ["winner", "best_preset"]) for entry in decided]


def _row(entry: Result, result: Result, titles: list[str]) -> list[str]:
    what = [name.replace("_", " ") for name in titles if entry["decoder"] == result[name]["decoder"]]
    what = what or ["preset"] * entry["preset"]
    if entry["nfe"] > result["config"]["budget"]:
        what.append("over the budget")
    return [
        entry["decoder"],
        str(entry["plan"]),
        f"{entry['nfe']:.1f}",
        percent(entry["solved"], entry["solved_interval"]),
        percent(entry["score"], entry["score_interval"]),
        str(entry["problems"]),
        ", ".join(what),
    ]


def sentences(result: Result) -> list[str]:
    """What was done, what came out on unseen problems, and what to take."""
    metric, test, passes = result["config"]["metric"], result["test"], result["forward_passes"]
    winner, preset, budget = test["winner"], test["best_preset"], result["config"]["budget"]

    def said(entry: Result) -> str:
        share = percent(entry[metric], entry[f"{metric}_interval"])
        return f"{metric} {share} %, {entry['nfe']:.1f} passes a problem (its plan: {entry['plan']})"

    lines = [
        f"{len(result['candidates'])} decoders, rounds of {', '.join(map(str, result['rounds']))} validation problems, "
        f"a run-off of {len(result['run_off'])} on {result['winner']['problems']}: "
        f"{passes['validation']:,} forward passes, and {passes['test']:,} on test.",
        *_unfit(result["config"]["max_new_tokens"]),
        f"winner of the run-off: {winner['decoder']}: {said(result['winner'])}. As the best of many this figure is too high.",
        f"winner on {winner['problems']} unseen test problems: {said(winner)}.",
    ]
    if winner["decoder"] != preset["decoder"]:
        difference = points(test["difference"], test["difference_interval"])
        lines.append(f"best preset on the same: {preset['decoder']}: {said(preset)}.")
        lines.append(f"winner - best preset, paired: {difference} points. {verdict(test, budget)}")
    else:
        taken = f"Take {winner['decoder']}.{_over(winner, preset, budget)}"
        lines.append(f"No candidate was better than this preset on validation. {taken}")
    return lines


def _unfit(length: int) -> list[str]:
    """Which presets could not be tried, as a sentence."""
    names = unfit_presets(length)
    return [f"Not tried, since their blocks do not divide {length} tokens: {', '.join(names)}."] if names else []


def verdict(test: Result, budget: int) -> str:
    """Which of the two to take, by their paired difference on unseen problems, and whether it keeps the budget there."""
    low, high = test["difference_interval"]
    winner, preset = test["winner"], test["best_preset"]
    if test["difference"] > 0:
        found = "The winner is better" if low > 0 else "The winner is ahead, but the interval holds 0: it may be chance"
        return f"{found}. Take {winner['decoder']}.{_over(winner, preset, budget)}"
    found = "The preset is better" if high < 0 else "What the search found does not show"
    return f"{found} on unseen problems. Take the preset {preset['decoder']}.{_over(preset, winner, budget)}"


def _over(taken: Result, other: Result, budget: int) -> str:
    """What to do where the decoder to take exceeds the budget on test; nothing where it does not."""
    if taken["nfe"] <= budget:
        return ""
    instead = f"take {other['decoder']}" if other["nfe"] <= budget else "search again with a lower one"
    return (
        f" On test {taken['decoder']} takes {taken['nfe']:g} passes a problem, more than the budget of {budget}: "
        f"where that matters, {instead}."
    )


def decoder_file(result: Result, config: TuneConfig) -> str:
    """The winner's fields, where they are not the defaults, under a comment of what it was chosen for."""
    decoder = Decoder(**result["config"]["decoders"][result["winner"]["decoder"]])
    chosen = {f.name: getattr(decoder, f.name) for f in fields(Decoder)}
    chosen = {k: v for k, v in chosen.items() if k in ("name", "max_new_tokens") or v != getattr(Decoder, k)}
    model, test, metric = result["config"]["model"], result["test"]["winner"], result["config"]["metric"]
    share = percent(test[metric], test[f"{metric}_interval"])
    facts = {
        "task": config.task,
        "model": f"{model['name']}, weights {model['weights']}",
        "budget": f"{config.budget} forward passes a problem; the plan has {test['plan']}",
        "test": f"{metric} {share} % of {test['problems']} unseen problems, {test['nfe']:.1f} passes each",
        "command": command_line(config),
    }
    lines = (f"# {key}: {value}" for key, value in facts.items())
    return "".join("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) + "\n" for line in lines) + as_yaml(
        chosen
    )


def command_line(config: TuneConfig) -> str:
    """The command that repeats a search."""
    words = ["unmask", "tune"]
    for f in fields(config):
        value, flag = getattr(config, f.name), f.name.replace("_", "-")
        if value == default_of(f):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def front_figure(result: Result) -> Figure:
    """Value against passes: who came to the last round, the front through them, and what two of them reach on test."""
    found = {entry["decoder"]: entry for entry in result["candidates"]}
    task = next(iter(result["config"]["tasks"]))
    cells = []
    for name in dict.fromkeys([*result["front"], *result["finalists"]]):
        other = "other presets" if found[name]["preset"] else "other finalists"
        cells.append({"task": task, "label": name if name in result["front"] else other, **found[name]})
    for side in ("winner", "best_preset") if result["winner"] != result["best_preset"] else ("winner",):
        entry = result["test"][side]
        cells.append({"task": task, "label": f"{side.replace('_', ' ')} on test", "aside": True, **entry})
    return accuracy(cells, result["config"]["metric"], result["config"]["budget"])
