"""The backbone against a plain float64 restatement, published keys, padding, the self-test's refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

from conftest import PROMPTS, SHAPE, toy
from unmask import MaskedLM, UserError, load
from unmask.models.llada import LLaDAConfig, LLaDAModelLM
from unmask.models.scratch import character_tokenizer


def restated(weights: dict[str, Tensor], config: LLaDAConfig, ids: list[int], visible: list[bool]) -> Tensor:
    """Logits (T, V) of one row in float64, position by position and head by head."""
    w = {k.removeprefix("model.transformer."): v.double() for k, v in weights.items()}
    size = config.d_model // config.n_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean() + config.rms_norm_eps).sqrt() * w[name + ".weight"]

    def turn(x: Tensor, position: int) -> Tensor:
        out = x.clone()
        for i in range(size // 2):
            angle = torch.tensor(position * config.rope_theta ** (-2 * i / size), dtype=torch.float64)
            a, b = x[i], x[i + size // 2]
            out[i] = a * angle.cos() - b * angle.sin()
            out[i + size // 2] = b * angle.cos() + a * angle.sin()
        return out

    positions = [sum(visible[:i]) for i in range(len(ids))]
    xs = [w["wte.weight"][i] for i in ids]
    for n in range(config.n_layers):
        block = f"blocks.{n}."
        hs = [norm(x, block + "attn_norm") for x in xs]
        outs = [[] for _ in ids]
        for head in range(config.n_heads):
            shared = head // (config.n_heads // config.n_kv_heads)
            rows, kv = slice(head * size, (head + 1) * size), slice(shared * size, (shared + 1) * size)
            q = [turn(w[block + "q_proj.weight"][rows] @ h, p) for h, p in zip(hs, positions, strict=True)]
            k = [turn(w[block + "k_proj.weight"][kv] @ h, p) for h, p in zip(hs, positions, strict=True)]
            v = [w[block + "v_proj.weight"][kv] @ h for h in hs]
            for i in range(len(ids)):
                seen = [j for j in range(len(ids)) if visible[j]]  # both sides, never padding
                share = torch.stack([q[i] @ k[j] / size**0.5 for j in seen]).softmax(0)
                outs[i].append(sum(s * v[j] for s, j in zip(share, seen, strict=True)))
        xs = [x + w[block + "attn_out.weight"] @ torch.cat(o) for x, o in zip(xs, outs, strict=True)]
        for i, x in enumerate(xs):
            h = norm(x, block + "ff_norm")
            gate = w[block + "ff_proj.weight"] @ h
            xs[i] = x + w[block + "ff_out.weight"] @ (gate * gate.sigmoid() * (w[block + "up_proj.weight"] @ h))
    return torch.stack([w["ff_out.weight"] @ norm(x, "ln_f") for x in xs])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_forward_equals_restatement(attention: str) -> None:
    lm = toy()
    lm.model.config._attn_implementation = attention
    model = lm.model.double()
    ids, visible = [20, 21, 30, 2, 40, 50, 2], [False, False, True, True, True, True, True]
    expected = restated(model.state_dict(), model.config, ids, visible)
    found = model(torch.tensor([ids]), torch.tensor([visible])).logits[0]
    assert (found - expected)[2:].abs().max() < 1e-5  # rotary and norms run in float32 by design


def test_published_names() -> None:
    """The state-dict keys and config fields of GSAI-ML/LLaDA-8B-Instruct, at a small size."""
    published = {
        "activation_type": "silu",
        "alibi": False,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
        "block_type": "llama",
        "d_model": 64,
        "embedding_size": 128,
        "eos_token_id": 3,
        "include_bias": False,
        "layer_norm_type": "rms",
        "mask_token_id": 5,
        "max_sequence_length": 4096,
        "mlp_hidden_size": 96,
        "mlp_ratio": 4,
        "model_type": "llada",
        "n_heads": 4,
        "n_kv_heads": 4,
        "n_layers": 2,
        "pad_token_id": 3,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "use_cache": False,
        "vocab_size": 128,
        "weight_tying": False,
    }
    model = LLaDAModelLM(LLaDAConfig(**published))
    block = ["attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out"]
    expected = {f"model.transformer.blocks.{n}.{part}.weight" for n in range(2) for part in block}
    expected |= {f"model.transformer.{part}.weight" for part in ("wte", "ln_f", "ff_out")}
    assert set(model.state_dict()) == expected
    tied = LLaDAModelLM(LLaDAConfig(**{**published, "weight_tying": True}))
    assert set(tied.state_dict()) == expected - {"model.transformer.ff_out.weight"}
    with pytest.raises(ValueError, match="alibi=True"):
        LLaDAConfig(**{**published, "alibi": True})


def test_positions_equal_slices(toy_lm: MaskedLM) -> None:
    ids, mask = toy_lm.encode(PROMPTS)
    full = toy_lm.model(ids, mask).logits
    index = torch.tensor([[0, 3], [5, 1], [2, 2], [7, 0]])
    rows = torch.stack([full[b, index[b]] for b in range(4)])
    flat = index + torch.arange(4)[:, None] * ids.shape[1]
    some = toy_lm.model(ids, mask, positions=flat.flatten()).logits
    assert torch.allclose(some.view(4, 2, -1), rows, atol=1e-5)
    keep = torch.arange(rows.shape[-1]) != toy_lm.mask_id
    assert torch.allclose(toy_lm.logits(ids, mask, index)[..., keep], rows[..., keep], atol=1e-5)
    chosen = torch.zeros_like(mask)
    chosen[1, 2] = chosen[0, 5] = True
    flat = toy_lm.model(ids, mask, positions=chosen).logits
    assert torch.allclose(flat, torch.stack([full[0, 5], full[1, 2]]), atol=1e-5)


def test_padding_is_invisible_and_mask_is_no_candidate(toy_lm: MaskedLM) -> None:
    ids, mask = toy_lm.encode(PROMPTS)
    last = torch.full((4, 1), ids.shape[1] - 1)
    batch = toy_lm.logits(ids, mask, last)
    assert batch.dtype == torch.float32
    assert (batch[..., toy_lm.mask_id] == -torch.inf).all()
    for i, prompt in enumerate(PROMPTS):
        one, one_mask = toy_lm.encode([prompt])
        alone = toy_lm.logits(one, one_mask, torch.tensor([[one.shape[1] - 1]]))
        keep = torch.arange(alone.shape[-1]) != toy_lm.mask_id
        assert (alone[0] - batch[i])[:, keep].abs().max() < 1e-4


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    grads = []
    for checkpointing in (False, True):
        lm = toy()
        lm.model.train()
        if checkpointing:
            lm.model.gradient_checkpointing_enable()
        ids, mask = lm.encode(PROMPTS)
        lm.model(ids, mask).logits.square().mean().backward()
        grads.append([p.grad for p in lm.model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_save_load_and_auto_classes(toy_lm: MaskedLM, toy_folder: str) -> None:
    ids, mask = toy_lm.encode(PROMPTS)
    expected = toy_lm.model(ids, mask).logits
    for model in (
        load(toy_folder).model,
        AutoModel.from_pretrained(toy_folder),
        AutoModelForMaskedLM.from_pretrained(toy_folder),
    ):
        assert isinstance(model, LLaDAModelLM)
        assert torch.equal(model.eval()(ids, mask).logits, expected)
    assert AutoConfig.from_pretrained(toy_folder).n_kv_heads == SHAPE["n_kv_heads"]
    again = load(toy_folder)
    assert (again.mask_id, again.eos_id, again.eot_id) == (toy_lm.mask_id, toy_lm.eos_id, toy_lm.eot_id)
    assert again.tokenizer.get_vocab() == toy_lm.tokenizer.get_vocab()


def test_tokenizer_round_trip() -> None:
    tokenizer = character_tokenizer()
    text = "<reasoning>a1=2 3*4=12</reasoning><answer>(1+2)*3\n~</answer>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text) - sum(len(t) - 1 for t in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"))


def test_text_ends_at_the_first_end_token(toy_lm: MaskedLM) -> None:
    a = toy_lm.tokenizer("abc")["input_ids"]
    rows = [[*a, toy_lm.eos_id, *a], [*a, *a, toy_lm.eot_id], [*a, *a, a[0]]]
    tokens = torch.tensor(rows)
    assert toy_lm.lengths(tokens).tolist() == [3, 6, 7]
    assert toy_lm.text(tokens) == ["abc", "abcabc", "abcabca"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "empty"), ("  \n", "empty"), ("see <|mdm_mask|>", "mask token"), ("x" * 2000, "at most 1024 together")],
)
def test_bad_prompts(toy_lm: MaskedLM, prompt: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        toy_lm.encode([toy_lm.chat(prompt)], 128)


class Causal(LLaDAModelLM):
    """What a padding mask turns some published model files into: each token sees only its left."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, positions: Tensor | None = None, **_: object
    ):  # type: ignore[override]
        out = []
        for end in range(1, input_ids.shape[1] + 1):
            part = None if attention_mask is None else attention_mask[:, :end]
            out.append(super().forward(input_ids[:, :end], part).logits[:, -1])
        logits = torch.stack(out, 1)
        return type(
            "Out",
            (),
            {"logits": logits if positions is None else logits.flatten(0, 1)[positions]},
        )


