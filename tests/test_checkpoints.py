"""Published layouts: restatements of Dream and the A2D backbones, loading, adapters, placement, refusals, foreign code."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints import WRITERS, write_llada
from unmask import MaskedLM, UserError, decode, load, make_decoder
from unmask.models import bidirectional
from unmask.models.backbone import KVCache
from unmask.models.load import HUB_FILES, load_meta
from unmask.models.remote import RemoteLM
from unmask.training.run_folder import export


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


# ---- the forward pass, restated ------------------------------------------------------------------------------------


def restated(weights: dict[str, Tensor], config: Any, ids: list[int], shifted: bool) -> Tensor:
    """Logits (T, V) in float64 of a Qwen2, Qwen3 or Llama trunk with full attention, head by head and token by token."""
    w = {k: v.double() for k, v in weights.items()}
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    theta = config.rope_parameters["rope_theta"]
    group = config.num_attention_heads // config.num_key_value_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean() + config.rms_norm_eps).sqrt() * w[name + ".weight"]

    def turn(x: Tensor, position: int) -> Tensor:
        pairs = torch.complex(x[: size // 2], x[size // 2 :])
        angle = position * theta ** (-2 * torch.arange(size // 2, dtype=torch.float64) / size)
        turned = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag])

    def project(x: Tensor, name: str, head: int, normed: str | None) -> Tensor:
        rows = slice(head * size, (head + 1) * size)
        out = w[name + ".weight"][rows] @ x
        out = out + w[name + ".bias"][rows] if name + ".bias" in w else out
        return norm(out, normed) if normed and normed + ".weight" in w else out

    xs = [w["model.embed_tokens.weight"][i] for i in ids]
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}."
        hs = [norm(x, layer + "input_layernorm") for x in xs]
        outs: list[list[Tensor]] = [[] for _ in ids]
        for head in range(config.num_attention_heads):
            at = layer + "self_attn."
            q = [turn(project(h, at + "q_proj", head, at + "q_norm"), p) for p, h in enumerate(hs)]
            k = [turn(project(h, at + "k_proj", head // group, at + "k_norm"), p) for p, h in enumerate(hs)]
            v = [project(h, at + "v_proj", head // group, None) for h in hs]
            for i in range(len(ids)):
                share = torch.stack([q[i] @ other / size**0.5 for other in k]).softmax(0)  # both sides
                outs[i].append(sum(s * value for s, value in zip(share, v, strict=True)))
        xs = [x + w[layer + "self_attn.o_proj.weight"] @ torch.cat(o) for x, o in zip(xs, outs, strict=True)]
        for i, x in enumerate(xs):
            h = norm(x, layer + "post_attention_layernorm")
            gate = w[layer + "mlp.gate_proj.weight"] @ h
            xs[i] = x + w[layer + "mlp.down_proj.weight"] @ (
                gate * gate.sigmoid() * (w[layer + "mlp.up_proj.weight"] @ h)
            )
    logits = [w["lm_head.weight"] @ norm(x, "model.norm") for x in xs]
    return torch.stack([logits[max(i - 1, 0)] for i in range(len(ids))] if shifted else logits)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", bidirectional.MODELS)
def test_forward_equals_restatement(kind: Any, attention: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 64, "initializer_range": 0.3, "rope_theta": 5000.0}
    shape |= {"head_dim": 12} if kind.config_class.model_type == "a2d-qwen3" else {}
    torch.manual_seed(0)
    kind(kind.config_class(**shape)).save_pretrained(tmp_path)
    model = (
        kind.from_pretrained(tmp_path, attn_implementation=attention).eval().double()
    )  # as loaded: rotary tables too
    ids = [5, 9, 33, 60, 2, 2, 17]
    expected = restated(model.state_dict(), model.config, ids, kind is bidirectional.DreamModel)
    assert (model(torch.tensor([ids])).logits[0] - expected).abs().max() < 1e-5
    padded = model(torch.tensor([[3, 3, *ids]]), torch.tensor([[0, 0, *[1] * 7]])).logits[0, 2:]
    assert (padded - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", WRITERS)
def test_positions_and_windows(name: str, folders: dict[str, str]) -> None:
    """Chosen positions are slices of the whole; a window after no change is a slice too, whatever the shift."""
    lm = load(folders[name], "float32")
    ids, mask = lm.encode(["hello there", "an"], width=20)
    full = lm.model(ids, mask).logits
    flat = torch.tensor([39, 12, 20, 35, 11])
    chosen = torch.zeros_like(mask)
    chosen[0, [9, 19]] = chosen[1, 18] = True
    assert torch.allclose(lm.model(ids, mask, positions=flat).logits, full.flatten(0, 1)[flat], atol=1e-5)
    assert torch.allclose(lm.model(ids, mask, positions=chosen).logits, full[chosen], atol=1e-5)
    cache = KVCache()
    lm.model(ids, mask, cache=cache)
    window = lm.model(ids, mask, cache=cache, window=(12, 17)).logits
    assert torch.allclose(window, full[:, 12:17], atol=1e-4)
    one = lm.model(ids, mask, cache=cache, window=(12, 17), positions=torch.tensor([0, 7])).logits
    assert torch.allclose(one, torch.stack([full[0, 12], full[1, 14]]), atol=1e-4)


# ---- whole checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WRITERS)
def test_published_layouts_load_and_decode(name: str, folders: dict[str, str]) -> None:
    lm = load(folders[name])
    assert str(lm.model.dtype) == ("torch.float32" if name == "qwen3-a2d" else "torch.bfloat16")  # the files' own
    expected = {"llada": (320, 301, 348, 301), "dream": (323, 300, 302, 300), "qwen3-a2d": (323, 300, 302, 300)}
    assert (lm.mask_id, lm.eos_id, lm.eot_id, lm.pad_id) == expected[name]
    text = lm.chat("hello", "<reasoning>")
    start = {"llada": "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"}
    assert text.startswith(start.get(name, "<|im_start|>user\nhello<|im_end|>\n"))
    ids, mask = lm.encode([text, lm.chat("an in there")], 16)
    assert lm.tokenizer.decode(ids[0][mask[0]]) == text
    lm = load(folders[name], "float32")
    for spec in ("eoser-ass", "semi-ar:block_length=8,cache=dual"):
        both = decode(lm, ids, mask, make_decoder(spec, max_new_tokens=16))
        alone = decode(lm, *lm.encode([text], 16), make_decoder(spec, max_new_tokens=16))
        assert both.tokens[0].equal(alone.tokens[0])
    assert (both.step >= 0).all() and not (both.tokens == lm.mask_id).any()


@pytest.mark.parametrize("name", WRITERS)
def test_adapters_merge_and_export(name: str, folders: dict[str, str], tmp_path: Path) -> None:
    lm = load(folders[name], "float32")
    ids, mask = lm.encode(["hello there"])
    torch.manual_seed(3)
    adapted = get_peft_model(lm.model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    expected = adapted(input_ids=ids, attention_mask=mask).logits
    adapted.save_pretrained(tmp_path / "adapter")
    merged = load(folders[name], "float32", adapter=str(tmp_path / "adapter"))
    assert torch.allclose(merged.model(ids, mask).logits, expected, atol=1e-4)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = folders[name]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    again = load(str(export(load(str(tmp_path / "adapter"), "float32"), tmp_path / "plain")))
    assert torch.allclose(again.model(ids, mask).logits, expected, atol=1e-4)
    assert (again.mask_id, again.eos_id, again.eot_id) == (lm.mask_id, lm.eos_id, lm.eot_id)
    with pytest.raises(UserError, match="is an adapter itself"):
        load(str(tmp_path / "adapter"), adapter=str(tmp_path / "adapter"))


@pytest.mark.parametrize("name", WRITERS)
def test_spread_over_devices(name: str, folders: dict[str, str], tmp_path: Path) -> None:
    """A block kept on disk is moved in for its pass: the hooks of a device map, without a second device."""
    lm = load(folders[name], "float32")
    trunk, blocks = ("model.transformer", "blocks") if name == "llada" else ("model", "layers")
    places: dict[str, Any] = {}
    for key in {k.rsplit(".", 1)[0] for k in lm.model.state_dict()}:
        places[key] = "disk" if key.startswith(f"{trunk}.{blocks}.1.") else "cpu"
    if name != "llada":
        places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = load(folders[name], "float32", device_map=places)
    assert any(p.is_meta for p in spread.model.parameters())
    ids, mask = lm.encode(["hello there", "an"], 16)
    decoder = make_decoder("ass", max_new_tokens=16)
    assert decode(spread, ids, mask, decoder).tokens.equal(decode(lm, ids, mask, decoder).tokens)
    with pytest.raises(UserError, match="contradict each other"):
        load(folders[name], device="cpu", device_map="auto")


def test_four_bits(folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(UserError, match="pip install bitsandbytes"):
            load(folders["llada"], load_in_4bit=True)
        return
    folder = write_llada(tmp_path, d_model=64, mlp_hidden_size=128)  # bitsandbytes' blocks are 64 wide
    lm = load(folder, load_in_4bit=True)
    ids, mask = lm.encode(["hello there"], 8)
    assert decode(lm, ids, mask, make_decoder("ass", max_new_tokens=8)).logprob.isfinite().all()
    kinds = {n: type(m).__name__ for n, m in lm.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert kinds.pop("model.transformer.ff_out") == "Linear"
    assert set(kinds.values()) == {"Linear4bit"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load(folders["llada"], load_in_4bit=True)


# ---- what is refused -----------------------------------------------------------------------------------------------


def broken(folder: str, to: Path, **config: Any) -> Path:
    shutil.copytree(folder, to)
    values = {**json.loads((to / "config.json").read_text()), **config}
    (to / "config.json").write_text(json.dumps(values))
    return to


def test_refused_by_name(folders: dict[str, str], tmp_path: Path) -> None:
    for name, key in (("llada", "transformer.ln_f.weight"), ("dream", "norm.weight"), ("qwen3-a2d", "norm.weight")):
        folder = broken(folders[name], tmp_path / f"{name}-key")
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        shard = folder / index[f"model.{key}"]
        tensors = load_file(shard)
        tensors["model.strange.weight"] = tensors.pop(f"model.{key}")
        save_file(tensors, shard, metadata={"format": "pt"})
        index["model.strange.weight"] = index.pop(f"model.{key}")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        with pytest.raises(UserError, match=key.replace(".", r"\.")):
            load(str(folder))
        field = "mlp_hidden_size" if name == "llada" else "intermediate_size"
        with pytest.raises(UserError, match=r"cannot load|mismatched keys"):
            load(str(broken(folders[name], tmp_path / f"{name}-shape", **{field: 48})))
        folder = broken(folders[name], tmp_path / f"{name}-pickle")
        for file in folder.glob("*.safetensors"):
            torch.save(load_file(file), file.with_suffix(".bin"))
            file.unlink()
        with pytest.raises(UserError, match=r"no \.safetensors"):
            load(str(folder))
        folder = broken(folders[name], tmp_path / f"{name}-shard")
        next(iter(sorted(folder.glob("*.safetensors")))).unlink()
        with pytest.raises(UserError, match="00001-of"):
            load(str(folder))
    with pytest.raises(UserError, match="LLaDAMoEModelLM"):
        load(str(broken(folders["llada"], tmp_path / "moe", architectures=["LLaDAMoEModelLM"])))
    with pytest.raises(UserError, match="no mask token"):
        folder = broken(
            folders["qwen3-a2d"], tmp_path / "plain", model_type="qwen3", architectures=["Qwen3ForCausalLM"]
        )
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        del settings["mask_token"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        load(str(folder))


def test_no_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"could not download GSAI-ML/nothing from the hub .* or choose the folder"):
        load("GSAI-ML/nothing")
    with pytest.raises(UserError, match=r"unknown model '\./nothing'"):
        load("./nothing")


# ---- foreign code --------------------------------------------------------------------------------------------------

FOREIGN = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class Config(PretrainedConfig):
    model_type = "foreign"
    max_position_embeddings = 512


class Model(PreTrainedModel):
    config_class = Config
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        self.table = torch.nn.Embedding(384, 16)
        self.out = torch.nn.Linear(16, 384)
        self.post_init()

    def _init_weights(self, module):
        pass

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask=None, **_):
        x = self.table(input_ids)
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        around = (x * seen[..., None]).sum(1, keepdim=True) / seen.sum(1)[:, None, None]
        return MaskedLMOutput(logits=self.out(x + REACH))
"""


