"""YAML files: strange ones are one sentence, numbers are those of YAML 1.2, and what is written is read back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.study.config import StudyConfig
from benchmarks.study.grid import read_grid
from unmask import DiffusionGRPOConfig, SFTConfig, UserError, make_decoder
from unmask.cli import main
from unmask.config import read_config
from unmask.io.files import as_yaml, read_yaml

BOMB = "a0: &a0 [x, x, x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
STRANGE = {
    "alias bomb": BOMB,
    "merge bomb": BOMB.replace("[x, x, x, x]", "{x: 1}").replace("[*", "{<<: [*").replace("]\n", "]}\n"),
    "alias to itself": "steps: &a [*a]\n",
    "tab": "steps:\n\t- 1\n",
    "key twice": "steps: 1\nsteps: 2\n",
    "number as key": "1: 2\n",
    "python object": "steps: !!python/object/apply:os.system [touch executed]\n",
    "long tag": "steps: !" + "k" * 9_999 + " 1\n",
    "deep": "steps: " + "[" * 1_000,
    "digits": "steps: " + "9" * 5_000 + "\n",
    "empty": "",
    "list": "- steps\n",
    "two documents": "steps: 1\n---\nsteps: 2\n",
    "zero byte": "steps: \0\n",
    "latin-1": "name: é\n",
}


@pytest.mark.parametrize("text", STRANGE.values(), ids=STRANGE)
def test_strange_yaml_is_one_sentence(text: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("strange.yaml").write_bytes(text.encode("latin-1"))
    assert main(["generate", "x", "--decoder", "strange.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "the decoder file strange.yaml" in said and len(said) < 300
    with pytest.raises(UserError):
        read_config(StudyConfig, Path("strange.yaml"))
    assert [p.name for p in tmp_path.iterdir()] == ["strange.yaml"]


NUMBERS = ["1e-5", "1E-5", "+1e-5", "-2e3", "1.e-5", ".5e-3", "2.5e+3", "2.5e3", "3e0", "-1.5e+3", ".5"]
TEXTS = ["1e", "e5", "1e5x", "1e-", "1e5-2", "12e3f", "010", "2024-12-31", "2024-13-45", "12:30", "="]
OTHERS = [("3", 3), ("1_000", 1000), (".inf", math.inf), ("'1e-5'", "1e-5"), ("true", True), ("~", None)]


@pytest.mark.parametrize(("text", "value"), [*((t, float(t)) for t in NUMBERS), *((t, t) for t in TEXTS), *OTHERS])
def test_yaml_values(text: str, value: Any, tmp_path: Path) -> None:
    """Numbers as in YAML 1.2; dates and times are text; also in nested tables, and behind a byte-order mark."""
    (tmp_path / "x.yaml").write_text(f"a: {text}\nb: {{c: [{text}]}}\nd:\n  - e: {text}\n", encoding="utf-8-sig")
    found = read_yaml(tmp_path / "x.yaml", "the file")
    assert found == {"a": value, "b": {"c": [value]}, "d": [{"e": value}]} and type(found["a"]) is type(value)


NUMERIC = st.integers() | st.floats(allow_nan=False) | st.from_regex(r"[-0-9.e:_]+")
PLAIN = st.none() | st.booleans() | st.text() | NUMERIC
NESTED = st.recursive(PLAIN, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=5)


@settings(max_examples=50, deadline=None)
@given(value=st.dictionaries(st.text(), NESTED))
def test_yaml_that_is_written_is_read_back(value: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("yaml") / "x.yaml"
    path.write_text(as_yaml(value), encoding="utf-8")
    found = read_yaml(path, "the file")
    assert found == value and repr(found) == repr(value)


def test_files_of_every_command(tmp_path: Path) -> None:
    """Numbers as in YAML 1.2; what a file leaves out is its base's, and a flag holds over both."""

    def write(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    sft = read_config(SFTConfig, write("sft.yaml", "output_dir: x\nmax_steps: 1e1\nnew_model: {rms_norm_eps: 1e-5}"))
    assert (sft.max_steps, sft.new_model) == (10, {"rms_norm_eps": 1e-5})
    write("base.yaml", "learning_rate: 1e-5\nbeta: 0.1\nseed: 3\ntasks: [sudoku]\n")
    own = write("rl.yaml", "base: base.yaml\noutput_dir: x\nbeta: 0.5\nreward_weights: [1e-1]")
    rl = read_config(DiffusionGRPOConfig, own, ["--seed", "4"])
    assert (rl.learning_rate, rl.reward_weights, rl.beta, rl.seed, rl.tasks) == (1e-5, [0.1], 0.5, 4, ["sudoku"])
    wrong = {"base: rl.yaml": "does not lead back", "max_steps: many": "max_steps in .* is 'many'"}
    for base, message in {**wrong, "bta: 1": "unknown key in .* did you mean 'beta'"}.items():
        write("base.yaml", base)
        with pytest.raises(UserError, match=message):
            read_config(DiffusionGRPOConfig, own)
    with pytest.raises(UserError, match="lacks output_dir"):
        read_config(SFTConfig, write("sft.yaml", "tasks: [sudoku]"))
    assert make_decoder(str(write("d.yaml", "preset: eoser\ngamma_min: 1e-2"))).gamma_min == 0.01
    tables = "evaluate: [{task: sudoku, decoder: eoser, gamma_min: [1e-2, 5e-2]}]"
    study = read_config(StudyConfig, write("study.yaml", f"output: x\n{tables}"))
    assert {cell.decoder.gamma_min for cell in read_grid(study, tmp_path).cells} == {0.01, 0.05}
