"""The command line as a stranger meets it: right calls print results, wrong ones one sentence and exit code 2."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import typing
from functools import partial
from pathlib import Path

import pytest
import tyro
from rich.console import Console
from transformers.generation.streamers import TextDiffusionStreamer

from benchmarks.__main__ import BENCHMARKS
from unmask import MaskedLM, decode, make_decoder
from unmask.cli import COMMANDS, main
from unmask.decoding.stream import MASK, LiveCanvas
from unmask.io.store import shard

ROOT = Path(__file__).parent.parent
SFT = str(ROOT / "configs" / "tiny" / "sft.yaml")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == main(["--version"]) == 0
    assert {*COMMANDS} <= {*capsys.readouterr().out.split()}


def test_completion_of_commands_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion"]) == 0
    (tmp_path / "c.sh").write_text(capsys.readouterr().out)

    def complete(*words: str) -> list[str]:
        typed = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _unmask; echo ${{COMPREPLY[@]}}"
        script = f"source {tmp_path / 'c.sh'}; {typed}"
        return subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split()

    assert complete("unmask", "e") == ["eval", "export"]
    assert complete("unmask", "eval", "--task") == ["--task"]
    assert complete("unmask", "rl", "c.yaml", "--learning") == ["--learning-rate"]
    assert complete("unmask", "eval", "x") == []


FILES = {
    "deep.json": "[" * 100_000,
    "deep.yaml": "a: " + "[" * 5_000,
    "twice.yaml": "steps: 1\noutput: x\nsteps: 2\n",
    "no_base.yaml": "base: nothing.yaml\n",
    "number.jsonl": '{"question": "q", "completion": 5, "ground_truth": "1"}\n',
    "truth.jsonl": '{"question": "q", "completion": "5", "ground_truth": {"a": 1}}\n',
    "lacks.jsonl": '{"question": "q", "completion": "5"}\n',
    "empty.jsonl": "",
}
MISTAKES = [
    ("evall", "did you mean 'eval'"),
    ("generate a<|mdm_mask|>b", "mask token"),
    (f"generate {'x' * 3000}", "3002 tokens"),
    ("generate x --decoder ass:gama_min=1", "did you mean 'gamma_min'"),
    ("generate x --model no/such/path", "unknown model 'no/such/path'"),
    ("generate x --device nowhere", "nowhere"),
    ("generate x --decoder twice.yaml", "the decoder file twice.yaml"),
    ("eval --batch-size 0", "batch_size is 0"),
    ("eval --seed 99999999999", "seed is 99999999999"),
    ("eval --max-new-tokens 4000 --decoder ass", "at most 2048 together"),
    ("eval --task countdown:data=empty.jsonl", "holds no rows"),
    ("eval --task countdown:data=deep.json --output out", "deep.json is not a list of JSON objects"),
    ("eval --output /proc/nothing --limit 1", "cannot write to /proc/nothing"),
    ("eval --output=", "output is ''"),
    (f"sft {SFT} --max-steps 0", "max_steps is 0"),
    ("rl --dry-run no.yaml", "cannot read the config no.yaml"),
    ("rl deep.yaml", "the config deep.yaml is not"),
    ("rl no_base.yaml", "cannot read the base of no_base.yaml, nothing.yaml"),
    ("info tiny --load-in-4bit", "leave them out"),
    ("grade number.jsonl --task gsm8k", "number.jsonl:1 cannot be used (completion is 5, not text): write a JSON"),
    ("grade number.jsonl --task gsm8k:extraction=x", "choose from default, published"),
    ("grade truth.jsonl --task gsm8k", "not a number"),
    ("grade lacks.jsonl --task gsm8k", "lacks.jsonl:1 cannot be used (it lacks 'ground_truth')"),
    # flags that cannot be read
    ("eval --taks sudoku", "unrecognized options: --taks, sudoku: did you mean --task?"),
    ("eval --limit abc", "error parsing --limit: no type matching"),
    ("grade", "unmask grade lacks arguments and --task"),
    ("rl", "unmask rl lacks an argument"),
    (f"sft {SFT} --compile false", "--name or --no-name; see unmask sft"),
]


@pytest.mark.parametrize(("arguments", "said"), MISTAKES)
def test_mistakes(
    arguments: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    assert main(arguments.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("unmask: ") and err.count("\n") == 1 and "Traceback" not in err and said in err, err
    assert {p.name for p in tmp_path.iterdir()} == set(FILES)


HEAVY = ("torch", "transformers", "matplotlib", "datasets", "peft", "reasoning_gym", "lm_eval")
ANSWERED_AT_ONCE = [
    *([name, "--help"] for name in COMMANDS if name != "lm-eval"),
    *([name, "--nothing", "x"] for name in ("generate", "info", "view", "eval", "sft", "rl", "tune", "demo")),
    *([name, "no.yaml"] for name in ("sft", "rl")),
    *(["evall"], ["sft", SFT, "--stepz", "2"]),
]
BENCHED_AT_ONCE = [["--help"], *([name, flag] for name in BENCHMARKS for flag in ("--help", "--nothing")), ["decoding"]]


def test_help_and_typos_answer_without_heavy_imports() -> None:
    """What takes seconds is these imports: in one interpreter for all calls, none of them may be found."""
    code = f"""
