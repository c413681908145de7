"""Random checkpoints in the published layouts: names of files, keys, config fields and special tokens as on the hub.

``python tests/checkpoints.py FOLDER`` writes one of LLaDA-8B's own size.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from unmask.models.llada import LLaDAConfig, LLaDAModelLM
from unmask.models.load import FAMILIES

CHAT = (
    "{{% for message in messages %}}{{{{ {start} + message['role'] + {after} + message['content'] + {end} }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ {start} + 'assistant' + {after} }}}}{{% endif %}}"
)
HEADER = {"start": "'<|start_header_id|>'", "after": "'<|end_header_id|>\\n\\n'", "end": "'<|eot_id|>'"}
LLADA_CHAT = "{{ bos_token }}" + CHAT.format(**HEADER)
QWEN_CHAT = CHAT.format(start="'<|im_start|>'", after="'\\n'", end="'<|im_end|>\\n'")
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("i", "n"), ("a", "n"), ("Ġ", "a")]

LLADA = json.loads("""{
    "activation_type": "silu", "alibi": false, "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0, "attention_layer_norm": false, "attention_layer_norm_with_affine": true,
    "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    "AutoModel": "modeling_llada.LLaDAModelLM"}, "bias_for_layer_norm": false, "block_group_size": 1, "block_type": "llama",
    "d_model": 32, "embedding_dropout": 0.0, "embedding_size": 384, "eos_token_id": 301, "flash_attention": false,
    "include_bias": false, "include_qkv_bias": false, "init_cutoff_factor": null, "init_device": "meta",
    "init_fn": "mitchell", "init_std": 0.5, "input_emb_norm": false, "layer_norm_type": "rms",
    "layer_norm_with_affine": true, "mask_token_id": 320, "max_sequence_length": 1024, "mlp_hidden_size": 64,
    "mlp_ratio": 4, "model_type": "llada", "multi_query_attention": null, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2,
    "pad_token_id": 301, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": true,
    "rope_full_precision": true, "rope_theta": 500000.0, "scale_logits": false, "transformers_version": "4.46.3",
    "use_cache": false, "vocab_size": 384, "weight_tying": false}""")
DREAM = json.loads("""{
    "architectures": ["DreamModel"], "attention_dropout": 0.0, "auto_map": {"AutoConfig": "configuration_dream.DreamConfig",
    "AutoModel": "modeling_dream.DreamModel"}, "bos_token_id": 300, "eos_token_id": 300, "hidden_act": "silu",
    "hidden_size": 32, "initializer_range": 0.5, "intermediate_size": 64, "mask_token_id": 323,
    "max_position_embeddings": 1024, "max_window_layers": 28, "model_type": "Dream", "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "pad_token_id": 300, "rms_norm_eps": 1e-06, "rope_scaling": null,
    "rope_theta": 1000000.0, "sliding_window": null, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
    "transformers_version": "4.46.2", "use_cache": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 384}""")
QWEN3_A2D = json.loads("""{
    "architectures": ["A2DQwen3LMHeadModel"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 300,
    "dtype": "float32", "eos_token_id": 302, "head_dim": 16, "hidden_act": "silu", "hidden_size": 32,
    "initializer_range": 0.5, "intermediate_size": 64, "layer_types": ["full_attention", "full_attention"],
    "max_position_embeddings": 1024, "max_window_layers": 28, "model_type": "a2d-qwen3", "num_attention_heads": 4,
    "num_hidden_layers": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000,
    "sliding_window": null, "tie_word_embeddings": true, "use_cache": true, "use_sliding_window": false, "vocab_size": 384}""")


def _json(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def _vocabulary() -> dict[str, int]:
    """The 256 bytes, then the merged pairs."""
    return {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), *(a + b for a, b in MERGES)])}


def _added(tokens: dict[int, str]) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {str(i): {"content": t, **flags} for i, t in tokens.items()}


def _fast_tokenizer(folder: Path, tokens: dict[int, str], settings: dict[str, Any]) -> None:
    """tokenizer.json and tokenizer_config.json; the gaps of the ids are filled with reserved tokens, as on the hub."""
    vocabulary = _vocabulary()
    core = Tokenizer(models.BPE(vocabulary, MERGES))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    every = {i: tokens.get(i, f"<|reserved_token_{i}|>") for i in range(len(vocabulary), max(tokens) + 1)}
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in every.values()])
    core.save(str(folder / "tokenizer.json"))
    settings = {"added_tokens_decoder": _added(every), "tokenizer_class": "PreTrainedTokenizerFast", **settings}
    _json(folder, "tokenizer_config.json", settings)


def _write(folder: Path, config: dict[str, Any], seed: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """Random weights in several shards, and the config.json as on the hub."""
    kind = FAMILIES[config["model_type"]]
    torch.manual_seed(seed)
    kind(kind.config_class(**config)).to(dtype).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("model-0000?-of-0000?.safetensors"))) >= 2
    _json(folder, "config.json", config)


def write_llada(folder: Path, seed: int = 1, **changes: Any) -> str:
    """As GSAI-ML/LLaDA-8B-Instruct: bfloat16 in two shards, no dtype and no mask token outside config.json."""
    _write(folder, {**LLADA, **changes}, seed)
    _llada_tokenizer(folder)
    return str(folder)


def _llada_tokenizer(folder: Path) -> None:
    special = {300: "<|startoftext|>", 301: "<|endoftext|>", 302: "[CLS]", 303: "[gMASK]", 320: "<|mdm_mask|>"}
    special |= {346: "<|start_header_id|>", 347: "<|end_header_id|>", 348: "<|eot_id|>"}
    settings = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    _fast_tokenizer(folder, special, {"chat_template": LLADA_CHAT, "model_max_length": 10**30, **settings})


def write_llada_8b(folder: Path) -> str:
    """A random checkpoint of LLaDA-8B's own size, 15 GiB in six shards, made a shard at a time; most of its ids are unused."""
    shape = {"d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_hidden_size": 12288}
    config = {**LLADA, **shape, "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2**24, generator=generator)  # turned, in every matrix: drawing 8 billion takes long
    index, shard = {}, {}
    folder.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        keys = LLaDAModelLM(LLaDAConfig(**config)).state_dict()
    for number, (key, parameter) in enumerate(keys.items(), 1):
        parts = -(-parameter.numel() // noise.numel())
        turns = torch.randint(2**24, (parts,), generator=generator).tolist()
        flat = torch.cat([noise.roll(turn) for turn in turns])[: parameter.numel()].view(parameter.shape)
        scaled = torch.ones(parameter.shape) if flat.dim() == 1 else flat * flat.shape[1] ** -0.5
        shard[key] = scaled.bfloat16().contiguous()
        if number == len(keys) or sum(t.nbytes for t in shard.values()) > 2.9e9:
            name = f"model-{len(set(index.values())) + 1:05d}-of-00006.safetensors"
            save_file(shard, folder / name, metadata={"format": "pt"})
            index |= dict.fromkeys(shard, name)
            shard = {}
    _json(folder, "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    _json(folder, "config.json", config)
    _llada_tokenizer(folder)
    return str(folder)


def write_dream(folder: Path, seed: int = 1, **changes: Any) -> str:
    """As Dream-org/Dream-v0-Instruct-7B: a tokenizer of its own class, as vocab.json and merges.txt."""
    _write(folder, {**DREAM, **changes}, seed)
    _json(folder, "vocab.json", _vocabulary())
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in MERGES)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {300: "<|endoftext|>", 301: "<|im_start|>", 302: "<|im_end|>", 322: "<|beginoftext|>", 323: "<|mask|>"}
    every = {i: special.get(i, f"<|fill_{i}|>") for i in range(len(_vocabulary()), 324)}
    named = {"bos": "<|beginoftext|>", "eos": "<|endoftext|>", "mask": "<|mask|>", "pad": "<|endoftext|>", "unk": None}
    settings = {"added_tokens_decoder": _added(every), **{f"{name}_token": token for name, token in named.items()}}
    settings |= {"auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}
    settings |= {"chat_template": QWEN_CHAT, "tokenizer_class": "DreamTokenizer"}
    _json(folder, "tokenizer_config.json", settings)
    return str(folder)


def write_qwen3_a2d(folder: Path, seed: int = 1, **changes: Any) -> str:
    """As dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1: tied embeddings, the mask token in the tokenizer, <|im_end|> as its EOS."""
    _write(folder, {**QWEN3_A2D, **changes}, seed, torch.float32)
    special = {300: "<|endoftext|>", 301: "<|im_start|>", 302: "<|im_end|>", 323: "<|mask|>"}
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    _fast_tokenizer(folder, special, {"chat_template": QWEN_CHAT, **settings})
    return str(folder)


WRITERS = {"llada": write_llada, "dream": write_dream, "qwen3-a2d": write_qwen3_a2d}


if __name__ == "__main__":
    print(write_llada_8b(Path(sys.argv[1])))
