"""unmask as a model of lm-evaluation-harness: bounds by hand, generation as decode, and lm-eval itself on made-up tasks."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import PROMPTS, toy

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from unmask import MaskedLM, UserError, decode, make_decoder, make_task
from unmask.evaluation.lm_eval import Pair, UnmaskLM, bounds, is_greedy, mask_sets, until

TEXT = "make 5 from"


def instances(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, a, 0, ("made-up", i, 1)) for i, a in enumerate(arguments)]


def tokens(lm: MaskedLM, *texts: str) -> list[list[int]]:
    return [lm.tokenizer.encode(t, add_special_tokens=False) for t in texts]


@torch.no_grad()
def by_hand(lm: MaskedLM, context: list[int], text: list[int], masked: tuple[int, ...], w: float = 0.0) -> float:
    """The sum of the log-probabilities of the masked tokens, from whole logits of one row."""
    at = torch.tensor([[len(context) + i for i in masked]])
    hidden = [lm.mask_id if i in masked else t for i, t in enumerate(text)]
    rows = (torch.tensor([c + hidden]) for c in (context, [lm.mask_id] * len(context)))
    given, blind = (lm.model(row).logits[0, at[0]].float() for row in rows)
    logits = blind + (w + 1) * (given - blind) if w else given
    logits[:, lm.mask_id] = -torch.inf
    logprob = logits.double().log_softmax(-1)
    return float(sum(logprob[n, text[i]] for n, i in enumerate(masked)))


def subsets(length: int) -> list[tuple[int, ...]]:
    return [s for n in range(1, length + 1) for s in itertools.combinations(range(length), n)]


def expectation(lm: MaskedLM, context: list[int], text: list[int], w: float = 0.0) -> float:
    """The bound by its definition, over all masks."""
    length = len(text)
    return sum(by_hand(lm, context, text, s, w) / len(s) / math.comb(length, len(s)) for s in subsets(length))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every forward pass from here on."""
    rows: list[int] = []
    forward_head = MaskedLM.forward_head

    def counted(self: MaskedLM, ids: torch.Tensor, *more: Any) -> Any:
        rows.append(len(ids))
        return forward_head(self, ids, *more)

    monkeypatch.setattr(MaskedLM, "forward_head", counted)
    return rows


def test_few_tokens_are_exact(toy_lm: MaskedLM) -> None:
    context, *texts = tokens(toy_lm, TEXT, "1+4", "12")
    for text, w in itertools.product(texts, (0.0, 1.5)):
        hand = expectation(toy_lm, context, text, w)
        assert bounds(toy_lm, [(context, text)], 7, 0, 32, w) == pytest.approx([hand], abs=1e-4)


def test_few_tokens_of_each_block_are_exact() -> None:
    """Of a block-causal model the bound is a sum over blocks, each behind the text before it."""
    lm = toy(block_length=4)
    context, text = tokens(lm, TEXT, "1+4=5-")
    for start in range(len(context) - 4, len(context)):
        row, hand = context[:start] + text, 0.0
        edges = [0, *range(4 - start % 4, len(text), 4), len(text)]
        for a, b in itertools.pairwise(edges):
            hand += expectation(lm, row[: start + a], row[start + a : start + b])
        assert len(edges) > 2 and bounds(lm, [(context[:start], text)], 15, 0, 32) == pytest.approx([hand], abs=1e-4)
    one = bounds(lm, [(context[:9], text)], 3, 0, 32)
    both = bounds(lm, [(context[:9], text), (context[:12], text)], 3, 0, 2)
    assert both[0] == pytest.approx(one[0], abs=1e-4)


@pytest.mark.parametrize("samples", [1, 5])
def test_sampled_masks_have_the_expectation_of_all(toy_lm: MaskedLM, samples: int) -> None:
    context, text = tokens(toy_lm, TEXT, "1+4")
    value = {s: by_hand(toy_lm, context, text, s) for s in subsets(3)}
    estimates = []
    for seed in range(1000):
        masks, weights = mask_sets(3, samples, seed)
        drawn = [tuple(m.nonzero()[:, 0].tolist()) for m in masks]
        estimates.append(sum(w * value[s] for w, s in zip(weights.tolist(), drawn, strict=True)))
    found = torch.tensor(estimates, dtype=torch.float64)
    error = float(found.std()) / math.sqrt(len(found))
    assert abs(float(found.mean()) - expectation(toy_lm, context, text)) < 4 * error


