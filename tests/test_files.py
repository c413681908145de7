"""Files of this program and of its users: what is read is checked where it is read, and one sentence names the place."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unmask import make_decoder
from unmask.cli import main
from unmask.files import as_yaml, read_yaml
from unmask.spec import UserError

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)
STRANGE_YAML = {
    "date tag": "steps: !!timestamp 2024-13-45\n",
    "alias bomb": BOMB,
    "merge bomb": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 9)),
    "alias to itself": "steps: &a [*a]\n",
    "tab": "steps:\n\t- 1\n",
    "key twice": "steps: 1\nsteps: 2\n",
    "nested key twice": "a:\n  steps: 1\n  steps: 2\n",
    "number as key": "1: 2\n",
    "switch as key": "on: 2\n",
    "list as key": "? [a]\n: 1\n",
    "long key twice": f"? {'k' * 9_999}\n? {'k' * 9_999}\n",
    "long alias": "steps: *" + "k" * 9_999 + "\n",
    "long tag": "steps: !" + "k" * 9_999 + " 1\n",
    "python object": "steps: !!python/object/apply:os.system [touch executed]\n",
    "python name": "steps: !!python/name:os.system\n",
    "binary": "steps: !!binary aGVsbG8=\n",
    "broken binary": "steps: !!binary '###'\n",
    "set": "steps: !!set {a, b}\n",
    "int tag": "steps: !!int seven\n",
    "empty int tag": "steps: !!int ''\n",
    "float tag": "steps: !!float seven\n",
    "bool tag": "steps: !!bool seven\n",
    "own tag": "steps: !mine 7\n",
    "deep": "steps: " + "[" * 1_000,
    "40 levels": "steps: " + "[" * 40 + "]" * 40 + "\n",
    "digits": "steps: " + "9" * 5_000 + "\n",
    "no digits": "steps: 0x_\n",
    "empty": "",
    "comment": "# steps: 1\n",
    "list": "- steps\n",
    "text": "steps\n",
    "two documents": "steps: 1\n---\nsteps: 2\n",
    "zero byte": "steps: \0\n",
    "unknown alias": "steps: *nowhere\n",
    "bracket": "steps: [1\n",
}


@pytest.mark.parametrize("text", STRANGE_YAML.values(), ids=STRANGE_YAML)
@pytest.mark.parametrize("command", [["generate", "x", "--decoder"], ["sft"], ["rl", "--dry-run"], ["study"]])
def test_strange_yaml_is_one_sentence(
    command: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("strange.yaml").write_text(text)
    assert main([*command, "strange.yaml"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "strange.yaml" in said and len(said) < 300
    assert [p.name for p in tmp_path.iterdir()] == ["strange.yaml"]


def test_a_yaml_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: é\n".encode("latin-1"))
    with pytest.raises(UserError, match="cannot read the decoder file"):
        make_decoder(str(path))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-1.5e+3", -1500.0),
        (".5", 0.5),
        ("3", 3),
        ("1_000", 1000),
        (".inf", math.inf),
        ("2024-12-31", "2024-12-31"),
        ("2024-13-45", "2024-13-45"),
        ("2024-01-01 12:30:00", "2024-01-01 12:30:00"),
        ("12:30", "12:30"),
        ("1:30:00.5", "1:30:00.5"),
        ("=", "="),
        ("1e", "1e"),
        ("'1e-5'", "1e-5"),
        ("true", True),
        ("~", None),
    ],
)
def test_yaml_values(text: str, value: Any, tmp_path: Path) -> None:
    """Numbers as in YAML 1.2; dates and times stay text; also in nested tables, and behind a byte-order mark."""
    (tmp_path / "x.yaml").write_text(f"a: {text}\nb: {{c: [{text}]}}\n", encoding="utf-8-sig")
    found = read_yaml(tmp_path / "x.yaml", "the file")
    assert found == {"a": value, "b": {"c": [value]}} and type(found["a"]) is type(value)


PLAIN = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.from_regex(r"[-0-9.e:_]+")
)


@settings(max_examples=50, deadline=None)
@given(
    value=st.dictionaries(
        st.text(), st.recursive(PLAIN, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=5)
    )
)
def test_yaml_that_is_written_is_read_back(value: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("yaml") / "x.yaml"
    path.write_text(as_yaml(value), encoding="utf-8")
    found = read_yaml(path, "the file")
    assert found == value and repr(found) == repr(value)
