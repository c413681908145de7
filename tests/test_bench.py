"""The benchmark: what it compares computes the same thing, and its result is whole."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import common
from benchmarks import decode as bench_decode
from benchmarks import gap as bench_gap
from benchmarks import gpu as bench_gpu
from benchmarks import memory as bench_memory
from benchmarks import rl as bench_rl
from benchmarks import shapes as bench_shapes
from benchmarks.__main__ import main as benchmark
from benchmarks.common import in_subprocess
from benchmarks.config import BenchDecode, BenchGap, BenchMemory, BenchRL, BenchShapes
from benchmarks.reference import counterpart
from unmask import MaskedLM, UserError, decode, make_decoder
from unmask.decoding.loop import DecodingLoop

SHAPE = {"d_model": 32, "n_layers": 2, "mlp_hidden_size": 64, "repeats": 1}
SMALL = {**SHAPE, "steps": (2, 4), "length": 16, "prompt": 8, "vocabulary": 200}


@pytest.fixture(autouse=True)
def cells_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells are measured in this process, and the machine's best rate, which takes seconds, is not."""
    measure = {"decode": bench_decode.measure, "rl": bench_rl.measure}
    monkeypatch.setattr(common, "gemm_peak", lambda *_: 1e13)
    monkeypatch.setattr(common, "in_subprocess", lambda name, *cell: json.loads(json.dumps(measure[name](*cell))))


def test_the_plain_way_has_the_same_gradient() -> None:
    """All graphs alive and full logits, or one backward a view with logits where scored: the same update."""
    config = BenchRL(**SMALL)  # type: ignore[arg-type]
    trainer, _ = bench_rl.prepare_update(config, "cj")
    trainer.model.to(torch.float64)
    rollout = bench_rl.random_rollout(config, trainer.lm, 4)
    trainer.update(trainer.model, rollout, 0)
    ours = [p.grad.clone() for p in trainer.model.parameters()]
    trainer.model.zero_grad()
    bench_rl.plain_update(trainer.model, rollout)
    for mine, p in zip(ours, trainer.model.parameters(), strict=True):
        assert torch.allclose(mine, p.grad, rtol=1e-3, atol=1e-5 * float(p.grad.abs().max()))


def test_every_cell_is_measured(tmp_path: Path) -> None:
    result = bench_rl.run(BenchRL(**SMALL, output=str(tmp_path / "b.json")), lambda _: None)  # type: ignore[arg-type]
    ways = [(c["way"], c["steps"]) for c in result["cells"]]
    assert ways == [*((w, s) for w in ("cj", "bare", "plain") for s in (2, 4)), ("one-step", 1), ("diffu", 1)]
    for cell in result["cells"]:
        assert 0 < cell["seconds"]["low"] <= cell["seconds"]["median"] <= cell["seconds"]["high"]
        assert cell["peak_gib"]["median"] > 0 and 0 < cell["of_gemm_peak"] < 1
    assert json.loads((tmp_path / "b.json").read_text())["environment"]["torch"]
    few = {**SMALL, "memory_limit": 1e-9, "output": str(tmp_path / "c.json")}
    huge = bench_rl.run(BenchRL(**few), lambda _: None)  # type: ignore[arg-type]
    assert [c["way"] for c in huge["not_run"]] == ["plain", "plain"]


def test_mistakes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"steps \(200,\) do not fit a canvas of 128"):
        BenchRL(steps=(200,))
    with pytest.raises(UserError, match="did you mean 'eoser'"):
        BenchDecode(decoder=("eosr",))
    with pytest.raises(UserError, match=r"no eval/generate\.py: use a checkout"):
        BenchDecode(reference="/nowhere")
    assert benchmark(["gap", "--output", "/proc/nothing/x.json"]) == 2
    assert "cannot write to" in capsys.readouterr().err
    assert (
        benchmark(["decoding"]) == 2 and "choose from decode, gap, gpu, memory, report, rl" in capsys.readouterr().err
    )


