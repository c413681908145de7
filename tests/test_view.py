"""``unmask view``: the page holds the decode of a prompt, problem or record, whatever the texts are; refusals."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from browser import data_of, open_page
from checkpoints import write_dream
from conftest import PROMPTS
from unmask import MaskedLM, Trajectory, UserError, decode, load, make_decoder
from unmask.evaluation.evaluate import EvalConfig, evaluate
from unmask.evaluation.generate import command as generate
from unmask.view.command import command
from unmask.view.config import ViewArguments
from unmask.view.jobs import source_of
from unmask.view.page import Panel, page_data, render, token_glyph, top_candidates_per_step, visible, write_page

SPECS = ["semi-ar:block_length=8", "eoser-ass", "threshold:block_length=8,threshold=0.5", "full:cfg_scale=0.5,steps=5"]


def make_panel(lm: MaskedLM, spec: str, length: int = 16, early_stop: bool = False, prompt: str = PROMPTS[0]) -> Panel:
    decoder = make_decoder(spec, max_new_tokens=length)
    ids, mask = lm.encode([lm.chat(prompt)])
    found = decode(lm, ids, mask, decoder, torch.Generator().manual_seed(0), early_stop=early_stop)
    return Panel(decoder, found, list(top_candidates_per_step(lm, found, 5)), lm.text(found.tokens)[0], None, None)


def candidates_of(data: dict[str, Any], panel: dict[str, Any]) -> dict[tuple[int, int], Any]:
    """By (step, masked cell): [(token id, probability), …], as the page's script reads them."""
    ids, wide = data["vocabulary"]["ids"], "<u4" if data["wide"] else "<u2"
    tokens = np.frombuffer(base64.b64decode(panel["top"]), wide).reshape(-1, panel["candidates"])
    probs = np.frombuffer(base64.b64decode(panel["probs"]), "<u2").reshape(-1, panel["candidates"]) / 65535
    rows = [[(ids[t], p) for t, p in zip(*row, strict=True)] for row in zip(tokens, probs, strict=True)]
    places = [(s, i) for s in range(panel["steps"]) for i, at in enumerate(panel["step"]) if at < 0 or at >= s]
    return dict(zip(places, rows, strict=True))


@pytest.mark.parametrize("spec", SPECS)
def test_the_page_holds_the_trajectory_and_what_greedy_decoding_took(toy_lm: MaskedLM, spec: str) -> None:
    panel = make_panel(toy_lm, spec, early_stop=True)
    data = data_of(render(page_data(toy_lm, "the prompt", [panel])))
    (shown,), trajectory = data["panels"], panel.trajectory
    ids = data["vocabulary"]["ids"]
    assert [ids[t] for t in shown["token"]] == trajectory.tokens[0].tolist()
    assert shown["step"] == trajectory.step[0].tolist()
    assert shown["logprob"] == pytest.approx(trajectory.logprob[0].tolist(), abs=1e-6)
    assert (shown["nfe"], shown["steps"], shown["decoder"]) == (int(trajectory.nfe), trajectory.steps, spec)
    names = toy_lm.tokenizer.convert_ids_to_tokens
    assert {ids[int(t)]: name for t, name in data["ends"].items()} == {t: names(t) for t in ids if t in toy_lm.end_ids}
    assert (data["prompt"], data["weights"], shown["text"]) == ("the prompt", toy_lm.weights, panel.text)
    masked = candidates_of(data, shown)
    for i, step in enumerate(shown["step"]):
        if step >= 0:
            (best, prob), *_ = masked[step, i]
            assert best == trajectory.tokens[0, i]
            assert prob == pytest.approx(float(trajectory.logprob[0, i].exp()), abs=1e-4)


def test_what_is_never_committed_stays_masked(tiny_lm: MaskedLM) -> None:
    panel = make_panel(tiny_lm, "semi-ar:block_length=16", 96, early_stop=True)
    data = page_data(tiny_lm, "", [panel])
    (shown,), never = data["panels"], (panel.trajectory.step[0] < 0).nonzero()[:, 0].tolist()
    assert never and {data["vocabulary"]["texts"][shown["token"][i]] for i in never} == {"·"}
    assert {i for s, i in candidates_of(data, shown) if s == panel.trajectory.steps - 1} > set(never)


def test_open_cells_are_those_of_the_plan(toy_lm: MaskedLM) -> None:
    blocks = page_data(toy_lm, "", [make_panel(toy_lm, "semi-ar:block_length=8")])["panels"][0]
    assert blocks["horizon"] == [8] * 4 + [16] * 4
    panel = page_data(toy_lm, "", [make_panel(toy_lm, SPECS[2])])["panels"][0]
    assert all(h == (8 if sum(0 <= at < s for at in panel["step"]) < 8 else 16) for s, h in enumerate(panel["horizon"]))


