"""``unmask view``: decode a prompt, a task's problem or records, and write the page."""

from __future__ import annotations

from pathlib import Path

from unmask.config import read_flags
from unmask.io.files import check_writable, writing_to
from unmask.io.terminal import console
from unmask.view.config import ViewArguments


def command(arguments: list[str]) -> None:
    """The command line of ``unmask view``."""
    a = read_flags(ViewArguments, arguments, prog="unmask view")
    repeats = a.check()
    from rich.text import Text

    from unmask.decoding import decode
    from unmask.view.jobs import from_flags, from_records
    from unmask.view.page import Panel, top_candidates_per_step, write_page

    output, panels = Path(a.output), []
    source, make_jobs = from_records(a) if repeats else from_flags(a)
    check_writable(output)
    with console(stderr=True).status("reading the model") as status:
        lm = source.load()
        prompt, jobs = make_jobs(lm)
        for job in jobs:
            status.update(Text(f"{job.decoder.name}: decoding"))  # a name is no markup
            ids, mask = lm.encode([prompt], job.decoder.max_new_tokens)
            trajectory = decode(lm, ids, mask, job.decoder, seeds=job.seeds, early_stop=job.early_stop)
            found = []
            for candidates in top_candidates_per_step(lm, trajectory, a.candidates):
                found.append(candidates)
                status.update(Text(f"{job.decoder.name}: candidates of step {len(found)} of {trajectory.steps}"))
            text = lm.text(trajectory.tokens)[0]
            panels.append(Panel(job.decoder, trajectory, found, text, job.solved(text), job.recorded))
            if job.recorded not in (None, text):
                print(f"{job.decoder.name} writes another text now than the record holds; the page shows both")
    with writing_to(output):
        size = write_page(output, lm, prompt, panels)
    print(f"page  {output}  ({size / 1e6:.2f} MB)")
