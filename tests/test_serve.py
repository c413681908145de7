"""``unmask serve``: the real OpenAI client, answers equal to ``lm.generate``, rows that come and go, refusals, signals."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest

from conftest import PROMPTS, toy, toy_that_ends
from serving import client, fetch, send_and_leave, serving
from unmask.cli import main
from unmask.decoding import make_decoder
from unmask.decoding.generate import PreparedRow
from unmask.decoding.loop import DecodingLoop
from unmask.models.masked_lm import MaskedLM
from unmask.serve.engine import Completion
from unmask.serve.service import Service
from unmask.view.page import horizons

CHAT = [[{"role": "user", "content": text}] for text in PROMPTS]
SPECS = [
    "semi-ar:block_length=16",
    "full",
    "eoser-ass",
    "threshold:threshold=0.3,block_length=8",
    "eoser:steps=8",
    "semi-ar:block_length=8,temperature=0.7",
]
SPECS += [
    "full:cfg_scale=0.5,steps=8",
    "semi-ar:block_length=8,cache=dual",
    "less:threshold=0.2,stable=1,block_length=16",
    "eb:entropy_bound=1",
]


@pytest.fixture(scope="module")
def lm() -> MaskedLM:
    """A toy whose texts end sooner or later."""
    return toy_that_ends(1.6)


@pytest.fixture(scope="module")
def served(lm: MaskedLM) -> Iterator[tuple[str, Service]]:
    with serving(lm, max_batch=8) as found:
        yield found


@pytest.fixture
def api(served: tuple[str, Service]) -> openai.OpenAI:
    return client(served[0])


def idle(service: Service, seconds: float = 60) -> bool:
    """Whether all rows have left within a time."""
    end = time.monotonic() + seconds
    while (service.engine.running or service.engine.waiting) and time.monotonic() < end:
        time.sleep(0.01)
    return not service.engine.running and not service.engine.waiting


@pytest.mark.parametrize("spec", SPECS)
def test_an_answer_is_that_of_generate(api: openai.OpenAI, lm: MaskedLM, spec: str) -> None:
    made = api.chat.completions.create(
        model="toy",
        messages=CHAT[1],
        max_tokens=32,
        seed=3,
        logprobs=True,
        extra_body={"decoder": spec, "return_trajectory": True},
    )
    (choice,), own = made.choices, lm.generate(CHAT[1], spec, max_new_tokens=32, seed=3)
    found: dict[str, Any] = choice.trajectory  # type: ignore[attr-defined]
    assert choice.message.content == own.texts[0]
    assert found["tokens"] == own.trajectory.tokens[0].tolist() and found["step"] == own.trajectory.step[0].tolist()
    assert found["logprob"] == pytest.approx(own.trajectory.logprob[0].tolist(), abs=1e-4)
    length = int(lm.lengths(own.trajectory.tokens))
    assert choice.finish_reason == ("stop" if length < 32 else "length")
    assert [t.logprob for t in choice.logprobs.content] == found["logprob"][:length]  # type: ignore[union-attr]
    assert "".join(t.token for t in choice.logprobs.content) == own.texts[0]  # type: ignore[union-attr]
    usage = made.usage.model_dump()  # type: ignore[union-attr]
    prompt = len(lm.tokens(lm.render(CHAT[1])))
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["forward_passes"]) == (prompt, length, own.nfe[0])


def test_a_stream_says_the_same_piece_by_piece(api: openai.OpenAI, lm: MaskedLM) -> None:
    """Text is final when it is sent, drafts rebuild the trajectory, and the last chunk counts."""
    for spec in ("semi-ar:block_length=8", "full"):
        stream = api.chat.completions.create(
            model="toy",
            messages=CHAT[3],
            max_tokens=32,
            stream=True,
            extra_body={"decoder": spec, "stream_options": {"drafts": True, "include_usage": True}},
        )
        text, canvas, pieces, usage = "", [], 0, None
        for chunk in stream:
            if chunk.choices:
                pieces += bool(chunk.choices[0].delta.content)
                text += chunk.choices[0].delta.content or ""
            draft = getattr(chunk, "draft", None)
            if draft and "canvas" in draft:
                canvas = [(-1, -1)] * draft["canvas"]
            elif draft:
                for at, token, _, _ in draft["cells"]:
                    canvas[at] = (token, draft["step"])
            usage = chunk.usage or usage
        own = lm.generate(CHAT[3], spec, max_new_tokens=32)
        found = own.trajectory
        assert text == own.texts[0] and (pieces > 1 or spec == "full")
        committed = [
            (t, s) if s >= 0 else (-1, -1)
            for t, s in zip(found.tokens[0].tolist(), found.step[0].tolist(), strict=True)
        ]
        assert canvas == committed
        assert usage.completion_tokens == int(lm.lengths(found.tokens))  # type: ignore[union-attr]


def test_rows_that_wait_for_each_other_are_told_of_each_step_once(served: tuple[str, Service], lm: MaskedLM) -> None:
    """An approximate cache under a threshold: a row that is ahead waits at the end of its block."""
    body = {"prompt": PROMPTS, "max_tokens": 32, "stream": True, "stream_options": {"drafts": True}, "stop": "never"}
    body["decoder"] = "threshold:threshold=0.2,block_length=8,cache=dual"
    _, text, _ = fetch(f"{served[0]}/v1/completions", body)
    chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    assert not [chunk for chunk in chunks if "error" in chunk]
    told = [(c["draft"]["index"], c["draft"]["step"]) for c in chunks if "step" in c.get("draft", {})]
    assert len(told) == len({*told}) > 4
    said = ["".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == i) for i in range(4)]
    own = lm.generate([lm.tokens(text) for text in PROMPTS], body["decoder"], max_new_tokens=32)
    assert said == own.texts


def test_templates_raw_prompts_and_lists(api: openai.OpenAI, lm: MaskedLM) -> None:
    template = "make <|mask:3|> from 1 2 <|mask:4|>."
    made = api.completions.create(model="toy", prompt=template, logprobs=1, extra_body={"decoder": "eoser:steps=2"})
    own = lm.generate(template, "eoser:steps=2")
    gaps = [
        t for t, s in zip(*(x[0].tolist() for x in (own.trajectory.tokens, own.trajectory.step)), strict=True) if s >= 0
    ]
    shown = [t for t in gaps if t not in lm.end_ids]
    assert made.choices[0].text == own.texts[0] and made.choices[0].finish_reason == "stop"
    assert made.usage.completion_tokens == len(shown)  # type: ignore[union-attr]
    assert made.choices[0].logprobs.tokens == [lm.tokenizer.decode([t]) for t in shown]  # type: ignore[union-attr]
    ids = [lm.tokens(text) for text in PROMPTS]
    texts = lm.generate(ids, "semi-ar", max_new_tokens=32).texts
    for prompts in (PROMPTS, ids):
        made = api.completions.create(model="toy", prompt=prompts, max_tokens=32)
        assert [choice.text for choice in made.choices] == texts
    last = [*CHAT[0], {"role": "assistant", "content": "it is <|mask:5|>!"}]
    made_chat = api.chat.completions.create(model="toy", messages=last)  # type: ignore[arg-type]
    assert made_chat.choices[0].message.content == lm.generate(last).texts[0]


def test_several_completions_draw_from_seeds_that_follow(api: openai.OpenAI, lm: MaskedLM) -> None:
    how: dict[str, Any] = {"model": "toy", "messages": CHAT[2], "max_tokens": 32, "temperature": 1.0}
    made = api.chat.completions.create(**how, n=4, seed=5)
    own = lm.generate(CHAT[2], "semi-ar:temperature=1", max_new_tokens=32, num_return_sequences=4, seed=5)
    texts = [choice.message.content for choice in made.choices]
    assert texts == own.texts and len({*texts}) > 1
    unseeded = [api.chat.completions.create(**how) for _ in range(3)]
    seeds = {made.seed for made in unseeded}  # type: ignore[attr-defined]
    assert len(seeds) == 3
    again = api.chat.completions.create(**how, seed=unseeded[0].seed)  # type: ignore[attr-defined]
    assert again.choices[0].message.content == unseeded[0].choices[0].message.content


@pytest.mark.parametrize("spec", ["full", "semi-ar:block_length=8"])
def test_stop_strings_and_max_tokens_cut_the_text(api: openai.OpenAI, lm: MaskedLM, spec: str) -> None:
    whole = lm.generate(CHAT[3], spec, max_new_tokens=32)
    stop = whole.texts[0][5:7]
    how: dict[str, Any] = {"model": "toy", "messages": CHAT[3], "extra_body": {"decoder": spec}}
    made = api.chat.completions.create(**how, max_tokens=32, stop=[stop, "never"], logprobs=True)
    text = whole.texts[0][: whole.texts[0].find(stop)]
    assert made.choices[0].message.content == text and made.choices[0].finish_reason == "stop"
    tokens = [token.token for token in made.choices[0].logprobs.content]  # type: ignore[union-attr]
    assert len("".join(tokens[:-1])) < len(text) <= len("".join(tokens))
    chunks = api.chat.completions.create(**how, max_tokens=32, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    if spec != "full":  # it ends as soon as nothing can follow, and a canvas is rounded up to whole blocks
        assert made.usage.forward_passes < whole.nfe[0]  # type: ignore[union-attr]
        cut = api.chat.completions.create(**how, max_tokens=10)
        canvas = lm.generate(CHAT[3], spec, max_new_tokens=16).trajectory.tokens
        assert cut.choices[0].message.content == lm.text(canvas[:, :10])[0] and cut.choices[0].finish_reason == "length"
        assert cut.usage.completion_tokens == 10  # type: ignore[union-attr]


def test_mixed_requests_at_random_times_do_not_meet(served: tuple[str, Service], lm: MaskedLM) -> None:
    """64 requests of any decoder, length and prompt, streamed or not: each gets what it would get alone."""
    draw, (_, service), api = random.Random(0), served, client(served[0])
    asked = [
        (draw.randrange(4), draw.choice(SPECS), draw.choice([16, 32, 64]), draw.random() < 0.5, draw.random() * 2)
        for _ in range(64)
    ]

    def ask(prompt: int, spec: str, length: int, stream: bool, wait: float) -> str:
        time.sleep(wait)
        how: dict[str, Any] = {"model": "toy", "messages": CHAT[prompt], "max_tokens": length, "seed": 7}
        made = api.chat.completions.create(**how, stream=stream, extra_body={"decoder": spec})
        if not stream:
            return made.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in made if chunk.choices)

    shared = []
    service.engine.on_pass, before = (lambda s, rows: shared.append(rows)), service.engine.on_pass
    with ThreadPoolExecutor(64) as pool:
        texts = list(pool.map(lambda one: ask(*one), asked))
    service.engine.on_pass = before
    alone = {one[:3]: lm.generate(CHAT[one[0]], one[1], max_new_tokens=one[2], seed=7).texts[0] for one in asked}
    assert texts == [alone[one[:3]] for one in asked]
    assert max(shared) > 4 and idle(service)


def test_block_causal_models_keep_their_exact_cache() -> None:
    lm = toy(block_length=8)
    with serving(lm, max_batch=4) as (address, _):
        api = client(address)

        def ask(prompt: int) -> str:
            made = api.chat.completions.create(model="toy", messages=CHAT[prompt % 4], max_tokens=30)
            return str(made.choices[0].message.content)

        with ThreadPoolExecutor(8) as pool:
            texts = list(pool.map(ask, range(12)))
        template = "a <|mask:5|> b and then something long <|mask:13|> c"
        filled = api.completions.create(model="toy", prompt=template)
    own = lm.text(lm.generate(CHAT, "semi-ar", max_new_tokens=32).trajectory.tokens[:, :30])
    assert texts == own * 3 and filled.choices[0].text == lm.generate(template).texts[0]


def test_drafts_of_a_block_model_say_what_was_open() -> None:
    """Its blocks are counted from the prompt's first token, and a page draws what a draft says."""
    lm = toy(block_length=8)
    with serving(lm) as (address, service):
        for chat in CHAT:
            stream = client(address).chat.completions.create(
                model="toy", messages=chat, max_tokens=32, stream=True, extra_body={"stream_options": {"drafts": True}}
            )
            drafts = [chunk.draft for chunk in stream if "step" in getattr(chunk, "draft", {})]
            cells = [(cell[0], draft["horizon"]) for draft in drafts for cell in draft["cells"]]
            assert len(cells) == 32 and all(at < horizon for at, horizon in cells)
            assert min(horizon for _, horizon in cells) <= 8
            own = lm.generate([chat], "semi-ar", max_new_tokens=32)
            decoder = make_decoder("semi-ar", max_new_tokens=32).within(8)
            whole = horizons(lm, decoder, own.trajectory)
            assert all(at < whole[step] for at, step in enumerate(own.trajectory.step[0].tolist()))
        assert idle(service)