@pytest.fixture(scope="module")
def dream_lm(tmp_path_factory: pytest.TempPathFactory) -> MaskedLM:
    """Its logits at a position are those of the next one."""
    return load(write_dream(tmp_path_factory.mktemp("dream")), "float32")


@pytest.mark.parametrize(("shifted", "cache"), [(False, "none"), (False, "dual"), (True, "none")])
def test_candidates_are_those_of_whole_passes(
    toy_lm: MaskedLM, dream_lm: MaskedLM, monkeypatch: pytest.MonkeyPatch, shifted: bool, cache: str
) -> None:
    lm = dream_lm if shifted else toy_lm
    panel = make_panel(lm, f"semi-ar:block_length=8,cache={cache}")
    monkeypatch.setattr(type(lm.model), "shifted", False)  # the shift is made by hand here
    trajectory, width = panel.trajectory, panel.trajectory.prompt.shape[1]
    differ = False
    for s, (tokens, probs) in enumerate(panel.candidates):
        with torch.no_grad():
            logits = lm.model(torch.cat([trajectory.prompt, trajectory.state(s)], 1)).logits[0].double()
        logits[:, lm.mask_id] = -torch.inf
        masked = (trajectory.state(s)[0] == lm.mask_id).nonzero()[:, 0]
        best = logits[masked + width - int(shifted)].softmax(1).topk(5)
        assert torch.equal(tokens, best.indices)
        torch.testing.assert_close(probs, best.values, atol=1e-5, rtol=0)
        now = [masked.tolist().index(i) for i in trajectory.committed(s)[0].nonzero()[:, 0].tolist()]
        taken = trajectory.logprob[trajectory.committed(s)].double().exp()
        differ |= not torch.allclose(probs[now, 0], taken, atol=1e-4)
    assert differ == (cache != "none")  # what decoded with a cache was an approximation


HOSTILE = {
    "</script><script>document.title='gone'</script>": "</script><script>document.title='gone'</script>",
    "<!--<b onclick='x'>\"&amp;": "<!--<b␣onclick='x'>\"&amp;",
    "@data@@script@\\1\\g<0>": "@data@@script@\\1\\g<0>",
    "\n": "⏎",
    " a\tb\r\n": "␣a⇥b␍⏎",
    "\x00\x1b\x7f\x85": "␀␛␡⟨85⟩",
    "\u0301": "◌\u0301",
    "\u202e\u200b\u2028\ue000": "⟨202E⟩⟨200B⟩⟨2028⟩⟨E000⟩",
    "": "piece",
    "\u05d0\U0001f600": "\u05d0\U0001f600",
}