def foreign(folder: Path, donor: str, reach: str) -> Path:
    """A checkpoint of an unknown family with its own Python file."""
    folder.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(donor) / file, folder)
    (folder / "modeling_foreign.py").write_text(FOREIGN.replace("REACH", reach))
    auto = {"AutoConfig": "modeling_foreign.Config", "AutoModel": "modeling_foreign.Model"}
    config = {"model_type": "foreign", "architectures": ["Model"], "auto_map": auto, "mask_token_id": 320}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    table, out = torch.nn.Embedding(384, 16), torch.nn.Linear(16, 384)
    tensors = {"table.weight": table.weight, "out.weight": out.weight, "out.bias": out.bias}
    save_file({k: v.detach() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("llada2_moe", "LLaDA2MoeModelLM"),
        ("llada", "LLaDAMoEModelLM"),
        ("sdar", "SDARForCausalLM"),
        ("sdar_moe", "SDARMoeForCausalLM"),
        ("Fast_dLLM_Qwen", "Fast_dLLM_QwenForCausalLM"),
        ("llama", "StableDiffcoderForCausalLM"),
        ("a2d-qwen3-bd3lm", "A2DQwen3BD3LMHeadModel"),
        ("nemotron_labs_diffusion", "NemotronLabsDiffusionModel"),
    ],
)
def test_families_to_come_are_named(tmp_path: Path, family: str, architecture: str) -> None:
    for more in ({}, {"auto_map": {"AutoModel": "modeling.Model"}}):
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": family, "architectures": [architecture], **more})
        )
        with pytest.raises(
            UserError, match=f"{family} / {architecture} is not supported yet.*choose a checkpoint of llada"
        ):
            load(str(tmp_path))