def test_the_gap_is_rounding_for_cj_alone(toy_folder: str, tmp_path: Path) -> None:
    sizes = {"limit": 6, "max_new_tokens": 16, "rows_per_forward": 4, "output": str(tmp_path / "gap.json")}
    config = BenchGap(toy_folder, ["countdown:style=compact"], ["eoser-ass", "full"], **sizes)  # type: ignore[arg-type]
    cells = bench_gap.run(config, lambda _: None)["cells"]
    assert [(c["decoder"], c["objective"]) for c in cells] == [(d, o) for d in config.decoder for o in config.objective]
    for cell in cells:
        low, high = cell["gap_interval"]
        assert low <= cell["gap"] <= high and cell["completions"] == 6
        assert cell["gap"] < 1e-5 if cell["objective"] == "cj" else cell["gap"] > 0.05


def test_measured_peaks(tmp_path: Path) -> None:
    """The memory formula beside one peak measured here, and beside those that were measured for the documents."""
    shape = {"vocabulary": 8192, "d_model": 384, "n_heads": 6, "n_layers": 4, "mlp_hidden_size": 1152, "prompt": 32}
    # In float32: many processors have no instructions for bfloat16.
    cells = {"work": ("lora",), "length": (64,), "completions": (4,), "steps": 2, "dtype": "float32"}
    config = BenchMemory(**shape, **cells, output=str(tmp_path / "memory.json"))  # type: ignore[arg-type]
    for cell in bench_memory.run(config, lambda _: None)["cells"]:
        assert cell["formula"] == pytest.approx(cell["measured"], rel=0.15), cell
    known = json.loads((Path(__file__).parents[1] / "docs/results/bench-memory.json").read_text())
    config = BenchMemory(**known["config"])
    lm = common.stand_in(config, "float32", "cpu")
    for cell in known["cells"]:
        found = bench_memory.estimate(config, lm, cell["work"], cell["length"], cell["completions"]).total
        assert found == cell["formula"] == pytest.approx(cell["measured"], rel=0.1), cell


# A stand-in for the released file: the same names and arguments, one token a step from left to right.
RELEASED = """
import torch
import torch.distributed as dist

def generate(model, prompt, tokenizer, steps, gen_length, block_length, temperature, cfg_scale, remasking, mask_id):
    with torch.autocast(device_type="cuda"):
        assert dist.get_rank() != 0
        canvas = torch.full((len(prompt), gen_length), mask_id)
        for _ in range(steps):
            logits = model(torch.cat([prompt, canvas], 1)).logits[:, -gen_length:]
            p, token = logits.softmax(-1).max(-1)
            p[canvas != mask_id] = -1
            for row in range(len(canvas)):
                chosen = p[row].topk(gen_length // steps).indices
                canvas[row, chosen] = token[row, chosen]
    return torch.cat([prompt, canvas], 1)
"""


def test_decode_cells(tmp_path: Path, toy_folder: str) -> None:
    """Every cell is measured; where a released function exists its tokens are compared."""
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "generate.py").write_text(RELEASED)
    before = torch.autocast, torch.distributed.get_rank
    specs = ("full", "threshold:block_length=8", "semi-ar:block_length=8,cache=dual")
    sizes = {**SHAPE, "length": (16,), "rows": 2, "prompt": 8, "passes": 3, "vocabulary": 300}
    files = {"reference": str(tmp_path), "output": str(tmp_path / "d.json")}
    config = BenchDecode(model=("stand-in", toy_folder), decoder=specs, **sizes, **files)  # type: ignore[arg-type]
    cells = bench_decode.run(config, lambda _: None)["cells"]
    assert (torch.autocast, torch.distributed.get_rank) == before
    assert len(cells) == 2 * 3 * 2
    for cell in cells:
        assert cell["tokens_per_second"] > 0
        assert ("step" in cell) == ("cache" not in cell["decoder"])
        if "step" in cell:
            assert cell["timed"] == 3 and 0 < cell["of_gemm_peak"] < 1
            assert cell["step_over_needed"]["low"] <= cell["step_over_needed"]["median"]
        assert cell.get("same_tokens") == (True if cell["decoder"] == "full" and cell["temperature"] == 0 else None)
        assert ("reference_over_ours" in cell) == (cell["decoder"] == "full")