class HostileTokenizer:
    """Its tokens from 10 on are ``HOSTILE``'s keys; 8 and 9 are parts of a character, in two alphabets."""

    def __init__(self) -> None:
        self.texts = dict(enumerate(["\ufffd", "\ufffd", *HOSTILE], 8))

    def decode(self, ids: list[int]) -> str:
        return "".join(self.texts.get(i, "x") for i in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return {8: "âĤ", 9: "<0xAC>"}.get(token, "piece")


def test_hostile_texts_survive(toy_lm: MaskedLM, tmp_path: Path) -> None:
    """A decode that wrote nothing but hostile tokens."""
    lm = replace(toy_lm, tokenizer=HostileTokenizer())  # type: ignore[arg-type]
    panel = make_panel(toy_lm, "ass")
    length, tokens = 2 + len(HOSTILE), panel.trajectory.tokens.clone()
    tokens[0, :length] = torch.arange(8, 8 + length)
    text = lm.text(tokens[:, :length])[0]
    panel = replace(panel, trajectory=replace(panel.trajectory, tokens=tokens), text=text, recorded=text + "\ud83d")
    nasty = text + "</style></title>"
    data = data_of(render(page_data(lm, nasty, [replace(panel, decoder=panel.decoder.replace(name=nasty))])))
    assert data["prompt"] == data["panels"][0]["decoder"] == nasty
    assert (data["panels"][0]["text"], data["panels"][0]["recorded"]) == (panel.text, panel.recorded)
    texts = [data["vocabulary"]["texts"][t] for t in data["panels"][0]["token"]]
    assert texts[:length] == ["⟨E2 82⟩", "⟨AC⟩", *HOSTILE.values()]
    write_page(tmp_path / "page.html", lm, nasty, [panel])
    with open_page(tmp_path / "page.html") as (page, problems):
        assert page.title() == "toy · ass"
        assert page.locator(".canvas .cell span").all_text_contents()[: len(texts)][2:4] == list(HOSTILE.values())[:2]
        assert page.locator("#prompt pre").text_content() == nasty
        page.locator(".canvas .cell").first.hover()  # not what greedy decoding took
        assert page.locator(".inspector li").count() == 5 and page.locator(".taken").count() == 0
        assert problems == []


def test_masks_and_ends_have_signs(toy_lm: MaskedLM, dream_lm: MaskedLM) -> None:
    assert token_glyph(dream_lm, 380) == "⟨380⟩"  # unknown to the tokenizer
    assert token_glyph(toy_lm, toy_lm.mask_id) == "·"
    assert {token_glyph(toy_lm, t) for t in toy_lm.end_ids} == {"∎"}
    assert visible("a b") == "a␣b" and visible("\ufffd") == "\ufffd"


def made_up(length: int, vocabulary: int) -> tuple[MaskedLM, Panel]:
    """A decode of one token a step with candidates that nobody computed."""
    generator = torch.Generator().manual_seed(0)
    decoder = make_decoder(f"full:steps={length}", max_new_tokens=length)
    ids = torch.randint(3, vocabulary, (1, length), generator=generator)
    step = torch.randperm(length, generator=generator)[None].to(torch.int16)
    prompt = torch.zeros(1, 1, dtype=torch.int64)
    trajectory = Trajectory(prompt, prompt == 0, ids, step, -torch.rand(1, length), 2, decoder.config())
    draws = [torch.randint(3, vocabulary, (n, 5), generator=generator) for n in range(length, 0, -1)]
    tokenizer = SimpleNamespace(decode=lambda ids: f"word{ids[0]}", convert_ids_to_tokens=str)
    ids_of = {"mask_id": 2, "end_ids": (0, 1), "block_length": None}
    lm: Any = SimpleNamespace(name="made up", weights="none", tokenizer=tokenizer, **ids_of)
    candidates = [(d, torch.rand(d.shape, generator=generator)) for d in draws]
    return lm, Panel(decoder, trajectory, candidates, "", None, None)


@pytest.mark.parametrize("vocabulary", [60_000, 126_000])
def test_a_long_decode_fits(tmp_path: Path, vocabulary: int) -> None:
    lm, panel = made_up(256, vocabulary)
    size = write_page(tmp_path / "page.html", lm, "", [panel, panel])
    assert size == (tmp_path / "page.html").stat().st_size < 5_000_000
    data = data_of((tmp_path / "page.html").read_text())
    assert data["wide"] == (vocabulary > 2**16)
    masked = candidates_of(data, data["panels"][1])
    assert [t for t, _ in masked[7, int(panel.trajectory.step[0].argmax())]] in panel.candidates[7][0].tolist()
    with pytest.raises(UserError, match=r"more than .*: choose fewer --candidates, fewer decoders"):
        write_page(tmp_path / "page.html", lm, "another", [panel, panel], limit=size)
    assert [p.stat().st_size for p in tmp_path.iterdir()] == [size]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an evaluation."""
    output = tmp_path_factory.mktemp("view") / "run"
    decoders = ["semi-ar:steps=12", "full-random:steps=8"]
    settings = {"decoder": decoders, "limit": 3, "seed": 1, "max_new_tokens": 96, "early_stop": False}
    evaluate(EvalConfig(**settings, output=str(output)))  # type: ignore[arg-type]
    return output


def records_of(run: Path, decoder: str, task: str = "countdown") -> Path:
    return next((run / "records").glob(f"{task}--{decoder}*.jsonl"))


def test_records_are_decoded_again(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, output = [records_of(run, "semi-ar"), records_of(run, "full-random")], tmp_path / "page.html"
    command([*map(str, files), "--index", "2", "--output", str(output)])
    data = data_of(output.read_text())
    for panel, file in zip(data["panels"], files, strict=True):
        record = next(r for r in map(json.loads, file.read_text().splitlines()) if r["index"] == 2)
        assert panel["text"] == panel["recorded"] == record["completion"]
        assert (panel["nfe"], panel["solved"], data["prompt"]) == (record["nfe"], record["solved"], record["prompt"])
        assert sum(s >= 0 for s in panel["step"]) == record["committed"] == 96
    said = capsys.readouterr()
    assert said.out == f"page  {output}  ({output.stat().st_size / 1e6:.2f} MB)\n" and said.err == ""
    task = ["--task", "countdown", "--index", "2", "--seed", "1", "--max-new-tokens", "96", "--output", str(output)]
    command([*task, "--no-early-stop", "--decoder", "semi-ar:steps=12", "full-random:steps=8"])
    again = data_of(output.read_text())["panels"]
    assert [{**p, "recorded": None} for p in data["panels"]] == again


def test_the_model_is_the_records_own_where_no_other_is_named() -> None:
    config = {"model": {"name": "base + lora", "dtype": "bfloat16"}, "adapter": "lora", "revision": "main"}
    config["load_in_4bit"] = True
    own = source_of(config, ViewArguments())
    assert (own.model, own.adapter, own.revision, own.dtype) == ("base", "lora", "main", "bfloat16")
    assert own.load_in_4bit and not own.trust_remote_code
    other = source_of(config, ViewArguments(model="there", dtype="float32"))
    assert (other.model, other.adapter, other.revision, other.dtype) == ("there", None, None, "float32")
    assert not other.load_in_4bit and source_of(config, ViewArguments(adapter="mine")).adapter == "mine"


def test_a_text_that_differs_from_the_record_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "run" / "records"
    other.mkdir(parents=True)
    (other.parent / "config.json").write_text((run / "config.json").read_text())
    file = other / records_of(run, "semi-ar").name
    rows = [json.loads(line) for line in records_of(run, "semi-ar").read_text().splitlines()]
    file.write_text("".join(json.dumps({**r, "completion": "something else"}) + "\n" for r in rows))
    command([str(file), "--output", str(tmp_path / "page.html")])
    (panel,) = data_of((tmp_path / "page.html").read_text())["panels"]
    assert panel["recorded"] == "something else" != panel["text"] and panel["solved"] is None
    assert "semi-ar:steps=12 writes another text now" in capsys.readouterr().out


def test_a_prompt_gives_what_generate_prints_and_names_are_no_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yaml").write_text('name: "[/bold] x"\nsteps: 8\ntemperature: 1\n')
    same = ["make 29 from 3 8 5", "--decoder", str(tmp_path / "x.yaml"), "--seed", "3", "--max-new-tokens", "32"]
    command([*same, "--prefill", "<reasoning>3", "--output", str(tmp_path / "page.html")])
    assert capsys.readouterr().err == ""
    generate([*same, "--prefill", "<reasoning>3"])
    data = data_of((tmp_path / "page.html").read_text())
    assert data["panels"][0]["text"] == capsys.readouterr().out.removesuffix("\n")
    assert data["prompt"] == "<|user|>make 29 from 3 8 5<|assistant|><reasoning>3"
    assert data["panels"][0]["decoder"] == "[/bold] x"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "0 prompts: use one text"),
        (["nothing.jsonl"], "nothing.jsonl is in no run's records: use RUN/records/"),
        (["RUN"], "is no records file: use RUN/records/TASK--DECODER.jsonl of unmask eval, or one text"),
        (["RECORDS", "text"], "text is no records file"),
        (["RECORDS"] * 5, "5 records files: a page shows one to 4"),
        (["a", "--decoder", "asss"], "did you mean 'ass'"),
        (["a", "--index", "1"], "index is 1, but a prompt has no others: leave it out"),
        (["a", "--task", "sudoku"], "prompt is ['a'], but the task decides that"),
        (["a", "--candidates", "0"], "candidates is 0: choose 1 to 20"),
        (["a", "--model", "nowhere", "--output", "/proc/nothing/x.html"], "cannot write to /proc/nothing/x.html"),
        (["a", "--max-new-tokens", "4000"], "at most 2048 together"),
        (["RECORDS", "--decoder", "full"], "decoder is ['full'], but the records decide that: leave it out"),
        (["RECORDS", "--index", "3"], "no record of problem 3 (it has 3)"),
        (["RECORDS", "SUDOKU"], "hold different prompts at index 0"),
        (["RECORDS", "--model", "TOY"], "but toy has"),
        (["UNTOLD"], "is in no run's records: use RUN/records/"),
        (["LACKING"], "(it lacks 'seed'): evaluate again"),
        (["CUT"], "holds no record of problem 0 (it has 0): choose another"),
    ],
)
def test_mistakes_are_one_sentence(
    run: Path, toy_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("toy").symlink_to(toy_folder)
    files = [str(records_of(run, "semi-ar", task)) for task in ("countdown", "sudoku")]
    names = {"RUN": str(run), "RECORDS": files[0], "SUDOKU": files[1], "TOY": "toy"}
    whole = (run / "config.json").read_text()
    for name, config in (("UNTOLD", ""), ("LACKING", '{"model": {}, "tasks": {}, "decoders": {}}'), ("CUT", whole)):
        names[name] = f"{name}/records/{Path(files[0]).name}"
        Path(names[name]).parent.mkdir(parents=True)
        Path(names[name]).write_text("{" if name == "CUT" else "")
        if config:
            Path(name, "config.json").write_text(config)
    before = {p for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(UserError) as error:
        command([names.get(a, a) for a in arguments])
    assert said in str(error.value) and "\n" not in str(error.value)
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == before