def test_neither_batch_nor_order_matters(toy_lm: MaskedLM) -> None:
    texts = [(p, c) for p in PROMPTS for c in (" 1", " 1+2", " 5", " 2*3+4-1=9")] + [("", "12")]
    requests = instances("loglikelihood", *texts)
    model = UnmaskLM(toy_lm, mc_samples=20, batch_size=7)
    whole = model.loglikelihood(requests)
    alone = [model.loglikelihood([r])[0] for r in requests]
    back = UnmaskLM(toy_lm, mc_samples=20, batch_size=3).loglikelihood(requests[::-1])[::-1]
    for other in (alone, back):
        assert [b for b, _ in other] == pytest.approx([b for b, _ in whole], abs=1e-3)
        assert [g for _, g in other] == [g for _, g in whole]
    reseeded = UnmaskLM(toy_lm, mc_samples=20, seed=1).loglikelihood(requests)
    changed = [abs(a - b) > 1e-3 for (a, _), (b, _) in zip(whole, reseeded, strict=True)]
    assert changed == [len(c) > 4 for _, c in texts]  # what is exact knows no seed


def test_one_token_is_the_log_softmax_in_a_shared_pass(toy_lm: MaskedLM, passes: list[int]) -> None:
    """For every character; exactly one of them is what greedy decoding writes, the most likely one."""
    characters = [c for c in map(chr, range(33, 127)) if tokens(toy_lm, c)[0] != [toy_lm.tokenizer.unk_token_id]]
    model = UnmaskLM(toy_lm, mc_samples=1, batch_size=len(characters))
    found = model.loglikelihood(instances("loglikelihood", *((TEXT, c) for c in characters)))
    assert passes == [1, 1]  # one for the bounds, one for greedy decoding
    (context,) = tokens(toy_lm, TEXT)
    hand = [by_hand(toy_lm, context, tokens(toy_lm, c)[0], (0,)) for c in characters]
    assert [bound for bound, _ in found] == pytest.approx(hand, abs=1e-5)
    first = decode(toy_lm, *toy_lm.encode([TEXT], 1), make_decoder("full:max_new_tokens=1")).tokens[0].tolist()
    assert [greedy for _, greedy in found] == [tokens(toy_lm, c)[0] == first for c in characters]


def test_greedy_is_what_decoding_writes(toy_lm: MaskedLM, passes: list[int]) -> None:
    length, contexts = 6, tokens(toy_lm, *PROMPTS)
    decoder = make_decoder(f"full:max_new_tokens={length},steps={length}")
    written = decode(toy_lm, *toy_lm.encode(PROMPTS, length), decoder).tokens.tolist()
    pairs: list[Pair] = list(zip(contexts, written, strict=True))
    for context, text in zip(contexts, written, strict=True):
        pairs += [(context, [*text[:i], (text[i] + 1) % 90 + 10, *text[i + 1 :]]) for i in range(length)]
    assert is_greedy(toy_lm, pairs) == [True] * len(PROMPTS) + [False] * len(PROMPTS) * length
    assert len(passes) == 2 * length  # equal contexts share a row


def test_long_contexts_lose_their_beginning(toy_lm: MaskedLM, caplog: pytest.LogCaptureFixture) -> None:
    short = dataclasses.replace(toy_lm, max_length=12)
    contexts = ((short, "a long way to " + TEXT[-10:]), (toy_lm, TEXT[-10:]))
    bound, same = (UnmaskLM(lm).loglikelihood(instances("loglikelihood", (c, "12"))) for lm, c in contexts)
    assert bound == same and "1 of 1 contexts" in caplog.text
    tight = dataclasses.replace(toy_lm, max_length=8 + len(TEXT))
    texts = UnmaskLM(tight, decoder="full", max_new_tokens=8).generate_until(requests_for(["123" + TEXT, TEXT]))
    assert texts[0] == texts[1]
    with pytest.raises(UserError, match="canvas"):
        UnmaskLM(tight, decoder="full", max_new_tokens=64).generate_until(requests_for([TEXT]))
    assert UnmaskLM(toy_lm)._loglikelihood_tokens([(("a", ""), [5], [])]) == [(0.0, True)]  # nothing is certain
    for lm, text, said in ((short, [7] * 13, "takes at most 12"), (toy_lm, [toy_lm.mask_id], "holds the mask token")):
        with pytest.raises(UserError, match=said):
            UnmaskLM(lm)._loglikelihood_tokens([(("a", ""), [5], text)])


