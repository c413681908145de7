"""Random checkpoints in the published layouts: names of files, keys, config fields and special tokens as on the hub.

``python tests/checkpoints.py FOLDER`` writes one of LLaDA-8B's own size.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from unmask.models.llada import LLaDAConfig, LLaDAModelLM
from unmask.models.load import family

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

_QWEN = {"bos_token_id": 300, "eos_token_id": 300, "hidden_act": "silu", "hidden_size": 32, "initializer_range": 0.5}
_QWEN |= {"intermediate_size": 64, "max_position_embeddings": 1024, "num_attention_heads": 4, "num_hidden_layers": 2}
_QWEN |= {
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "vocab_size": 384,
}
_QWEN |= {"tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": False, "attention_dropout": 0.0}
_EXPERTS = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}


def _auto_map(file: str, name: str, head: str) -> dict[str, str]:
    """As the published files name their own Python code."""
    return {"AutoConfig": f"configuration_{file}.{name}Config", "AutoModelForCausalLM": f"modeling_{file}.{name}{head}"}


SDAR = _QWEN | {"architectures": ["SDARForCausalLM"], "model_type": "sdar", "block_size": 4, "mask_token_id": 323}
SDAR |= {"attention_bias": False, "head_dim": 16, "auto_map": _auto_map("sdar", "SDAR", "ForCausalLM")}
SDAR_MOE = (
    SDAR | _EXPERTS | {"architectures": ["SDARMoeForCausalLM"], "model_type": "sdar_moe", "decoder_sparse_step": 1}
)
SDAR_MOE |= {"mlp_only_layers": [], "auto_map": _auto_map("sdar_moe", "SDARMoe", "ForCausalLM")}
FAST_DLLM = _QWEN | {"architectures": ["Fast_dLLM_QwenForCausalLM"], "model_type": "Fast_dLLM_Qwen", "bd_size": 32}
FAST_DLLM |= {"eos_token_id": 302, "auto_map": _auto_map("fast", "Fast_dLLM_Qwen", "ForCausalLM")}
LLADA2 = _QWEN | _EXPERTS | {"architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "head_dim": 16}
LLADA2 |= {"num_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "sliding_window": 4096}
LLADA2 |= {"routed_scaling_factor": 2.5, "partial_rotary_factor": 0.5, "rope_theta": 600000, "pad_token_id": 300}
LLADA2 |= {"score_function": "sigmoid", "use_bias": False, "use_qkv_bias": False, "moe_router_enable_expert_bias": True}
LLADA2 |= {"auto_map": _auto_map("llada2_moe", "LLaDA2Moe", "ModelLM")}
LLADA_MOE = _QWEN | {
    "architectures": ["LLaDAMoEModelLM"],
    "model_type": "llada",
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
LLADA_MOE |= {"expert_intermediate_size": 16, "norm_topk_prob": True, "qk_layernorm": True, "pad_token_id": 300}
LLADA_MOE |= {"moe_layer_freq": [1, 1], "shared_expert_intermediate_size": None, "dense_intermediate_size": 64}
DIFFCODER = _QWEN | {"architectures": ["StableDiffcoderForCausalLM"], "model_type": "llama", "attention_dropout": 0.1}
DIFFCODER |= {"bos_token_id": 0, "eos_token_id": 2, "rope_theta": 500000.0, "mlp_bias": False, "resid_pdrop": 0.1}
DIFFCODER |= {"auto_map": {"AutoModelForCausalLM": "modeling_stable_diffcoder.StableDiffcoderForCausalLM"}}
ILLADA = DIFFCODER | {"architectures": ["ILLaDAForCausalLM"], "model_type": "illada", "tie_word_embeddings": True}
ILLADA |= {"auto_map": _auto_map("illada", "ILLaDA", "ForCausalLM")}
LLADA_MOE |= {"auto_map": _auto_map("lladamoe", "LLaDAMoE", "ModelLM")}


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
    folder.mkdir(parents=True, exist_ok=True)
    _json(folder, "config.json", config)
    kind = family(folder)[1]
    torch.manual_seed(seed)
    model = kind(kind.config_class.from_pretrained(folder)).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj", "gate.weight")):  # which have no initial scale
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    model.save_pretrained(folder, max_shard_size="60KB")
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


def write_sdar(folder: Path, seed: int = 1, **changes: Any) -> str:
    """As JetLM/SDAR-1.7B-Chat: the mask token in the vocabulary, its id in config.json too."""
    return _write_qwen(folder, {**SDAR, **changes}, seed, "<|MASK|>")


def write_sdar_moe(folder: Path, seed: int = 1, **changes: Any) -> str:
    """As JetLM/SDAR-30B-A3B-Chat."""
    return _write_qwen(folder, {**SDAR_MOE, **changes}, seed, "<|MASK|>")


def write_fast_dllm(folder: Path, seed: int = 1, **changes: Any) -> str:
    """As Efficient-Large-Model/Fast_dLLM_v2_1.5B: the mask token in the vocabulary alone."""
    return _write_qwen(folder, {**FAST_DLLM, **changes}, seed, "|<MASK>|")


def _write_qwen(folder: Path, config: dict[str, Any], seed: int, mask: str) -> str:
    _write(folder, config, seed)
    special = {300: "<|endoftext|>", 301: "<|im_start|>", 302: "<|im_end|>", 323: mask}
    _fast_tokenizer(
        folder, special, {"chat_template": QWEN_CHAT, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    )
    return str(folder)


def write_llada2(folder: Path, seed: int = 1, **changes: Any) -> str:
    """As inclusionAI/LLaDA2.0-mini."""
    return _write_roles(folder, {**LLADA2, **changes}, seed)


def write_llada_moe(folder: Path, seed: int = 1, **changes: Any) -> str:
    """As inclusionAI/LLaDA-MoE-7B-A1B-Instruct, whose model type is LLaDA's."""
    return _write_roles(folder, {**LLADA_MOE, **changes}, seed)


