"""Names of files made from specs: bounded, different for different specs, and unchanged where they are short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main as benchmark
from unmask.cli import main
from unmask.io.files import slug

LONG = "eoser-ass:gamma_min=0.0123456789012345,temperature=0.1234567890123456,cfg_scale=0.12345678901234567,max_new_tokens=32"


def test_slugs_are_file_names(tmp_path: Path) -> None:
    for spec in ("full", LONG, "x" * 5000, "ä" * 300, "[/]" * 99, ".." * 200, "a/b" * 99):
        (tmp_path / f"{slug(spec)}--{slug(spec)}.jsonl.rank-1023.partial").write_text("")
        assert slug(spec) != slug(spec + "x") and len(slug(spec).encode()) < 110
    assert slug("full") == "full"


@pytest.mark.parametrize("name", ["x[bold]y[/]", r"$\x_1^2$" + "a" * 60])
def test_long_specs_and_odd_folders(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A record for every problem, figures, and the folder's name as it is in what is said; the second call resumes."""
    folder = tmp_path / (name * 2) / name
    rows = [{"input": "1,2,3", "output": "6"}]
    data = tmp_path / f"{name.replace(chr(47), chr(95))}{chr(100) * 150}.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    flags = ["eval", "--limit", "1", "--task", f"countdown:data={data}", "--output", str(folder), "--decoder", LONG]
    for _ in range(2):
        assert main([*flags, "full:steps=1"]) == 0
        assert str(folder) in capsys.readouterr().out.replace("\n", "")
    assert len(list((folder / "records").glob("*.jsonl"))) == 2 and (folder / "accuracy.png").stat().st_size > 5000
    assert benchmark(["report", str(folder)]) == 0
    assert str(folder) in capsys.readouterr().out.replace("\n", "")