class BlindToMasks(LLaDAModelLM):
    """Another common fault: the padding mask is ignored."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: object):  # type: ignore[override]
        return super().forward(input_ids, None, **kwargs)


@pytest.mark.parametrize(
    ("kind", "message"), [(Causal, "does not see tokens to the right"), (BlindToMasks, "left padding changes")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_self_test_refuses_faulty_models(kind: type[LLaDAModelLM], message: str, dtype: torch.dtype) -> None:
    lm = toy()
    faulty = kind(lm.model.config).eval()
    faulty.load_state_dict(lm.model.state_dict())
    lm.model = faulty.to(dtype)
    with pytest.raises(UserError, match=message):
        lm.self_test()


def test_self_test_passes_in_both_dtypes(toy_folder: str) -> None:
    assert load(toy_folder).self_test()["padding"] < 1e-4
    load(toy_folder, dtype="bfloat16")


def test_broken_checkpoints_are_refused_by_name(toy_folder: str, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        folder = tmp_path / name
        shutil.copytree(toy_folder, folder)
        return folder

    def config(folder: Path, **changes: object) -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**values, **changes}))

    folder = broken("key")
    weights = load_file(folder / "model.safetensors")
    weights["model.transformer.wrong.weight"] = weights.pop("model.transformer.ln_f.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"ln_f\.weight"):
        load(str(folder))
    folder = broken("shape")
    config(folder, mlp_hidden_size=48)
    with pytest.raises(UserError, match=r"refused|cannot load"):
        load(str(folder))
    folder = broken("nan")
    weights = load_file(folder / "model.safetensors")
    weights["model.transformer.ln_f.weight"] = weights["model.transformer.ln_f.weight"] * torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="not finite"):
        load(str(folder))
    lm = toy()
    lm.mask_id = 100_000
    with pytest.raises(UserError, match="outside its vocabulary"):
        lm.self_test()
    folder = broken("pickle")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no \.safetensors"):
        load(str(folder))
    folder = broken("truncated")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load(str(folder))
    folder = broken("tokenizer")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        load(str(folder))
    folder = broken("list")
    (folder / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json is damaged .*not an object"):
        load(str(folder))
    folder = broken("family")
    config(folder, model_type="gpt2")
    with pytest.raises(UserError, match="unknown model family 'gpt2'"):
        load(str(folder))
    with pytest.raises(UserError, match="unknown model 'tinny'"):
        load("tinny")