import sys
from benchmarks.__main__ import main as benchmark
from unmask.cli import main
for run, arguments in [*((main, a) for a in {ANSWERED_AT_ONCE!r}), *((benchmark, a) for a in {BENCHED_AT_ONCE!r})]:
    try:
        code = run(arguments)
    except SystemExit as stop:
        code = stop.code or 0
    assert code == (0 if "--help" in arguments else 2), arguments
    assert not (found := {{*{HEAVY!r}}} & {{*sys.modules}}), (arguments, found)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200, cwd=ROOT)


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "lm-eval"])  # whose help is its own
def test_help_lists_every_option(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever dataclass a command reads its flags into: every field is there, with a sentence of help."""
    read, parse = [], tyro.cli
    monkeypatch.setattr(tyro, "cli", lambda kind, **settings: (read.append(kind), parse(kind, **settings))[1])
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert not stop.value.code
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().out).split())
    for name, hint in typing.get_type_hints(read[0], include_extras=True).items():
        marks = getattr(hint, "__metadata__", ())
        if tyro.conf.Suppress in marks:
            assert name in said
        elif tyro.conf.Positional not in marks and typing.get_origin(hint) is not typing.ClassVar:
            assert f"--{name.replace('_', '-')} " in said.replace(",", " "), name
    if command in ("sft", "rl"):
        assert "CONFIG" in said and "(default: " in said


def test_streamers_see_the_canvas_fill(tiny_lm: MaskedLM, capsys: pytest.CaptureFixture[str]) -> None:
    """The terminal's, and transformers' own."""
    screen = io.StringIO()
    canvas = LiveCanvas(tiny_lm, Console(file=screen, force_terminal=True, width=80), "title")
    ids, mask = tiny_lm.encode([tiny_lm.chat("make 29 from 3 8 5")])
    decoder = make_decoder("ass", max_new_tokens=32)
    found = decode(tiny_lm, ids, mask, decoder, streamer=canvas)
    shown = screen.getvalue()
    assert "title" in shown and "step 5" in shown and "32/32" in shown and MASK not in shown.split("32/32")[-1]
    decode(tiny_lm, ids, mask, decoder, streamer=TextDiffusionStreamer(tiny_lm.tokenizer, skip_prompt=True))
    assert tiny_lm.tokenizer.decode(found.tokens[0, :8].tolist()) in capsys.readouterr().out


def test_grade(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answers = ("\\boxed{8*3+5}", "<answer>8*3+5</answer>", "no")
    rows = [{"question": "q", "completion": answer, "ground_truth": [[8, 3, 5], 29]} for answer in answers]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert main(["grade", f"{tmp_path}/c.jsonl", "--task", "countdown"]) == 0
    default, published = capsys.readouterr().out.split("countdown, published")
    assert "2 of 3" in default and "1 of 3" in published


def test_ctrl_c_keeps_the_records_and_a_second_call_resumes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "unmask", "eval", "--task", "countdown", "--decoder", "full", "--limit", "24"]
    command += ["--batch-size", "2", "--max-new-tokens", "32", "--output", str(tmp_path)]
    usual = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background shell ignores it
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=usual)
    whole = tmp_path / "records" / "countdown--full.jsonl"
    file = shard(whole, 0)
    deadline = time.time() + 300
    while (not file.exists() or file.read_text().count("\n") < 4) and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err
    before = file.read_text().splitlines()
    assert 4 <= len(before) < 24 and not whole.exists() and not (tmp_path / "summary.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    after = whole.read_text().splitlines()
    assert set(before) < set(after) and len(after) == 24 and not file.exists()
    assert json.loads((tmp_path / "summary.json").read_text())["cells"][0]["problems"] == 24
