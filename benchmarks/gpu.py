"""``python -m benchmarks gpu``: what docs/performance.md lacks for want of a GPU, one command after the other, within a time.

Each is a process of its own. A page has their tables, in order, and says what failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.config import BenchGPU
from unmask.errors import UserError
from unmask.evaluation.evaluate import environment
from unmask.io.files import check_writable, write_text
from unmask.results.tables import Table

FULL = {
    "shape": "--d-model 4096 --n-layers 32 --n-heads 32 --mlp-hidden-size 12288",
    "half": "--dtype bfloat16",
    "bf16": "--bf16",
    "repeats": "3",
    "steps": "16",
    "lengths": "128 256",
    "many": "128",
    "few": "8 128",
    "memory": "",
    "checkpoint": "",
}
"""What the lines are filled in with, at LLaDA-8B's shape, and for a dry run."""
SMALL = "--vocabulary 256 --d-model 32 --n-layers 1 --n-heads 2 --mlp-hidden-size 64"
DRY = {
    "shape": SMALL,
    "half": "",  # many CPUs crawl in bfloat16
    "bf16": "",
    "repeats": "1",
    "steps": "8",
    "lengths": "128",
    "many": "16",
    "few": "1 32",
    "memory": f"{SMALL} --length 16 --completions 2 --work decode lora",
    "checkpoint": "small",
}
DECODE = "-m benchmarks decode {device} {half} --model stand-in {shape} --repeats {repeats}"
UPDATE = (
    "-m benchmarks rl {device} {bf16} --lora 128 {shape} --rows 6 --rows-per-forward 6 --prompt 200 --length 256 "
    "--gradient-checkpointing --memory-limit 0.1 --repeats {repeats}"
)
LINES = {
    "presets": "-m benchmarks.gpu {name} {few}",
    "step": DECODE + " --decoder full:steps={steps} semi-ar:steps={steps} ass eoser-ass --passes 4 {reference}",
    "rows-1": DECODE + " --decoder semi-ar ass eoser-ass --length {lengths} --temperature 0 --passes 2 --rows 1",
    "rows-8": DECODE + " --decoder semi-ar ass eoser-ass --length {lengths} --temperature 0 --passes 2 --rows 8",
    "rows-32": DECODE + " --decoder semi-ar ass eoser-ass --length {lengths} --temperature 0 --passes 2 --rows 32",
    "update": UPDATE + " --steps 8 {many}",
    "memory": "-m benchmarks memory {device} {memory}",
    "checkpoint": "tests/checkpoints.py {folder}/llada-8b {checkpoint}",
    "compiled": UPDATE + " --steps 8 --way cj --compile",
    "load": "-m unmask info {folder}/llada-8b {device} --max-new-tokens 128",
}
"""Arguments of python by name; the tables are in {folder}/NAME.md."""


def command(config: BenchGPU) -> int:
    """Run all lines; returns how many failed. Raises UserError where there is no GPU."""
    if not (config.dry_run or torch.cuda.is_available()):
        raise UserError("there is no GPU here: pass --dry-run to try every line on the CPU at a small size")
    folder, root, start, failed = Path(config.output), Path(__file__).parent.parent, time.monotonic(), 0
    check_writable(folder / "page.md")
    name = "cpu" if config.dry_run else "cuda"
    words = {"device": f"--device {name}", "name": name, "folder": str(folder.resolve())}
    words["reference"] = "" if config.reference is None else f"--reference {Path(config.reference).resolve()}"
    words |= DRY if config.dry_run else FULL
    page = [f"# On a GPU\n\n`{environment()}`\n"]
    for line, pattern in LINES.items():
        arguments = pattern.format(**words).split()
        if arguments[:2] == ["-m", "benchmarks"]:
            arguments += ["--output", f"{words['folder']}/{line}.json"]
        left, begun = config.minutes * 60 - (time.monotonic() - start), time.monotonic()
        print(f"{line:<11} python {' '.join(arguments)}", flush=True)
        try:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=root, capture_output=True, text=True, timeout=max(left, 1)
            )
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            said, fault = done.stdout, last if done.returncode else ""
        except subprocess.TimeoutExpired:
            said, fault = "", f"not done within the {config.minutes} minutes of all"
        table = folder / f"{line}.md"
        found = table.read_text() if table.exists() and not fault else f"```\n{said.strip()}\n```\n"
        page.append(
            f"## {line}\n\n`python {' '.join(arguments)}` ({time.monotonic() - begun:.0f} s)\n\n{fault or found}\n"
        )
        failed += bool(fault)
        print(f"{'':<11} {f'failed: {fault}' if fault else f'{time.monotonic() - begun:.0f} s'}", flush=True)
        write_text(folder / "page.md", "\n".join(page))
    print(f"page        {folder / 'page.md'}; {len(LINES) - failed} of {len(LINES)} lines done")
    return failed


def same_tokens(device: str, count: int, length: int) -> str:
    """How many greedy decodes of ``tiny`` have the CPU's tokens on ``device``, by preset, as a table.

    count: problems of Countdown and of Sudoku each. length: of the canvas.
    """
    from unmask import decode, load, make_decoder
    from unmask.decoding import PRESETS
    from unmask.tasks import make_task

    cpu, other, rows = load("tiny"), load("tiny", device=device), []
    tasks = [make_task(name, cpu.task_defaults) for name in ("countdown", "sudoku")]
    prompts = [task.prompt(cpu, problem) for task in tasks for problem in task.problems("test", count)]
    for name in PRESETS:
        decoder = make_decoder(name, max_new_tokens=length, temperature=0.0)
        seeds = torch.arange(len(prompts))
        a, b = (decode(lm, *lm.encode(prompts, length), decoder, seeds=seeds).tokens.cpu() for lm in (cpu, other))
        rows.append([name, f"{int((a == b).all(1).sum())} of {len(a)}"])
    return Table(["decoder", "same tokens"], rows).markdown()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print(same_tokens(sys.argv[1], *map(int, sys.argv[2:])))
