"""A new, small LLaDA with a character-level tokenizer, for training from scratch (this is how ``tiny`` began)."""

from __future__ import annotations

import string
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from unmask.errors import UserError, unknown
from unmask.models.llada import LLaDAConfig, LLaDAModelLM

MASK, EOS, EOT, UNK = "<|mdm_mask|>", "<|endoftext|>", "<|eot_id|>", "<|unk|>"
CONTROL = (EOS, EOT, MASK, UNK, "<|user|>", "<|assistant|>")
TAGS = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")  # one token each, kept when text is decoded

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """Printable ASCII and newline one token a character, the answer tags one token each, and LLaDA's end tokens."""
    symbols = [*CONTROL, *TAGS, *sorted(set(string.printable) - set("\t\r\x0b\x0c"))]
    core = Tokenizer(models.WordLevel({s: i for i, s in enumerate(symbols)}, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=EOS, pad_token=EOS, mask_token=MASK, unk_token=UNK, padding_side="left"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def new_model(shape: dict[str, Any], seed: int) -> tuple[LLaDAModelLM, PreTrainedTokenizerFast]:
    """A randomly initialized model (float32) and its tokenizer; ``shape`` holds LLaDAConfig fields. Raises UserError."""
    tokenizer = character_tokenizer()
    ids: dict[str, Any] = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    ids["vocab_size"] = len(tokenizer)
    fields = set(LLaDAConfig.__annotations__) - {"embedding_size", "task_defaults", *ids}
    for key in shape:
        if key not in fields:
            raise unknown("key of new_model", key, fields)
    try:
        config = LLaDAConfig(**shape, **ids, architectures=["LLaDAModelLM"])
    except (ValueError, ArithmeticError, StrictDataclassError) as error:
        raise UserError(f"new_model is no LLaDA shape: {' '.join(str(error).split())}") from None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # that of the CPU, which the fork restores
        model = LLaDAModelLM(config)
    return model, tokenizer