def test_foreign_code_runs_only_when_asked_and_only_if_sound(folders: dict[str, str], tmp_path: Path) -> None:
    sound = str(foreign(tmp_path / "sound", folders["llada"], "around"))
    with pytest.raises(UserError, match=r"unknown model family 'foreign'.*--trust-remote-code"):
        load(sound)
    lm: MaskedLM = load(sound, trust_remote_code=True)
    assert isinstance(lm.model, RemoteLM)
    ids, mask = lm.encode(["hello there", "an"], 8)
    both = decode(lm, ids, mask, make_decoder("ass", max_new_tokens=8))
    logits = lm.model(ids, mask).logits
    assert both.tokens.shape == (2, 8) and logits.shape == (*ids.shape, 384)
    flat = torch.tensor([3, 9])
    reduced = lm.forward_head(ids, mask, flat, lambda head, hidden: next(head.pieces(hidden))[1])
    keep = torch.arange(384) != 320
    assert torch.equal(reduced[:, keep], logits.flatten(0, 1)[flat][:, keep])
    with pytest.raises(UserError, match="no cache of windows"):
        decode(lm, ids, mask, make_decoder("semi-ar:block_length=4,cache=dual", max_new_tokens=8))
    with pytest.raises(UserError, match="left padding changes"):
        load(str(foreign(tmp_path / "padded", folders["llada"], "x.mean(1, keepdim=True)")), trust_remote_code=True)
    with pytest.raises(UserError, match="does not see"):
        load(str(foreign(tmp_path / "blind", folders["llada"], "0 * around")), trust_remote_code=True)
    with pytest.raises(UserError, match=r"own code fails: NameError"):
        load(str(foreign(tmp_path / "fails", folders["llada"], "nothing")), trust_remote_code=True)


