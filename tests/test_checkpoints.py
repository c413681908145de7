"""Published layouts: loading, decoding, training, adapters, placement, memory, what is refused, foreign code."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from checkpoints import BLOCKS, WRITERS, write_llada
from unmask import SFTConfig, UserError, decode, load, make_decoder
from unmask.cli import main
from unmask.models.load import HUB_FILES, load_meta
from unmask.models.memory import Workload, decoding_memory, training_memory
from unmask.models.remote import RemoteLM
from unmask.rl.config import DiffusionGRPOConfig
from unmask.rl.run import train
from unmask.training.sft import train as train_supervised


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


@pytest.mark.parametrize("name", WRITERS)
def test_published_layouts_load_and_decode(name: str, folders: dict[str, str]) -> None:
    lm = load(folders[name])
    assert str(lm.model.dtype) == (
        "torch.float32" if name in ("qwen3-a2d", "a2d-bd3lm") else "torch.bfloat16"
    )  # the files' own
    role = name in ("llada2", "llada-moe")
    bracketed = name in ("diffcoder", "illada")  # their special tokens' names
    expected = (323, 300, 303 if role else 302, 300)
    if name == "llada":
        expected = (320, 301, 348, 301)
    if bracketed:
        expected = (5 if name == "diffcoder" else 323, 302, None, 301)
    assert (lm.mask_id, lm.eos_id, lm.eot_id, lm.pad_id) == expected
    assert lm.block_length == {"fast-dllm": 32, "llada2": 32}.get(name, 4 if name in BLOCKS else None)
    text = lm.chat("hello", "<reasoning>")
    start = "<role>user</role>hello<|role_end|>" if role else "<|im_start|>user\nhello<|im_end|>\n"
    llada = "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nhello<|eot_id|>"
    start = "[user]hello<[end_of_sentence]>" if bracketed else start
    assert text.startswith(llada if name == "llada" else start)
    ids, mask = lm.encode([text, lm.chat("an in there")], 16)
    assert lm.tokenizer.decode(ids[0][mask[0]]) == text
    lm = load(folders[name], "float32")
    for spec in ("eoser-ass", "semi-ar:block_length=8" + ",cache=dual" * (lm.block_length is None)):
        both = decode(lm, ids, mask, make_decoder(spec, max_new_tokens=16))
        alone = decode(lm, *lm.encode([text], 16), make_decoder(spec, max_new_tokens=16))
        assert both.tokens[0].equal(alone.tokens[0])
    assert (both.step >= 0).all() and not (both.tokens == lm.mask_id).any()


@pytest.mark.parametrize("name", WRITERS)
def test_adapters_merge(name: str, folders: dict[str, str], tmp_path: Path) -> None:
    lm = load(folders[name], "float32")
    ids, mask = lm.encode(["hello there"])
    torch.manual_seed(3)
    adapted = get_peft_model(lm.model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    expected = adapted(input_ids=ids, attention_mask=mask).logits
    adapted.save_pretrained(tmp_path / "adapter")
    merged = load(folders[name], "float32", adapter=str(tmp_path / "adapter"))
    assert torch.allclose(merged.model(ids, mask).logits, expected, atol=1e-4)
    changed("adapter_config.json", base_model_name_or_path=folders[name])(tmp_path / "adapter")
    alone = load(str(tmp_path / "adapter"), "float32")
    assert torch.equal(alone.model(ids, mask).logits, merged.model(ids, mask).logits)
    assert load(folders[name]).weights == lm.weights != alone.weights == merged.weights
    with pytest.raises(UserError, match="is an adapter itself"):
        load(str(tmp_path / "adapter"), adapter=str(tmp_path / "adapter"))


@pytest.mark.parametrize("name", WRITERS)
def test_the_whole_way(name: str, folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Evaluated, trained with an adapter, merged, exported."""
    model = folders[name]
    assert main(["info", model, "--max-new-tokens", "16"]) == 0
    assert "self-test" in capsys.readouterr().out
    assert main(["generate", "hello", "--model", model, "--decoder", "eoser-ass", "--max-new-tokens", "16"]) == 0

    def evaluated(model: str, output: str, *flags: str) -> list[dict[str, object]]:
        request = ["eval", "--model", model, "--task", "sudoku", "--decoder", "eoser-ass", "--limit", "3"]
        request += ["--max-new-tokens", "16", "--dtype", "float32", "--output", str(tmp_path / output), *flags]
        assert main(request) == 0
        lines = (tmp_path / output / "records" / "sudoku--eoser-ass.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]

    before = evaluated(model, "before")
    assert len(before) == 3
    settings: Any = {"report_to": [], "model": model, "tasks": ["sudoku"], "objective": "cj", "decoder": "eoser-ass"}
    settings |= {"problems": 2, "validation_problems": 2, "max_completion_length": 16, "num_generations": 4}
    settings |= {"per_device_train_batch_size": 4, "max_steps": 2, "eval_steps": 2, "save_steps": 1, "lora_r": 2}
    settings |= {"reward_funcs": ["test_checkpoints:length"], "beta": 0.01, "learning_rate": 1e-2, "bf16": False}
    final = str(train(DiffusionGRPOConfig(output_dir=str(tmp_path / "rl"), **settings)))
    base, tuned = (load(m, "float32").model.state_dict() for m in (model, final))
    different = {k.split(".")[-2] for k in base if not torch.equal(base[k], tuned[k])}
    matrices = {"q_proj", "k_proj", "v_proj", "up_proj"}
    matrices |= {"attn_out", "ff_proj", "ff_out"} if name == "llada" else {"o_proj", "gate_proj", "down_proj"}
    if name in ("sdar-moe", "llada-moe"):  # every layer is a mixture of experts, which an adapter leaves alone
        matrices -= {"up_proj", "gate_proj", "down_proj"}
    assert different == matrices and base.keys() == tuned.keys()
    outside = [k for k in base if k.endswith("transformer.ff_out.weight") or "embed" in k or "wte" in k]
    assert outside and all(torch.equal(base[k], tuned[k]) for k in outside)
    # A checkpoint's adapter, merged while loading, is what the run exported.
    adapter = str(tmp_path / "rl" / "checkpoint-2")
    tuned_records = evaluated(final, "final")
    assert [r["completion"] for r in tuned_records] != [r["completion"] for r in before]
    assert tuned_records == evaluated(adapter, "merged")
    assert evaluated(model, "beside", "--adapter", adapter) == tuned_records
    assert main(["export", adapter, str(tmp_path / "exported")]) == 0
    exported, original = (json.loads((Path(f) / "config.json").read_text()) for f in (tmp_path / "exported", model))
    assert exported["model_type"] == original["model_type"]


EXPERTS = r".*mlp\.experts\.(gate_up|down)_proj"


@pytest.mark.parametrize("name", WRITERS)
def test_supervised_adapters(name: str, folders: dict[str, str], tmp_path: Path) -> None:
    """Trained on tasks with an adapter, of mixtures on their experts; a checkpoint merges to what was exported."""
    settings: Any = {
        "model": folders[name],
        "tasks": ["sudoku:style=compact"],
        "problems": [8],
        "canvas": [160],
        "max_steps": 2,
    }
    settings |= {
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "validation_problems": 2,
        "eval_steps": 2,
        "lora_r": 2,
    }
    settings |= {"learning_rate": 1e-2, "warmup_steps": 0, "dtype": "float32", "bf16": False, "report_to": []}
    mixture = name in ("sdar-moe", "llada-moe", "llada2")
    if mixture:
        settings["lora_target_modules"] = EXPERTS
    final = load(str(train_supervised(SFTConfig(output_dir=str(tmp_path / "run"), **settings))), "float32")
    before, after = load(folders[name], "float32").model.state_dict(), final.model.state_dict()
    different = {k for k in before if not torch.equal(before[k], after[k])}
    assert different and before.keys() == after.keys()
    assert not mixture or all(".mlp.experts." in k for k in different)
    merged = load(folders[name], "float32", adapter=str(tmp_path / "run" / "checkpoint-2"))
    ids, mask = final.encode(["hello there", "an"])
    assert torch.allclose(final.model(ids, mask).logits, merged.model(ids, mask).logits, atol=1e-4)


def test_a_bd3lm_conversion_needs_its_block_length(folders: dict[str, str], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["qwen3-a2d"], tmp_path / "Qwen3-0.6B-diffusion-bd3lm-v0.1")
    for read in (load, load_meta):
        with pytest.raises(UserError, match=r"attends in blocks by its name, and its config\.json has no block_length"):
            read(str(folder))


def length(prompts: list[str], completions: list[str], **_: object) -> list[float]:
    """A reward that differs within a group."""
    return [float(len(set(text))) for text in completions]


@pytest.mark.parametrize("name", WRITERS)
def test_memory_and_spread_over_devices(name: str, folders: dict[str, str]) -> None:
    """Weights and states are counted; a block kept on disk is moved in for its pass, by a device map's hooks."""
    work, lm = Workload(torch.float32, rows=2, prompt=10, length=22), load(folders[name], "float32")
    size = 4 * sum(p.numel() for p in lm.model.parameters())
    need = training_memory(lm, work)
    assert (need.weights, need.gradients, need.optimizer, need.reference) == (size, size, 2 * size, 0)
    assert training_memory(lm, replace(work, reference=True)).reference == size
    more = training_memory(lm, replace(work, completions=6, steps=7))
    assert more.views == 6 * 7 * (8 * 32 + 22) and more.total - more.views == need.total - need.views  # no S, no G
    assert decoding_memory(lm, work).weights == size == decoding_memory(load_meta(folders[name]), work).weights
    trunk, blocks = ("model.transformer", "blocks") if name == "llada" else ("model", "layers")
    modules = {key.rsplit(".", 1)[0] for key in lm.model.state_dict()}
    places: Any = {m: "disk" if m.startswith(f"{trunk}.{blocks}.1.") else "cpu" for m in modules}
    if name != "llada":
        places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    if hasattr(lm.model.config, "num_experts_per_tok"):  # stacked from many files' tensors
        with pytest.raises(UserError, match="offloaded to the disk"):
            load(folders[name], "float32", device_map=places)
        return
    spread = load(folders[name], "float32", device_map=places)
    assert any(p.is_meta for p in spread.model.parameters())
    ids, mask = lm.encode(["hello there", "an"], 16)
    decoder = make_decoder("ass", max_new_tokens=16)
    assert decode(spread, ids, mask, decoder).tokens.equal(decode(lm, ids, mask, decoder).tokens)


def test_block_lengths_that_only_a_name_tells(folders: dict[str, str], tmp_path: Path, capsys: Any) -> None:
    for name, length in (("SDAR-4B-Chat-b16", 16), ("SDAR-4B-Chat", 4)):
        folder = shutil.copytree(folders["sdar"], tmp_path / name)
        changed("config.json", block_size=...)(folder)
        for lm in (load(str(folder)), load_meta(str(folder))):
            assert lm.block_length == length == lm.model.config.block_length
        assert f"{name} names no block length in its config.json: {length} is taken" in capsys.readouterr().err
    earlier = shutil.copytree(folders["diffcoder"], tmp_path / "earlier")  # as the first revision of its files
    code = {"AutoModelForCausalLM": "modeling_seed_diffcoder.SeedDiffcoderForCausalLM"}
    changed("config.json", architectures=["LlamaForCausalLM"], auto_map=code)(earlier)
    assert load(str(earlier)).block_length == 4


def test_four_bits(folders: dict[str, str], tmp_path: Path) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(UserError, match="pip install bitsandbytes"):
            load(folders["llada"], load_in_4bit=True)
        return
    folder = write_llada(tmp_path, d_model=64, mlp_hidden_size=128)  # bitsandbytes' blocks are 64 wide
    lm = load(folder, load_in_4bit=True)
    ids, mask = lm.encode(["hello there"], 8)
    assert decode(lm, ids, mask, make_decoder("ass", max_new_tokens=8)).logprob.isfinite().all()
    kinds = {n: type(m).__name__ for n, m in lm.model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert kinds.pop("model.transformer.ff_out") == "Linear" and set(kinds.values()) == {"Linear4bit"}


def test_info_without_weights(folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is fetched from the hub without weights is enough."""
    shown = {"llada": "320 <|mdm_mask|>", "dream": "shifted here", "qwen3-a2d": "323 <|mask|>"}
    for name, folder in folders.items():
        (tmp_path / name).mkdir()
        for file in [f for pattern in HUB_FILES for f in Path(folder).glob(pattern)]:
            shutil.copy(file, tmp_path / name)
        assert main(["info", str(tmp_path / name), "--no-weights", "--max-new-tokens", "16"]) == 0
        assert shown.get(name, "block-causal" if name in BLOCKS else "323 <") in capsys.readouterr().out
    for flags, says in (([], "no .safetensors"), (["--no-weights", "--dtype", "int3"], "unknown dtype")):
        assert main(["info", str(tmp_path / "dream"), *flags]) == 2
        assert says in capsys.readouterr().err


# ---- what is refused -----------------------------------------------------------------------------------------------


def changed(file: str, **changes: Any) -> Callable[[Path], None]:
    """Sets keys of a JSON file of a checkpoint; those that become ``...`` are removed."""

    def change(folder: Path) -> None:
        values = {**json.loads((folder / file).read_text()), **changes}
        (folder / file).write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))

    return change


def written(file: str, text: str | None) -> Callable[[Path], None]:
    """Overwrites a file, or removes it."""
    return lambda folder: (folder / file).unlink() if text is None else (folder / file).write_text(text)  # type: ignore[return-value]


def one_key(end: tuple[str, ...], change: Callable[[dict[str, Any], str], None]) -> Callable[[Path], None]:
    """Changes one of the weights, by the end of its name, where it stands."""

    def rewrite(folder: Path) -> None:
        index = folder / "model.safetensors.index.json"
        shards = json.loads(index.read_text())["weight_map"]
        key = next(k for k in shards if k.endswith(end))
        shard = folder / shards.pop(key)
        tensors = load_file(shard)
        change(tensors, key)
        save_file(tensors, shard, metadata={"format": "pt"})
        changed(index.name, weight_map=shards | dict.fromkeys(tensors, shard.name))(folder)

    return rewrite


def pickled(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()


def first_shard(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(min(folder.glob("*.safetensors")))


truncated = first_shard(lambda file: os.truncate(file, file.stat().st_size // 2))
LAST_NORM = ("model.norm.weight", "ln_f.weight")
renamed = one_key(LAST_NORM, lambda tensors, key: tensors.update({"model.strange.weight": tensors.pop(key)}))
without_an_expert = one_key(("experts.3.up_proj.weight",), lambda tensors, key: tensors.pop(key))
broken = one_key(LAST_NORM, lambda tensors, key: tensors.update({key: tensors[key] * torch.nan}))
config = partial(changed, "config.json")
no_mask = [
    config(model_type="qwen3", architectures=["Qwen3ForCausalLM"]),
    changed("tokenizer_config.json", mask_token=...),
]
REFUSED: list[tuple[str, Any, str]] = [
    ("llada", renamed, r"missing keys model\.transformer\.ln_f\.weight"), ("llada", broken, "not finite"),
    ("dream", renamed, r"missing keys model\.norm\.weight"), ("dream", pickled, r"no \.safetensors"),
    ("llada", config(mlp_hidden_size=48), "cannot load|mismatched keys"), ("llada", truncated, "cannot load"),
    ("qwen3-a2d", first_shard(Path.unlink), "cannot load"), ("qwen3-a2d", no_mask, "no mask token"),
    ("llada", written("config.json", "[1]"), r"config\.json is damaged .*not an object"),
    ("llada", config(model_type="gpt2"), "unknown model family 'gpt2'"),
    ("llada", config(architectures=["AnotherLM"]), "architecture AnotherLM is not LLaDAModelLM"),
    ("llada", config(model_type="llada2_moe"), "architecture LLaDAModelLM is not LLaDA2MoeModelLM"),
    ("sdar", config(model_type="nemotron_diffusion"), "nemotron_diffusion / SDARForCausalLM is not supported: choose"),
    ("sdar", config(block_size="4"), "has block_size='4', and SDARForCausalLM attends in blocks: set block_size to"),
    ("fast-dllm", config(bd_size=0), "has bd_size=0, and Fast_dLLM_QwenForCausalLM attends in blocks"),
    ("sdar", config(mask_token_id=900), "mask id 900 lies outside its vocabulary of 384"),
    ("llada2", first_shard(Path.unlink), "cannot load"),
    *(
        (name, without_an_expert, r"missing keys .*experts\.3\.up_proj\.weight")
        for name in ("sdar-moe", "llada2", "llada-moe")
    ),
    *(
        (name, config(block_length=value), f"has block_length={value!r}, and .* attends in blocks: set block_length to")
        for name in ("llada", "qwen3-a2d")
        for value in (0, -4, "4", 4.0, True)
    ),
    ("dream", config(max_position_embeddings=None), "cannot (load|read)"),
    ("llada", config(vocab_size="a"), "cannot (load|read)"), ("llada", written("tokenizer.json", None), r"no tokenizer\.json"),
    ("dream", config(mask_token_id=5), r"mask token is 323, its config\.json says 5"),
    ("llada", written("tokenizer.json", "{"), "the tokenizer of .* cannot be read"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_refused_by_name(name: str, change: Any, message: str, folders: dict[str, str], tmp_path: Path) -> None:
    folder = shutil.copytree(folders[name], tmp_path / "broken")
    for one in change if isinstance(change, list) else [change]:
        one(folder)
    with pytest.raises(UserError, match=message) as found:
        load(str(folder))
    assert "\n" not in str(found.value)
    if "cannot (load|read)" in message:
        with pytest.raises(UserError, match=message):
            load_meta(str(folder))


def test_names_and_templates(folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = load(folders["llada"])
    lm.tokenizer.chat_template = "{% for %}"
    with pytest.raises(UserError, match=r"the chat template of .* refuses the messages"):
        lm.chat("hello")
    with pytest.raises(UserError, match="contradict each other"):
        load(folders["llada"], device="cpu", device_map="auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="the devices of 2 processes"):
        load(folders["llada"], device_map="auto")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"could not download GSAI-ML/nothing from the hub .* or choose the folder"):
        load("GSAI-ML/nothing")
    for name in ("./nothing", "tinny"):
        with pytest.raises(UserError, match=f"unknown model '{name}'"):
            load(name)


def replace_keys(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({k.replace("q_proj", "k_proj"): v for k, v in load_file(file).items()}, file)


def test_adapters_refused(folders: dict[str, str], tmp_path: Path) -> None:
    adapted = get_peft_model(load(folders["llada"], "float32").model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "sound")
    base = partial(changed, "adapter_config.json")
    faults: dict[str, Callable[[Path], None]] = {
        "cannot add the adapter .*keys differ": replace_keys,
        r"holds no \.safetensors": pickled,
        "names no base model": base(base_model_name_or_path=None),
        "its own base model": lambda f: base(base_model_name_or_path=str(f))(f),
        r"holds no adapter_config\.json": written("adapter_config.json", None),
        "unknown adapter 'nothing'": lambda f: None,
    }
    for number, (message, change) in enumerate(faults.items()):
        adapter = shutil.copytree(tmp_path / "sound", tmp_path / str(number))
        change(adapter)
        name = "nothing" if "nothing" in message else str(adapter)
        with pytest.raises(UserError, match=message):
            load(name) if "base model" in message else load(folders["llada"], adapter=name)


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
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = torch.nn.Embedding(384, 16)
        self.out = torch.nn.Linear(16, 384)
        self.post_init()
    def forward(self, input_ids, attention_mask=None, **_):
        x = self.embed_tokens(input_ids)
        seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask.long()
        around = (x * seen[..., None]).sum(1, keepdim=True) / seen.sum(1)[:, None, None]
        return MaskedLMOutput(logits=self.out(x + REACH))
"""


def foreign(folder: Path, donor: str, reach: str) -> Path:
    """A checkpoint of an unknown family with its own Python file."""
    shutil.copytree(donor, folder, ignore=shutil.ignore_patterns("model*"))
    (folder / "modeling_foreign.py").write_text(FOREIGN.replace("REACH", reach))
    auto = {"AutoConfig": "modeling_foreign.Config", "AutoModel": "modeling_foreign.Model"}
    config = {"model_type": "foreign", "architectures": ["Model"], "auto_map": auto, "mask_token_id": 320}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shapes = {"embed_tokens.weight": (384, 16), "out.weight": (384, 16), "out.bias": (384,)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_foreign_code_runs_only_when_asked_and_only_if_sound(folders: dict[str, str], tmp_path: Path) -> None:
    sound = str(foreign(tmp_path / "sound", folders["llada"], "around"))
    with pytest.raises(UserError, match=r"unknown model family 'foreign'.*--trust-remote-code"):
        load(sound)
    lm = load(sound, trust_remote_code=True)
    assert isinstance(lm.model, RemoteLM)
    ids, mask = lm.encode(["hello there", "an"], 8)
    assert decode(lm, ids, mask, make_decoder("ass", max_new_tokens=8)).tokens.shape == (2, 8)
    flat, keep = torch.tensor([3, 9]), torch.arange(384) != 320
    found = lm.forward_head(ids, mask, flat, lambda head, hidden: next(head.pieces(hidden))[1])
    assert torch.equal(found[:, keep], lm.model(ids, mask).logits.flatten(0, 1)[flat][:, keep])
    with pytest.raises(UserError, match="no cache of windows"):
        decode(lm, ids, mask, make_decoder("semi-ar:block_length=4,cache=dual", max_new_tokens=8))
    faults = {"x.mean(1, keepdim=True)": "left padding changes", "0 * around": "does not see", "nothing": "NameError"}
    for number, (reach, message) in enumerate(faults.items()):
        with pytest.raises(UserError, match=message):
            load(str(foreign(tmp_path / str(number), folders["llada"], reach)), trust_remote_code=True)
