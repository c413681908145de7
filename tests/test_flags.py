"""Values mean the same in a flag, a file and a spec; loggers are named."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from unmask import UserError
from unmask.config import build, check_reporters, convert, read_config, read_flags, split_spec


@dataclass
class Settings:
    whole: int | None = 3
    share: float | None = 0.5
    text: str | None = "x"
    entries: list[float] | None = None
    names: list[str] = field(default_factory=lambda: ["x"])
    rule: Literal["group", "none"] = "group"


@pytest.mark.parametrize("none", ["none", "NONE", "Null"])
@pytest.mark.parametrize("key", ["whole", "share", "text", "entries", "names", "rule"])
def test_none_is_none_everywhere(key: str, none: str, tmp_path: Path) -> None:
    """Of a list it is the empty one, and where none is one of the choices it is that choice."""
    none = "none" if key == "rule" else none
    (tmp_path / "c.yaml").write_text(f"{key}: {none}")
    found: list[Any] = [
        read_flags(Settings, [f"--{key}", none], "test"),
        read_flags(Settings, [f"--{key}={none}"], "test"),
        read_config(Settings, tmp_path / "c.yaml"),
        read_config(Settings, tmp_path / "c.yaml", [f"--{key}", none]),
        build(Settings, split_spec(f"spec:{key}={none}")[1], "spec"),
    ]
    expected = {"names": [], "rule": "none"}.get(key)
    assert [getattr(f, key) for f in found] == [expected] * len(found)


def test_other_words_are_no_none() -> None:
    assert convert(["none"], list[str], "x") == [] != convert(["none", "x"], list[str], "x")
    assert read_flags(Settings, ["--names", "none", "x"], "test").names == ["none", "x"]
    with pytest.raises(UserError, match=r"--whole.*nothing"):
        read_flags(Settings, ["--whole", "nothing"], "test")


def test_loggers_are_named() -> None:
    with pytest.raises(UserError, match=r"'tensorbord': choose from those installed, .*tensorboard"):
        check_reporters(["tensorboard", "tensorbord"])