def _write_roles(folder: Path, config: dict[str, Any], seed: int) -> str:
    _write(folder, config, seed)
    special = {300: "<|endoftext|>", 301: "<role>", 302: "</role>", 303: "<|role_end|>", 323: "<|mask|>"}
    chat = CHAT.format(start="'<role>'", after="'</role>'", end="'<|role_end|>'")
    named = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}
    _fast_tokenizer(folder, special, {"chat_template": chat, **named})
    return str(folder)


def write_diffcoder(folder: Path, seed: int = 1, **changes: Any) -> str:
    """As ByteDance-Seed/Stable-DiffCoder-8B-Instruct: Llama's model type, mask id 5 in its code alone."""
    return _write_seed_coder(folder, {**DIFFCODER, **changes}, seed, {})


def write_illada(folder: Path, seed: int = 1, **changes: Any) -> str:
    """As GSAI-ML/iLLaDA-8B-Instruct: Llama's layout, tied, the mask token in the vocabulary alone."""
    return _write_seed_coder(folder, {**ILLADA, **changes}, seed, {323: "<[MASK]>"})


def _write_seed_coder(folder: Path, config: dict[str, Any], seed: int, mask: dict[int, str]) -> str:
    _write(folder, config, seed)
    special = {300: "<[begin_of_sentence]>", 301: "<[PAD_TOKEN]>", 302: "<[end_of_sentence]>"}
    named = {"bos_token": special[300], "pad_token": special[301], "eos_token": special[302]}
    chat = CHAT.format(start="'['", after="']'", end=f"'{special[302]}'")
    _fast_tokenizer(folder, special | mask, {"chat_template": chat, **named})
    return str(folder)


BLOCKS = {"sdar": write_sdar, "sdar-moe": write_sdar_moe, "fast-dllm": write_fast_dllm, "llada2": write_llada2}
BLOCKS |= {"diffcoder": write_diffcoder, "a2d-bd3lm": partial(write_qwen3_a2d, block_length=4)}
WRITERS = {"llada": write_llada, "dream": write_dream, "qwen3-a2d": write_qwen3_a2d}
WRITERS |= BLOCKS | {"llada-moe": write_llada_moe, "illada": write_illada}


if __name__ == "__main__":
    folder, small = Path(sys.argv[1]), sys.argv[2:] == ["small"]
    print(write_llada(folder) if small else write_llada_8b(folder))
