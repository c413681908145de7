"""The backbones against a plain float64 restatement, published keys, positions, padding, windows, the self-test's refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from checkpoints import LLADA, WRITERS
from conftest import PROMPTS, SHAPE, toy
from unmask import MaskedLM, UserError, load
from unmask.models import bidirectional
from unmask.models.backbone import KVCache
from unmask.models.llada import LLaDAConfig, LLaDAModelLM

# LLaDA's names as those of transformers, in this order
PARTS = {"transformer.blocks.": "layers.", "transformer.wte": "embed_tokens", "transformer.ln_f": "norm"}
PARTS |= {"model.transformer.ff_out": "lm_head", "attn_norm": "input_layernorm", "ff_norm": "post_attention_layernorm"}
PARTS |= {f".{n}_proj": f".self_attn.{n}_proj" for n in "qkv"} | {"attn_out": "self_attn.o_proj"}
PARTS |= {"ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", "ff_out": "mlp.down_proj"}


def restated(weights: dict[str, Tensor], config: Any, ids: list[int], shifted: bool) -> Tensor:
    """Logits (T, V) in float64 of one row with full attention, head by head and token by token."""
    w = {}
    for key, value in weights.items():
        for ours, theirs in PARTS.items() if config.model_type == "llada" else ():
            key = key.replace(ours, theirs)
        w[key] = value.double()
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theta = config.rope_theta if config.model_type == "llada" else config.rope_parameters["rope_theta"]
    group = config.num_attention_heads // config.num_key_value_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean() + config.rms_norm_eps).sqrt() * w[name + ".weight"]

    def turn(x: Tensor, position: int) -> Tensor:
        pairs = torch.complex(x[: size // 2], x[size // 2 :])
        angle = position * theta ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)
        turned = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag])

    def project(x: Tensor, name: str, head: int, normed: str = "") -> Tensor:
        rows = slice(head * size, (head + 1) * size)
        out = w[name + ".weight"][rows] @ x
        out = out + w[name + ".bias"][rows] if name + ".bias" in w else out
        return norm(out, normed) if normed + ".weight" in w else out

    xs = [w["model.embed_tokens.weight"][i] for i in ids]
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}."
        hs, at = [norm(x, layer + "input_layernorm") for x in xs], layer + "self_attn."
        outs: list[list[Tensor]] = [[] for _ in ids]
        for head in range(config.num_attention_heads):
            q = [turn(project(h, at + "q_proj", head, at + "q_norm"), p) for p, h in enumerate(hs)]
            k = [turn(project(h, at + "k_proj", head // group, at + "k_norm"), p) for p, h in enumerate(hs)]
            v = [project(h, at + "v_proj", head // group) for h in hs]
            for i in range(len(ids)):
                share = torch.stack([q[i] @ other / size**0.5 for other in k]).softmax(0)  # both sides
                outs[i].append(sum(s * value for s, value in zip(share, v, strict=True)))
        xs = [x + w[layer + "self_attn.o_proj.weight"] @ torch.cat(o) for x, o in zip(xs, outs, strict=True)]
        for i, x in enumerate(xs):
            h = norm(x, layer + "post_attention_layernorm")
            gate = w[layer + "mlp.gate_proj.weight"] @ h
            up = gate * gate.sigmoid() * (w[layer + "mlp.up_proj.weight"] @ h)
            xs[i] = x + w[layer + "mlp.down_proj.weight"] @ up
    logits = [w["lm_head.weight"] @ norm(x, "model.norm") for x in xs]
    return torch.stack([logits[max(i - 1, 0)] for i in range(len(ids))] if shifted else logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", (LLaDAModelLM, *bidirectional.MODELS[:5]), ids=lambda kind: kind.__name__)
def test_forward_equals_restatement(kind: Any, attention: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 64, "initializer_range": 0.3, "rope_theta": 5000.0}
    shape |= {"head_dim": 12} if kind.config_class.model_type == "a2d-qwen3" else {}
    if kind is LLaDAModelLM:
        shape = {**SHAPE, "vocab_size": 64, "rope_theta": 5000.0}
    torch.manual_seed(0)
    kind(kind.config_class(**shape)).save_pretrained(tmp_path)
    model = kind.from_pretrained(tmp_path, attn_implementation=attention).eval().double()  # rotary tables too
    ids = [5, 9, 33, 60, 2, 2, 17]
    expected = restated(model.state_dict(), model.config, ids, kind is bidirectional.DreamModel)
    padded = model(torch.tensor([[3, 3, *ids]]), torch.tensor([[0, 0, *[1] * 7]])).logits[0, 2:]
    for found in (model(torch.tensor([ids])).logits[0], padded):
        assert (found - expected).abs().max() < 1e-5  # LLaDA's norms run in float32 by design


def test_published_names() -> None:
    """The state-dict keys and config fields of GSAI-ML/LLaDA-8B-Instruct, at a small size."""
    model = LLaDAModelLM(LLaDAConfig(**LLADA))
    block = ["attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out"]
    expected = {f"model.transformer.blocks.{n}.{part}.weight" for n in range(2) for part in block}
    expected |= {f"model.transformer.{part}.weight" for part in ("wte", "ln_f", "ff_out")}
    assert set(model.state_dict()) == expected
    tied = LLaDAModelLM(LLaDAConfig(**{**LLADA, "weight_tying": True}))
    assert set(tied.state_dict()) == expected - {"model.transformer.ff_out.weight"}
    for wrong, says in (({"alibi": True}, "alibi=True"), ({"d_model": 30}, "n_heads must divide d_model")):
        with pytest.raises(ValueError, match=says):
            LLaDAConfig(**{**LLADA, **wrong})


@pytest.mark.parametrize("name", WRITERS)
def test_positions_and_windows(name: str, tmp_path: Path) -> None:
    """Chosen positions are slices of the whole; a window after no change is a slice too, whatever the shift."""
    lm = load(WRITERS[name](tmp_path), "float32")
    ids, mask = lm.encode(["hello there", "an"], width=20)
    full = lm.model(ids, mask).logits
    flat = torch.tensor([39, 12, 20, 35, 11])
    chosen = torch.zeros_like(mask)
    chosen[0, [9, 19]] = chosen[1, 18] = True
    assert torch.allclose(lm.model(ids, mask, positions=flat).logits, full.flatten(0, 1)[flat], atol=1e-5)
    assert torch.allclose(lm.model(ids, mask, positions=chosen).logits, full[chosen], atol=1e-5)
    cache = KVCache(ids.shape[1])
    lm.model(ids, mask, cache=cache)
    for start, stop in ((12, 17), (16, 20), (0, 20)):
        window = lm.model(ids, mask, cache=cache, window=torch.arange(start, stop)[None]).logits
        assert torch.allclose(window[mask[:, start:stop]], full[:, start:stop][mask[:, start:stop]], atol=1e-4)
    one = lm.model(ids, mask, cache=cache, window=torch.arange(12, 17)[None], positions=torch.tensor([0, 7])).logits
    assert torch.allclose(one, torch.stack([full[0, 12], full[1, 14]]), atol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    plain, checkpointed = toy(), toy()
    checkpointed.model.activation_checkpointing_enable()
    for lm in (plain, checkpointed):
        lm.model.train()(*lm.encode(PROMPTS)).logits.square().mean().backward()
    for a, b in zip(plain.model.parameters(), checkpointed.model.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_save_load_and_auto_classes(toy_lm: MaskedLM, toy_folder: str) -> None:
    ids, mask = toy_lm.encode(PROMPTS)
    again = load(toy_folder)
    for model in (again.model, *(kind.from_pretrained(toy_folder) for kind in (AutoModel, AutoModelForMaskedLM))):
        assert isinstance(model, LLaDAModelLM)
        assert torch.equal(model.eval()(ids, mask).logits, toy_lm.model(ids, mask).logits)
    assert AutoConfig.from_pretrained(toy_folder).n_kv_heads == SHAPE["n_kv_heads"]
    assert (again.mask_id, again.eos_id, again.eot_id) == (toy_lm.mask_id, toy_lm.eos_id, toy_lm.eot_id)
    assert again.tokenizer.get_vocab() == toy_lm.tokenizer.get_vocab()


def test_tokenizer_texts_and_bad_prompts(toy_lm: MaskedLM) -> None:
    text = "<reasoning>a1=2 3*4=12</reasoning><answer>(1+2)*3\n~</answer>"
    ids = toy_lm.tokens(text)
    assert toy_lm.tokenizer.decode(ids) == text
    assert len(ids) == len(text) - sum(len(t) - 1 for t in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"))
    a = toy_lm.tokens("abc")
    tokens = torch.tensor([[*a, toy_lm.eos_id, *a], [*a, *a, toy_lm.eot_id], [*a, *a, a[0]]])
    assert toy_lm.lengths(tokens).tolist() == [3, 6, 7]
    assert toy_lm.text(tokens) == ["abc", "abcabc", "abcabca"]
    wrong = {"  \n": "empty", "see <|mdm_mask|>": "mask token", "x" * 2000: "at most 1024 together"}
    for prompt, message in wrong.items():
        with pytest.raises(UserError, match=message):
            toy_lm.encode([toy_lm.chat(prompt)], 128)


class Causal(LLaDAModelLM):
    """What a padding mask turns some published model files into: each token sees only its left."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, positions: Any = None, **_: Any) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        found, ends = super().forward(input_ids, mask), range(1, input_ids.shape[1] + 1)
        last = [super(Causal, self).forward(input_ids[:, :end], mask[:, :end]).logits[:, -1:] for end in ends]
        found.logits = torch.cat(last, 1).flatten(0, 1)[positions]
        return found


class BlindToMasks(LLaDAModelLM):
    """Another common fault: the padding mask is ignored."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids, None, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_self_test(dtype: torch.dtype) -> None:
    lm = toy()
    weights = lm.model.to(dtype).state_dict()
    assert lm.self_test()["padding"] < (1e-4 if dtype == torch.float32 else 0.1)
    for kind, message in {Causal: "does not see tokens to the right", BlindToMasks: "left padding changes"}.items():
        lm.model = kind(lm.model.config).eval().to(dtype)
        lm.model.load_state_dict(weights)
        with pytest.raises(UserError, match=message):
            lm.self_test()
    lm.mask_id = 100_000
    with pytest.raises(UserError, match="outside its vocabulary"):
        lm.self_test()
