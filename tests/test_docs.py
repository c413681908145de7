"""What the documents show is run: README snippets, names, links."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import pytest

import unmask
from checkpoints import write_llada
from serving import serving
from unmask.cli import COMMANDS, main
from unmask.config import read_config
from unmask.decoding import CONFIDENCES, PRESETS, SCHEDULES
from unmask.models.masked_lm import MaskedLM
from unmask.rl.config import DiffusionGRPOConfig

REGISTRIES = (CONFIDENCES, PRESETS, SCHEDULES, unmask.OBJECTIVES, unmask.REWARDS, unmask.TASKS)
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


PAGES = [p for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))] if blocks("python", p.read_text())]


@pytest.fixture
def registries() -> Iterator[None]:
    """What a page registers is gone after it."""
    with ExitStack() as stack:
        for registry in REGISTRIES:
            stack.enter_context(patch.dict(registry))
        yield


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_the_python_of_every_page_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_lm: MaskedLM
) -> None:
    """One page after the other, each as a reader would type it: all its blocks in one session."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    with ExitStack() as stack:
        address = stack.enter_context(serving(tiny_lm))[0] if page.stem == "serving" else ""
        for code in blocks("python", page.read_text().replace("http://127.0.0.1:8000", address)):
            exec(compile(code, str(page), "exec"), vars(module))  # noqa: S102  (our own document)


def test_the_run_file_of_the_task_page_is_read(tmp_path: Path) -> None:
    (text,) = blocks("yaml", (ROOT / "docs" / "howto" / "task.md").read_text())
    (tmp_path / "reversal.yaml").write_text(text)
    assert read_config(DiffusionGRPOConfig, tmp_path / "reversal.yaml").max_steps == 5


@pytest.mark.usefixtures("registries")
def test_the_notebook_runs(capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads((ROOT / "docs" / "first_contact.ipynb").read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "LIMIT = 32" in code
    exec(compile(code.replace("LIMIT = 32", "LIMIT = 2"), "first_contact.ipynb", "exec"), {})  # noqa: S102
    assert "of 2 solved" in capsys.readouterr().out


def test_the_site_builds(tmp_path: Path) -> None:
    """Dead links, missing pages and names that do not exist fail."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "Complete prompts, or fill the gaps of templates" in (tmp_path / "reference" / "index.html").read_text()


HUB = "GSAI-ML/LLaDA-8B-Instruct"
SMALL = {"eval": ["--limit=2", "--max-new-tokens=32"], "demo": ["--limit=2"], "info": ["--max-new-tokens=8"]}
LINES = [line for block in blocks("bash") for line in re.findall(r"^(unmask .*?)(?:  #|$)", block, re.MULTILINE)]


@pytest.mark.parametrize("line", LINES)
def test_readme_commands_run(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every unmask command of the README, evaluations on two problems; training only reads its config."""
    name, *arguments = shlex.split(line)[1:]
    if name in ("sft", "rl", "distill"):
        assert (ROOT / arguments[0]).exists()  # other tests run every config
        return
    if name in ("serve", "tune", "lm-eval"):  # test_serve, test_tune and test_harness run them
        return
    if HUB in arguments:  # replaced by a small random one in the same layout
        arguments = [write_llada(tmp_path) if a == HUB else a for a in arguments]
    if name == "grade":
        (tmp_path / arguments[0]).write_text('{"question": "q", "completion": "1", "ground_truth": [[1, 1], 2]}\n')
    monkeypatch.chdir(tmp_path)
    assert main([name, *arguments, *SMALL.get(name, [])]) == 0  # the last of two equal flags is used


def test_readme_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(blocks("bash")), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_exported_names_exist() -> None:
    assert all(getattr(unmask, name) is not None for name in unmask.__all__)
    typed = re.search(r"if TYPE_CHECKING:\n(.*?)\n\n", Path(unmask.__file__).read_text(), re.DOTALL)
    names = re.findall(r"\w+", re.sub(r"from [\w.]+ import", "", typed[1] if typed else ""))
    assert {*names, "__version__"} == {*unmask.__all__}


def test_links_and_named_files_exist() -> None:
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]:
        for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_one_version() -> None:
    citation, changes = ((ROOT / name).read_text() for name in ("CITATION.cff", "CHANGELOG.md"))
    assert f"\nversion: {unmask.__version__}\n" in citation and f"\n## {unmask.__version__} — " in changes


def test_every_command_is_documented() -> None:
    text = "".join(f.read_text() for f in (ROOT / "docs").glob("**/*.md"))
    assert all(f"unmask {name}" in (README + text) for name in COMMANDS)