def test_rolling_sums_over_windows(toy_lm: MaskedLM) -> None:
    """Every token once; the later windows follow one token of context, the first the end token."""
    short = dataclasses.replace(toy_lm, max_length=4)
    (found,) = UnmaskLM(short).loglikelihood_rolling(instances("loglikelihood_rolling", ("12345678",)))
    (t,) = tokens(toy_lm, "12345678")
    windows = [([toy_lm.eos_id], t[:3]), ([t[2]], t[3:6]), (t[4:6], t[6:])]
    assert found == pytest.approx(sum(expectation(toy_lm, c, y) for c, y in windows), abs=1e-4)


def requests_for(prompts: list[str], **kwargs: Any) -> list[Instance]:
    return instances("generate_until", *((p, {"until": [], **kwargs}) for p in prompts))


@pytest.mark.parametrize("spec", ["eoser-ass:blocks=2", "threshold:threshold=0.5;block_length=16"])
def test_generation_is_decode(tiny_lm: MaskedLM, spec: str) -> None:
    """The same text as ``unmask.decode`` of the same prompt, in the order of the requests, whatever the batch."""
    found = UnmaskLM(tiny_lm, decoder=spec, max_new_tokens=32, batch_size=3).generate_until(requests_for(PROMPTS))
    decoder = make_decoder(spec.replace(";", ","), max_new_tokens=32)
    for prompt, text in zip(PROMPTS, found, strict=True):
        assert [text] == tiny_lm.text(decode(tiny_lm, *tiny_lm.encode([prompt], 32), decoder).tokens)


def test_a_request_sets_canvas_and_temperature(toy_lm: MaskedLM) -> None:
    """Canvases of different lengths in one call; a temperature counts where sampling is asked for."""
    model = UnmaskLM(toy_lm, decoder="full", max_new_tokens=8, batch_size=2)
    asked = [{}, {"max_gen_toks": 12}, *({"temperature": 2.0, "do_sample": sampled} for sampled in (False, True))]
    requests = [requests_for(PROMPTS[:1], **kwargs)[0] for kwargs in asked]
    plain, longer, unasked, sampled = model.generate_until(requests)
    for text, length in ((plain, 8), (longer, 12), (unasked, 8)):
        decoder = make_decoder(f"full:max_new_tokens={length}")
        assert [text] == toy_lm.text(decode(toy_lm, *toy_lm.encode([PROMPTS[0]], length), decoder).tokens)
    assert sampled != plain and [sampled] == model.generate_until(requests[3:])
    with pytest.raises(UserError, match="--gen_kwargs max_gen_toks"):
        UnmaskLM(toy_lm).generate_until(requests_for(PROMPTS, max_gen_toks=50))


def test_samples_follow_content_not_place(toy_lm: MaskedLM) -> None:
    """The order and the batch change nothing; the copies that lm-eval makes of a request differ."""
    requests = requests_for(PROMPTS, do_sample=True, temperature=1.0)
    model, other = (UnmaskLM(toy_lm, decoder="full", max_new_tokens=8, batch_size=b) for b in (4, 1))
    found = model.generate_until(requests)
    assert other.generate_until(requests[::-1])[::-1] == found
    assert len({*model.generate_until([requests[0]] * 4)}) > 1
    assert UnmaskLM(toy_lm, decoder="full", max_new_tokens=8, seed=1).generate_until(requests) != found


def test_the_first_stop_string_cuts(tiny_lm: MaskedLM) -> None:
    assert until("one two three", ["three", " two", ""]) == "one" and until("one", []) == until("one", ["x"]) == "one"
    prompt = tiny_lm.chat("make 39 from 7 3 6")
    model, kwargs = UnmaskLM(tiny_lm, decoder="ass", max_new_tokens=128), {"until": "</reasoning>"}
    whole, cut = model.generate_until(requests_for([prompt]) + requests_for([prompt], **kwargs))
    assert "</reasoning>" in whole and cut == whole.split("</reasoning>")[0]


