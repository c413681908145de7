"""What a search leaves: the table of its front, the winner as a decoder file, and which decoder to take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from unmask.decoding import Decoder
from unmask.io.files import as_yaml, write_text, writing_to
from unmask.io.terminal import console, fitting_table
from unmask.results.tables import Table, percent, points

Result = dict[str, Any]
HEADINGS = ["decoder", "plan", "NFE", "solved % [95 %]", "score % [95 %]", "problems", "what it is"]


def report(result: Result, output: Path) -> None:
    """Write ``front.md`` and ``decoder.yaml``; print the table, the advice and where the files are."""
    settings, body, said = result["config"], rows(result), "\n".join(advice(result)) + "\n"
    task, budget = next(iter(settings["tasks"])), settings["budget"]
    title = f"{settings['model']['name']}, {task}: decoders within {budget} passes a problem, validation split"
    with writing_to(output):
        write_text(output / "front.md", f"{title}\n\n{Table(HEADINGS, body).markdown()}\n{said}")
        write_text(output / "decoder.yaml", decoder_file(result))
    screen, lines = console(), (len(result["front"]) - 1, len(body) - len(result["run_off"]) - 1)
    screen.print(fitting_table(screen, title, HEADINGS, body, 1, ["problems", "score % [95 %]"], lines))
    print(f"{said}front    {output / 'front.md'}\ndecoder  {output / 'decoder.yaml'}")


def rows(result: Result) -> list[list[str]]:
    """The front by passes, the presets that are not on it with the problems that each came to, and the run-off."""
    found = {entry["decoder"]: entry for entry in result["candidates"]}
    presets = [entry for entry in found.values() if entry["preset"] and entry["decoder"] not in result["front"]]
    presets.sort(key=lambda e: (-e["problems"], e["nfe"]))
    decided = sorted(result["run_off"], key=lambda e: -e[result["config"]["metric"]])

    def row(entry: Result, *titles: str) -> list[str]:
        what = [title.replace("_", " ") for title in titles if entry["decoder"] == result[title]["decoder"]]
        what = what or ["preset"] * entry["preset"]
        what += ["over the budget"] * (entry["nfe"] > result["config"]["budget"])
        shares = [percent(entry[key], entry[f"{key}_interval"]) for key in ("solved", "score")]
        return [
            *(entry["decoder"], str(entry["plan"]), f"{entry['nfe']:.1f}"),
            *(*shares, str(entry["problems"]), ", ".join(what)),
        ]

    first = [row(entry) for entry in (*(found[name] for name in result["front"]), *presets)]
    return first + [row(entry, "winner", "best_preset") for entry in decided]


def advice(result: Result) -> list[str]:
    """What was done, what came out on unseen problems, and which decoder to take."""
    metric, test, passes = result["config"]["metric"], result["test"], result["forward_passes"]
    winner, preset, budget = test["winner"], test["best_preset"], result["config"]["budget"]

    def said(entry: Result) -> str:
        return f"{metric} {percent(entry[metric], entry[f'{metric}_interval'])} %, {entry['nfe']:.1f} passes a problem"

    lines = [
        f"{len(result['candidates'])} decoders, rounds of {', '.join(map(str, result['rounds']))} validation problems, "
        f"a run-off of {len(result['run_off'])} on {result['winner']['problems']}: "
        f"{passes['validation']:,} forward passes, and {passes['test']:,} on test.",
        f"winner {winner['decoder']} on {winner['problems']} unseen test problems: {said(winner)}.",
    ]
    if winner["decoder"] == preset["decoder"]:
        taken, why = winner, "No candidate was better than this preset on validation."
    else:
        low, high = test["difference_interval"]
        lines.append(f"best preset {preset['decoder']} on the same: {said(preset)}.")
        lines.append(f"winner - best preset, paired: {points(test['difference'], (low, high))} points.")
        taken = winner if test["difference"] > 0 else preset
        chance = low <= 0 <= high
        why = f"The {'winner' if taken is winner else 'preset'} is {'not clearly ' * chance}better on unseen problems."
    lines.append(f"{why} Take {taken['decoder']}.")
    if taken["nfe"] > budget:
        lines.append(f"On test it takes {taken['nfe']:g} passes a problem, more than the budget of {budget}.")
    return lines


def decoder_file(result: Result) -> str:
    """The winner's fields, where they are not the defaults, under a comment of what it was chosen for."""
    settings, test = result["config"], result["test"]["winner"]
    metric, model, defaults = settings["metric"], settings["model"], Decoder().config()
    facts = {
        "task": next(iter(settings["tasks"])),
        "model": f"{model['name']}, weights {model['weights']}",
        "budget": f"{settings['budget']} forward passes a problem; the plan has {test['plan']}",
        "test": f"{metric} {percent(test[metric], test[f'{metric}_interval'])} % of {test['problems']} unseen problems, "
        f"{test['nfe']:.1f} passes each",
    }
    decoder = settings["decoders"][result["winner"]["decoder"]]
    chosen = {k: v for k, v in decoder.items() if k in ("name", "max_new_tokens") or v != defaults[k]}
    comment = "".join(
        f"# {key}: {json.dumps(value)[1:-1]}\n" for key, value in facts.items()
    )  # names may hold anything
    return comment + as_yaml(chosen)
