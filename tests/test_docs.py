"""What the documents show is run: README snippets, names, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import unmask
from checkpoints import write_llada
from unmask.cli import COMMANDS, main
from unmask.config import read_flags
from unmask.evaluation.tune_config import TuneConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


SNIPPETS = [
    code
    for file in ("README.md", "docs/decoding.md", "docs/rl.md", "docs/sft.md")
    for code in blocks("python", (ROOT / file).read_text())
]


@pytest.mark.parametrize("code", SNIPPETS, ids=lambda c: c.splitlines()[0])
def test_python_snippets_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})  # noqa: S102  (our own document)


def test_there_are_snippets() -> None:
    assert len(blocks("python")) >= 1 and len(shell_lines()) >= 4


def shell_lines() -> list[str]:
    lines = [
        line.split("  #")[0].strip() for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()
    ]
    return [line for line in lines if line.startswith("unmask ")]


HUB = "GSAI-ML/LLaDA-8B-Instruct"
SMALL = {
    "eval": ["--limit", "2", "--max-new-tokens", "32"],
    "demo": ["--limit", "2"],
    "info": ["--max-new-tokens", "8"],
}


@pytest.mark.parametrize("line", shell_lines())
def test_readme_commands_run(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every unmask command of the README, evaluations on two problems; training only reads its config."""
    arguments = shlex.split(line)[1:]
    if arguments[0] in ("sft", "rl"):
        assert (ROOT / arguments[1]).exists()  # test_training and test_rl_runs run every config
        return
    if arguments[0] == "report":
        assert all(run.startswith("runs/") for run in arguments[1:])  # test_report reports such folders
        return
    if arguments[0] == "study":
        assert (ROOT / arguments[1]).exists()  # test_study reads every one
        return
    if arguments[0] == "tune":
        read_flags(TuneConfig, arguments[1:], prog="unmask tune")  # test_tune runs one
        return
    if arguments[0] == "lm-eval":
        assert arguments[1:4] == ["run", "--model", "unmask"]  # test_harness runs one; this task is on the hub
        return
    if HUB in arguments:  # a small random one in the same layout stands for it
        arguments = [write_llada(tmp_path) if a == HUB else a for a in arguments]
    if arguments[0] == "grade":
        (tmp_path / arguments[1]).write_text('{"question": "q", "completion": "1", "ground_truth": [[1, 1], 2]}\n')
    monkeypatch.chdir(tmp_path)
    for flag in ("--limit", "--max-new-tokens"):
        if flag in arguments and arguments[0] in SMALL:
            at = arguments.index(flag)
            del arguments[at : at + 2]
    arguments += SMALL.get(arguments[0], [])
    assert main(arguments) == 0, capsys.readouterr().err


def test_readme_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([a-z ]+)", "\n".join(blocks("bash")), re.MULTILINE):
        for word in target.split():
            assert re.search(rf"^{word}:", makefile, re.MULTILINE)


def test_exported_names_exist() -> None:
    homes = [name for names in unmask._HOMES.values() for name in names]
    assert sorted(unmask.__all__) == sorted([*homes, "__version__"])
    assert all(getattr(unmask, name) is not None for name in unmask.__all__)


def test_links_and_named_files_exist() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_command_is_documented() -> None:
    text = "".join(f.read_text() for f in (ROOT / "docs").glob("*.md"))
    assert all(f"unmask {name}" in (README + text) for name in COMMANDS)