def test_arguments_reach_the_model() -> None:
    line = "pretrained=tiny,decoder=eoser-ass:blocks=4;temperature=0.7,max_new_tokens=64,batch_size=5,dtype=float32"
    model = UnmaskLM.create_from_arg_string(line, {"batch_size": "1", "device": "cuda:0", "max_batch_size": None})
    assert model.decoder == make_decoder("eoser-ass:blocks=4,temperature=0.7", max_new_tokens=64)
    assert (model.batch_size, model.lm.name, str(model.device)) == (5, "tiny", "cpu")
    assert UnmaskLM.create_from_arg_obj({}, {"batch_size": "16"}).batch_size == 16
    info = model.get_model_info()["unmask"]
    assert json.loads(json.dumps(info))["decoder"]["blocks"] == 4 and info["model"]["weights"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("decoder=ass:blocks=4,temperature=0.7", "decoder=eoser-ass:blocks=4;temperature=0.7"),
        ("pretrained=tiny,model=tiny", "use one"),
        ("batchsize=4", "did you mean 'batch_size'"),
        ("batch_size=auto", "whole number"),
        ("mc_samples=0", "mc_samples is 0"),
    ],
)
def test_mistakes_are_sentences(line: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        UnmaskLM.create_from_arg_string(line, {"batch_size": 1})


def test_without_lm_eval_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    monkeypatch.delitem(sys.modules, "unmask.evaluation.lm_eval")
    with pytest.raises(UserError, match=r"pip install unmask\[lm-eval\]"):
        importlib.import_module("unmask.evaluation.lm_eval")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, tiny_lm: MaskedLM) -> Path:
    """Two made-up tasks: Countdown as generation, and the choice of an equation that holds."""
    folder = tmp_path_factory.mktemp("tasks")
    problems = make_task("countdown", tiny_lm.task_defaults).problems("test", 3)
    data = [{"question": p.question, "answer": str(p.response)} for p in problems]
    choices = [{"question": f"{a}+{b}=", "choices": [str(a + b), str(a * b + 1), "x"]} for a in (2, 3) for b in (4, 5)]
    shared = {"dataset_path": "json", "test_split": "test", "doc_to_text": "{{question}}"}
    generation = {"until": ["\n"], "max_gen_toks": 128, "do_sample": False}
    countdown = {"output_type": "generate_until", "doc_to_target": "{{answer}}", "generation_kwargs": generation}
    sums = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": 0}
    sums |= {"target_delimiter": ""}
    for name, own, rows in (("made_up_countdown", countdown, data), ("made_up_sums", sums, choices)):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"data_files": {"test": str(file)}, "cache_dir": str(folder / "cache")}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, "dataset_kwargs": files, **own}))
    return folder


MODEL_ARGS = "pretrained=tiny,decoder=hybrid,batch_size=4"


@pytest.fixture(scope="module")
def results(tasks: Path) -> dict[str, Any]:
    manager, names = TaskManager(include_path=str(tasks), include_defaults=False), ["made_up_countdown", "made_up_sums"]
    settings: Any = {"tasks": names, "task_manager": manager, "apply_chat_template": True, "bootstrap_iters": 0}
    return simple_evaluate(model="unmask", model_args=MODEL_ARGS, **settings) or {}


def test_lm_eval_scores_what_decoding_and_bounds_give(results: dict[str, Any], tiny_lm: MaskedLM) -> None:
    samples, decoder = results["samples"], make_decoder("hybrid", max_new_tokens=128)
    for sample in samples["made_up_countdown"]:
        ids, mask = tiny_lm.encode([tiny_lm.chat(sample["doc"]["question"])], 128)
        assert sample["resps"] == [tiny_lm.text(decode(tiny_lm, ids, mask, decoder).tokens)]
    for sample in samples["made_up_sums"]:
        (context,) = tokens(tiny_lm, tiny_lm.chat(sample["doc"]["question"]))
        hand = [expectation(tiny_lm, context, y) for y in tokens(tiny_lm, *sample["doc"]["choices"])]
        assert [resp[0][0] for resp in sample["resps"]] == pytest.approx(hand, abs=1e-3)
        assert sample["acc"] == float(hand.index(max(hand)) == 0)
    for task, metric in (("made_up_countdown", "exact_match"), ("made_up_sums", "acc")):
        share = sum(s[metric] for s in samples[task]) / len(samples[task])
        assert results["results"][task][f"{metric},none"] == pytest.approx(share)
    assert results["results"]["made_up_countdown"]["exact_match,none"] > 0  # the model has learnt it


def test_the_command_line_on_two_processes_gives_the_same(tasks: Path, results: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "lm_eval_unmask.py"
    script.write_text("import sys; from unmask.evaluation.lm_eval import command; command(sys.argv[1:])")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    flags = ["--model", "unmask", "--model_args", MODEL_ARGS, "--tasks", "made_up_countdown,made_up_sums"]
    flags += ["--include_path", str(tasks), "--apply_chat_template", "--output_path", str(tmp_path / "out")]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch, *flags], capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())
    for task, scores in results["results"].items():
        spread = {k: v for k, v in found["results"][task].items() if "stderr" in k}
        assert found["results"][task] == scores | spread
    assert found["config"]["unmask"]["decoder"]["name"] == "hybrid"