def test_a_fault_ends_its_own_rows_alone(lm: MaskedLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what one loop does, in the text of a finished row, and in a shared forward pass; then the engine goes on."""
    with serving(lm) as (address, service), ThreadPoolExecutor(2) as pool:

        def ask(decoder: str) -> int:
            return fetch(f"{address}/v1/chat/completions", {"messages": CHAT[1], "max_tokens": 32, "decoder": decoder})[
                0
            ]

        with monkeypatch.context() as patch:
            choose = DecodingLoop.choose

            def fail(self: DecodingLoop, *rest: Any) -> Any:
                if self.decoder.stable:
                    raise RuntimeError("out of memory")
                return choose(self, *rest)

            patch.setattr(DecodingLoop, "choose", fail)
            assert [*pool.map(ask, ("less:block_length=8", "full:steps=32"))] == [500, 200]
        with monkeypatch.context() as patch:
            patch.setattr(service.lm, "lengths", lambda tokens: 1 / 0)
            assert ask("full") == 500
        with monkeypatch.context() as patch:
            patch.setattr(service.lm.model, "forward", lambda *_, **__: 1 / 0)
            assert [*pool.map(ask, ("full", "eoser"))] == [500, 500]
        assert ask("full") == 200 and idle(service)


def test_the_servers_own_decoder_may_be_a_file(lm: MaskedLM, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("preset: semi-ar\nblock_length: 16\n")
    with serving(replace(lm, name=str(tmp_path)), decoder=str(tmp_path / "own.yaml")) as (address, _):
        own = lm.text(lm.generate(CHAT[3], "semi-ar:block_length=16", max_new_tokens=32).trajectory.tokens[:, :20])
        for decoder in ({}, {"decoder": "default"}):
            body = {"messages": CHAT[3], "max_tokens": 20, **decoder}
            assert fetch(f"{address}/v1/chat/completions", body)[1]["choices"][0]["message"]["content"] == own[0]
        for path, bad in (("completions", {"prompt": [10**6]}), ("completions", {"prompt": "<|mask:9999|>"})):
            said = fetch(f"{address}/v1/{path}", bad)[1]["error"]["message"]
            assert tmp_path.name in said and str(tmp_path) not in said
        assert fetch(f"{address}/unmask/info")[1]["default_decoder"] == "default"


def test_text_is_final_when_it_is_sent() -> None:
    """Half a character is held back, and no stop string is found in it."""
    tokens = [*"aé😀b".encode()]
    sent = []
    letters = SimpleNamespace(decode=lambda ids: bytes(ids).decode(errors="replace"))
    fake = SimpleNamespace(mask_id=-1, end_ids=(), tokenizer=letters, text=lambda t: [letters.decode(t[0].tolist())])
    for stop in ((), ("\ufffd",), ("😀b",)):
        done = Completion(
            PreparedRow("x"), make_decoder("full", max_new_tokens=8), 0, sent.append, stop, canvas=[-1] * 8
        )
        steps = [done.commit(fake, i, [(i, token, 0.0)], 8) for i, token in enumerate(tokens)]  # type: ignore[arg-type]
        texts = [step.text for step, _ in steps]
        assert all(b.startswith(a) for a, b in pairwise(texts)) and not any("\ufffd" in text for text in texts)
        assert texts[-1] == ("aé" if stop == ("😀b",) else "aé😀b")
        assert [ended for _, ended in steps].index(True) == 7


BAD: list[tuple[dict[str, Any], int, str]] = [
    ({"messages": []}, 400, "messages: "),
    ({"messages": [{"role": "user", "content": " "}] * 2, "max_tokens": 3000}, 400, "takes at most 1024 together"),
    ({"model": "gpt-4"}, 404, "there is no model 'gpt-4': use 'toy'"),
    ({"n": 3}, 400, "draws no random numbers, so all would be equal: set a temperature"),
    ({"n": 300, "temperature": 1}, 400, "300 completions are asked for, and the queue takes 1 to 256 at a time"),
    ({"decoder": "nothing"}, 400, "unknown decoder 'nothing'"),
    ({"decoder": "os:getcwd"}, 400, "unknown decoder 'os:getcwd'"),
    ({"decoder": "full:confidence=os:getcwd"}, 400, "decoder: "),
    ({"decoder": "full:confidence=os.getcwd"}, 400, "unknown confidence"),
    ({"decoder": "/etc/passwd.yaml"}, 400, "decoder: "),
    ({"decoder": "secret.yaml"}, 400, "unknown decoder 'secret.yaml'"),
    ({"decoder": "eoser:gamma=0.1"}, 400, "gamma"),
    ({"tools": []}, 400, "tools: this field is unknown here"),
    ({"stop": ["a", ""]}, 400, "stop has 2 strings"),
    ({"temperature": -1}, 400, "temperature: "),
    ({"seed": 2**62}, 400, "seed: "),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty: "),
    ({"prefill": "<|mdm_mask|>"}, 400, "holds the mask token"),
    ({"stop": "a" * 2000}, 400, "each of 1 to 1000 characters"),
    ({"decoder": "localleap:leap_radius=1000000000000"}, 400, "leap_radius of decoder"),
    ({"decoder": "less:stable=" + "9" * 30}, 400, "stable of decoder"),
    ({"decoder": "full:cfg_scale=1e38"}, 400, "cfg_scale of decoder"),
    ({"prefill": "<|mask:1000|>" * 500}, 400, "the template is longer than the 1024 tokens that toy takes"),
    ({"prefill": "a<|mask:99999999999|>"}, 400, "a gap has 99999999999 tokens, but toy takes at most 1024"),
]


@pytest.mark.parametrize("change, status, says", BAD, ids=[str(i) for i in range(len(BAD))])
def test_what_is_refused_is_one_sentence_in_the_form_of_openai(
    served: tuple[str, Service], change: dict[str, Any], status: int, says: str
) -> None:
    found, body, _ = fetch(f"{served[0]}/v1/chat/completions", {"model": "toy", "messages": CHAT[0], **change})
    assert found == status and says in body["error"]["message"] and "Traceback" not in str(body)
    assert {*body["error"]} == {"message", "type", "param", "code"}
    with pytest.raises(openai.APIStatusError) as caught:
        client(served[0]).chat.completions.create(**{"model": "toy", "messages": CHAT[0], "extra_body": change})  # type: ignore[call-overload]
    assert caught.value.status_code == status and says in caught.value.message


def test_other_paths_methods_and_bodies(served: tuple[str, Service]) -> None:
    for path, body, status in (
        ("/v1/nothing", None, 404),
        ("/v1/chat/completions", None, 405),
        ("/v1/completions", {"prompt": ["a<|mask:1|>"] * 50_000}, 400),
        ("/v1/completions", {"prompt": []}, 400),
        ("/v1/completions", {"prompt": [[]]}, 400),
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"[" * 100_000, 400),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
        ("/v1/chat/completions", b'{"temperature": NaN, "messages": [{"role": "user", "content": "a"}]}', 400),
        ("/v1/chat/completions", b" " * (2**20 + 1), 413),
        ("/v1/models/other", None, 404),
        ("/assets/../page.html", None, 404),
        ("/unmask/grade", {"task": "nothing", "index": 0, "completion": ""}, 400),
    ):
        found, data, _ = fetch(served[0] + path, body)
        assert (found, {*data}) == (status, {"error"}), path
    _, _, headers = fetch(f"{served[0]}/")
    assert "default-src 'none'" in headers["content-security-policy"] and "access-control-allow-origin" not in headers


def test_a_full_queue_says_when_to_come_again_and_loses_nothing(lm: MaskedLM) -> None:
    with serving(lm, max_batch=1, max_queue=2) as (address, service):

        def ask(_: int) -> tuple[int, Any]:
            body = {"messages": CHAT[0], "max_tokens": 64, "decoder": "full:steps=64"}
            status, found, headers = fetch(f"{address}/v1/chat/completions", body)
            assert status == 200 or (status == 429 and headers["retry-after"] == "1"), found
            return status, found

        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(ask, range(24)))
        served_texts = {body["choices"][0]["message"]["content"] for status, body in found if status == 200}
        assert {status for status, _ in found} == {200, 429} and len(served_texts) == 1
        assert idle(service)


def test_deadlines_and_clients_that_go_away(lm: MaskedLM) -> None:
    """200 connections are closed at random points; the rows leave, and what others get stays the same."""
    long: dict[str, Any] = {"messages": CHAT[0], "max_tokens": 256, "decoder": "full:steps=256"}
    with serving(lm, max_batch=4, deadline=60) as (address, service):
        status, body, _ = fetch(f"{address}/v1/chat/completions", {**long, "timeout": 0.2})
        assert status == 504 and "deadline" in body["error"]["message"] and idle(service, 5)
        draw, api = random.Random(1), client(address)
        points = [(draw.random() < 0.5, draw.choice([0, 0, 1, 200, 3000])) for _ in range(200)]

        def leave(stream: bool, after: int) -> None:
            drafts = {"stream": True, "stream_options": {"drafts": True}} if stream else {}
            send_and_leave(address, {**long, **drafts}, after if stream else 0)

        with ThreadPoolExecutor(16) as pool:
            left = [pool.submit(leave, *point) for point in points]
            made = [api.chat.completions.create(model="toy", messages=CHAT[1], max_tokens=32) for _ in range(5)]
            for one in left:
                one.result()
        own = lm.generate(CHAT[1], "semi-ar", max_new_tokens=32).texts[0]
        assert [one.choices[0].message.content for one in made] == [own] * 5
        assert idle(service, 10) and threading.active_count() < 60


def test_keys(lm: MaskedLM, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lm, api_key="se cret") as (address, _):
        for path in ("/v1/models", "/unmask/info", "/metrics", "/openapi.json"):
            assert fetch(address + path)[0] == 401
            assert fetch(address + path, Authorization="Bearer se")[0] == 401
            assert fetch(address + path, Authorization="Bearer se cret")[0] == 200
        assert fetch(f"{address}/health")[0] == 200 and fetch(address)[0] == 200
        assert client(address, "se cret").models.list().data[0].id == "toy"
        with pytest.raises(openai.AuthenticationError):
            client(address).models.list()
    monkeypatch.delenv("UNMASK_API_KEY", raising=False)
    for flags, says in (
        (["--host", "0.0.0.0"], "there is no API key"),
        (["--host", "::"], "there is no API key"),
        (["--host", "no.such.host.invalid", "--no-auth"], "cannot listen on no.such.host.invalid"),
        (["--port", "70000"], "port is 70000"),
        (["--decoder", "nothing"], "unknown decoder 'nothing'"),
        (["--max-batch", "0"], "max_batch is 0"),
        (["--api-key", "ä"], "printable ASCII"),
    ):
        assert main(["serve", "--port", "0", *flags]) == 2
        assert says in capsys.readouterr().err


@contextmanager
def process(folder: str, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server process and its address, once it answers."""
    command = [sys.executable, "-m", "unmask", "serve", "--model", folder, "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            address = re.sub(r"page\s+(\S+?)/\n", r"\1", started.stdout.readline())  # type: ignore[union-attr]
            while True:
                with suppress(OSError):
                    if fetch(f"{address}/health")[0] == 200:
                        break
                assert started.poll() is None, started.communicate()
                time.sleep(0.1)
            yield started, address
        finally:
            started.kill()


def test_signals(toy_folder: str) -> None:
    """SIGTERM lets what runs finish; after kill -9 the same port serves again; no prompt and no path are told unasked."""
    body = {"messages": [{"role": "user", "content": "a secret"}], "max_tokens": 256, "decoder": "full:steps=256"}
    with process(toy_folder) as (_, address):
        assert fetch(f"{address}/v1/models")[1]["data"][0]["id"] == Path(toy_folder).name
        port = address.rsplit(":", 1)[1]  # killed below
    with process(toy_folder, "--port", port) as (server, address), ThreadPoolExecutor(1) as pool:
        running = pool.submit(fetch, f"{address}/v1/chat/completions", body)
        time.sleep(0.3)
        server.send_signal(signal.SIGTERM)
        status, found, _ = running.result()
        assert status == 200 and found["usage"]["forward_passes"] > 0
        out, err = server.communicate(timeout=60)
        assert "secret" not in out + err and "Traceback" not in err
    with process(toy_folder, "--log-prompts") as (server, address):
        assert fetch(f"{address}/v1/chat/completions", {**body, "max_tokens": 8, "decoder": "full"})[0] == 200
        server.send_signal(signal.SIGINT)
        out, err = server.communicate(timeout=60)
        assert server.returncode == 0 and "a secret" in err and "Traceback" not in err


def test_what_the_page_asks_for(served: tuple[str, Service], lm: MaskedLM) -> None:
    """Examples, grades, candidates of a state, the page as a file."""
    from browser import data_of
    from unmask.decoding.score import replay

    address = served[0]
    info = fetch(f"{address}/unmask/info")[1]
    assert {e["task"] for e in info["examples"]} == {"sudoku", "countdown"} and info["default_decoder"] == "semi-ar"
    assert {f["name"] for f in info["fields"]} > {"steps", "threshold", "eos"} and all(
        f["about"] for f in info["fields"] if f["name"] == "steps"
    )
    grade = fetch(f"{address}/unmask/grade", {"task": "countdown", "index": 0, "completion": "<answer>1</answer>"})[1]
    assert grade["solved"] is False
    asked = {"messages": CHAT[0], "max_tokens": 16, "decoder": "semi-ar:block_length=8", "return_trajectory": True}
    choice = fetch(f"{address}/v1/chat/completions", asked)[1]["choices"][0]
    state = {
        "messages": CHAT[0],
        "decoder": asked["decoder"],
        **{k: choice["trajectory"][k] for k in ("tokens", "step")},
    }
    own = lm.generate(CHAT[0], "semi-ar:block_length=8", max_new_tokens=16).trajectory
    again = replay(lm, own)[0]
    for before in range(own.steps):
        cells = fetch(f"{address}/unmask/candidates", {**state, "before": before, "count": 3})[1]["cells"]
        assert {*map(int, cells)} == {*(own.state(before)[0] == lm.mask_id).nonzero()[:, 0].tolist()}
        for at in (own.step[0] == before).nonzero()[:, 0].tolist():
            token, _, share = cells[str(at)][0]
            assert token == own.tokens[0, at] and share == pytest.approx(again[at].exp().item(), abs=1e-4)
    panel = {**state, "logprob": choice["trajectory"]["logprob"], "text": "</script>", "solved": True}
    status, page, headers = fetch(f"{address}/unmask/view", {"panels": [panel, panel]})
    assert status == 200 and "attachment" in headers["content-disposition"]
    assert data_of(page)["panels"][0]["text"] == "</script>"
    for change in (
        {"step": [40] * 16},
        {"step": [0]},
        {"tokens": [10**6] * 16},
        {"messages": None},
        {"decoder": "ass"},
    ):
        status, body, _ = fetch(f"{address}/unmask/candidates", {**state, "before": 0, **change})
        assert (status, {*body}) == ((200, {"cells"}) if "decoder" in change else (400, {"error"})), change


def test_many_requests_leave_nothing_behind(served: tuple[str, Service]) -> None:
    address, service = served
    body = {"messages": CHAT[2], "max_tokens": 8, "decoder": "full:steps=1"}

    def ask(i: int) -> int:
        return fetch(f"{address}/v1/chat/completions", {**body, "stream": bool(i % 2)})[0]

    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    with ThreadPoolExecutor(4) as pool:
        assert {*pool.map(ask, range(40))} == {200}
        before = open_files()
        assert {*pool.map(ask, range(400))} == {200}
    assert open_files() <= before + 4 and idle(service)
    counted = fetch(f"{address}/metrics")[1]
    assert re.search(r'unmask_requests_total\{route="/v1/chat/completions",status="200"\} \d', counted)
    assert json.loads(json.dumps(counted))