def test_decode_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command, its one cell in a process of its own."""
    monkeypatch.setattr(common, "in_subprocess", in_subprocess)
    monkeypatch.setenv("COLUMNS", "132")
    output = tmp_path / "d.json"
    small = "--vocabulary 300 --d-model 32 --n-layers 1 --mlp-hidden-size 64 --rows 2 --temperature 0 --repeats 1"
    cell = ["decode", *small.split(), "--decoder", "ass", "--output", str(output)]
    assert benchmark([*cell, "--model", "stand-in", "--length", "8"]) == 0
    assert "stand-in · ass" in capsys.readouterr().out
    assert (tmp_path / "d.md").read_text().count("\n") == 3 and len(json.loads(output.read_text())["cells"]) == 1
    assert benchmark([*cell, "--model", "tiny", "--length", "9999"]) == 2
    assert "tokens, but prompt and canvas have" in capsys.readouterr().err


def test_shapes_count_each_layer_alike() -> None:
    """One layer more is so many kernels more, whatever their number; recomputed activations need not be kept."""
    small = BenchShapes(d_model=32, n_heads=2, mlp_hidden_size=64, vocabulary=200, lora=4, length=64, prompt=64)

    def kernels(layers: int, *what: Any) -> int:
        return int(bench_shapes.measure(dataclasses.replace(small, n_layers=layers), *what)["kernels"])

    for what in (("eoser-ass",), (None, True)):
        assert kernels(3, *what) - kernels(2, *what) == kernels(2, *what) - kernels(1, *what) > 0
    deep = dataclasses.replace(small, n_layers=6)
    kept, again = (bench_shapes.measure(deep, None, checkpointing) for checkpointing in (False, True))
    assert again["peak"] < kept["peak"] and again["flops"] > kept["flops"]
    lm = common.stand_in(small, "bfloat16", "cpu")
    bare = common.pass_flops(lm, small.rows, small.prompt + small.length, small.rows * small.length)
    assert bench_shapes.measure(small, "full")["flops"] == pytest.approx(bare, rel=0.01)


def test_the_page_of_a_gpu_says_what_failed(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(bench_gpu, "LINES", {"good": "-c print({name!r})", "bad": "-c raise(ValueError(7))"})
    assert benchmark(["gpu", "--dry-run", "--output", str(tmp_path)]) == 2
    assert "1 lines failed" in capsys.readouterr().err
    page = (tmp_path / "page.md").read_text()
    assert "cpu" in page.partition("## good")[2] and "ValueError: 7" in page.partition("## bad")[2]
    if not torch.cuda.is_available():
        assert benchmark(["gpu", "--output", str(tmp_path)]) == 2
        assert "no GPU here: pass --dry-run" in capsys.readouterr().err


def test_timed_passes_are_those_of_the_decode(toy_lm: MaskedLM) -> None:
    """From the state before any step, one pass commits what the decode committed there."""
    ids, mask = toy_lm.encode(["make 5 from 1 2 2", "make 5 from 1 2 3"])
    seeds = torch.tensor([3, 4])
    for spec in ("eoser-ass:temperature=1", "threshold:threshold=0.2,block_length=8", "full-random"):
        decoder = make_decoder(spec, max_new_tokens=16)
        trajectory = decode(toy_lm, ids, mask, decoder, seeds=seeds)
        loop = DecodingLoop(toy_lm, decoder, early_stop=False)
        for s in range(trajectory.steps):
            rows = bench_decode.rows_before(toy_lm, trajectory, s, seeds)
            loop.advance(rows)
            for i, number in enumerate(rows.numbers):
                assert torch.equal(rows.canvas[i], trajectory.state(s + 1)[number])


def test_counterparts() -> None:
    names = {"full": "generate", "semi-ar-random": "generate", "eoser": "eoser_generate", "ass": "ass_generate"}
    none = "hard-eos threshold hybrid eoser:block_length=32 full:confidence=margin semi-ar:cache=dual"
    for spec in (*names, *none.split()):
        assert (counterpart(make_decoder(spec)) or (None,))[0] == names.get(spec)
    name, arguments = counterpart(make_decoder("eoser-ass:blocks=4,temperature=1", max_new_tokens=256)) or ("", {})
    assert name == "eoser_ass_generate" and (arguments["steps"], arguments["block_num"]) == (8, 4)
    assert arguments["eos_min_gamma"] == 0.01