# ---- adapters that are not what they seem --------------------------------------------------------------------------


def test_strange_adapters(folders: dict[str, str], tmp_path: Path) -> None:
    lm = load(folders["llada"], "float32")
    plain = {k: v.clone() for k, v in lm.model.state_dict().items()}
    adapted = get_peft_model(lm.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "good")
    good = load(folders["llada"], "float32", adapter=str(tmp_path / "good"))
    assert any(not torch.equal(plain[k], v) for k, v in good.model.state_dict().items())
    other = load(write_llada(tmp_path / "other", seed=2), "float32", adapter=str(tmp_path / "good"))
    assert good.info()["weights"] != other.info()["weights"] != load(folders["llada"], "float32").info()["weights"]

    def strange(name: str) -> Path:
        shutil.copytree(tmp_path / "good", tmp_path / name)
        return tmp_path / name

    file = strange("keys") / "adapter_model.safetensors"
    save_file({k.replace("q_proj", "k_proj"): v for k, v in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"cannot add the adapter .*keys differ"):
        load(folders["llada"], adapter=str(tmp_path / "keys"))
    file = strange("pickle") / "adapter_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(UserError, match=r"holds no \.safetensors"):
        load(folders["llada"], adapter=str(tmp_path / "pickle"))
    folder = strange("cycle")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(folder)}))
    with pytest.raises(UserError, match="its own base model"):
        load(str(folder))
    with pytest.raises(UserError, match=r"holds no adapter_config\.json"):
        load(folders["llada"], adapter=folders["dream"])
    with pytest.raises(UserError, match="unknown adapter 'nothing'"):
        load(folders["llada"], adapter="nothing")


def test_what_is_fetched_without_weights_is_enough(folders: dict[str, str], tmp_path: Path) -> None:
    for name, folder in folders.items():
        there = tmp_path / name
        there.mkdir()
        for pattern in HUB_FILES:
            for file in Path(folder).glob(pattern):
                shutil.copy(file, there)
        assert load_meta(str(there)).info()["mask_id"] == load(folder).mask_id


def test_more_refusals(folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, changes in (("dream", {"max_position_embeddings": None}), ("llada", {"vocab_size": "a"})):
        for read in (load, load_meta):
            with pytest.raises(UserError, match=r"cannot (load|read)"):
                read(str(broken(folders[name], tmp_path / f"{name}-{read.__name__}", **changes)))
    with pytest.raises(UserError, match=r"mask token is 323, its config.json says 5"):
        load(str(broken(folders["dream"], tmp_path / "masks", mask_token_id=5)))
    folder = broken(folders["llada"], tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"the tokenizer of .* cannot be read"):
        load(str(folder))
    folder = broken(folders["llada"], tmp_path / "template")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{% for %}"}))
    with pytest.raises(UserError, match=r"the chat template of .* refuses the messages"):
        load(str(folder)).chat("hello")
    folder = broken(folders["llada"], tmp_path / "index")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match=r"lacks 'weight_map'"):
        load(str(folder))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 processes each have"):
        load(folders["llada"], device_map="auto")
