"""MaskedLM: a checkpoint with the facts that decoding and training need, and the checks that make it safe to use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unmask.errors import UserError
from unmask.io.files import as_utf8
from unmask.models.backbone import KVCache
from unmask.models.head import Head

if TYPE_CHECKING:
    from unmask.decoding.decoder import Decoder
    from unmask.decoding.generate import Generation, Prompt

Result = TypeVar("Result")
Text: TypeAlias = str | Sequence[int]
"""A text, or its token ids."""
# Of LLaDA and Llama, of Dream and Qwen, of LLaDA2: ends the text where EOS only fills the canvas.
END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|role_end|>")


@dataclass
class MaskedLM:
    """A masked diffusion language model: backbone, tokenizer and the ids read from them."""

    model: PreTrainedModel
    """The backbone, whose forward takes ``positions`` (see ``HeadAtPositions.forward``)."""
    tokenizer: PreTrainedTokenizerBase
    name: str
    mask_id: int
    eos_id: int
    pad_id: int
    eot_id: int | None
    """The end-of-turn id, where the tokenizer has one beside EOS."""
    max_length: int
    """The longest prompt + canvas that the checkpoint was made for, in tokens."""
    weights: str
    """A fingerprint of the weight files, so that a record can name them."""
    block_length: int | None = None
    """Tokens of a block, where attention is block-causal (block diffusion); None where it is full."""

    @classmethod
    def wrap(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, weights: str = "unsaved"
    ) -> MaskedLM:
        """Read the ids from the tokenizer, then the config. Raises UserError where mask or EOS cannot be found."""
        config, vocabulary = model.config, tokenizer.get_vocab()
        tokenizer.clean_up_tokenization_spaces = False  # a text is that of its tokens, wherever it is cut

        def read(field: str) -> Any:
            found = getattr(tokenizer, field)
            return found if found is not None else getattr(config, field, None)

        if len({tokenizer.mask_token_id, getattr(config, "mask_token_id", None)} - {None}) == 2:
            differ = (
                f"its tokenizer's mask token is {tokenizer.mask_token_id}, its config.json says {config.mask_token_id}"
            )
            raise UserError(f"{name} is refused: {differ}: set both alike")
        mask_id, eos_id, pad_id = read("mask_token_id"), read("eos_token_id"), read("pad_token_id")
        if mask_id is None:  # some families have it in their vocabulary, and its name in their code alone
            mask_token: Any = getattr(model, "mask_token", None)
            mask_id = mask_token if isinstance(mask_token, int) else vocabulary.get(mask_token)
        for what, value in (("mask", mask_id), ("end-of-sequence", eos_id)):
            if not isinstance(value, int):
                raise UserError(f"{name} names no {what} token: set it in its tokenizer_config.json or config.json")
        pad_id = eos_id if pad_id is None else pad_id
        turns = [vocabulary[t] for t in END_OF_TURN if t in vocabulary]
        if eos_id in turns:  # Qwen's chat models: what fills the canvas is their padding
            eos_id = pad_id
        eot_id = next((t for t in turns if t != eos_id), None)
        length, block = config.max_position_embeddings, getattr(config, "block_length", None)
        return cls(model, tokenizer, name, mask_id, eos_id, pad_id, eot_id, length, weights, block)

    @property
    def device(self) -> torch.device:
        """Where canvases live: the head's device, where the model is spread over several."""
        head: Any = getattr(self.model.get_output_embeddings(), "weight", None)
        return self.model.device if head is None or head.is_meta else head.device

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end the text: EOS, and EoT where there is one."""
        return (self.eos_id,) if self.eot_id is None else (self.eos_id, self.eot_id)

    def forward_head(
        self,
        ids: Tensor,
        attention_mask: Tensor | None,
        positions: Tensor,
        fn: Callable[[Head, Tensor], Result],
        cache: KVCache | None = None,
        window: Tensor | None = None,
        clean: Tensor | None = None,
    ) -> Result:
        """One forward pass; what ``fn`` makes of the head and the hidden states at ``positions``.

        Args:
            ids: (B, T) int64. attention_mask: (B, T) bool, False = padding, or None.
            positions: (N,) int64 into the flattened rows; the hidden states are (N, d), each for its own position.
            fn: called once, with (head, hidden states).
            cache, window, clean: see ``HeadAtPositions.forward``; with a window, ``positions`` count in the flattened window.
        """

        def read(hidden: Tensor, embedding: nn.Module, head: Callable[[Tensor], Tensor]) -> Result:
            return fn(Head.of(embedding, head, self.mask_id), hidden)

        how: dict[str, Any] = {"positions": positions, "fn": read, "cache": cache, "window": window}
        if clean is not None:  # (foreign code knows no such thing)
            how["clean"] = clean
        return self.model(input_ids=ids, attention_mask=attention_mask, **how).logits

    @property
    def task_defaults(self) -> dict[str, dict[str, Any]]:
        """Parameters by task name that the checkpoint was trained for; empty for published ones."""
        return getattr(self.model.config, "task_defaults", None) or {}

    def generate(
        self, prompts: Prompt | Sequence[Prompt], decoder: str | Decoder | None = None, **options: Any
    ) -> Generation:
        """Complete prompts; ``unmask.decoding.generate.generate`` says what ``options`` there are."""
        from unmask.decoding.generate import generate  # the front door: the one import that points the other way

        return generate(self, prompts, decoder, **options)

    def chat(self, user: str, prefill: str = "", examples: Sequence[tuple[str, str]] = ()) -> str:
        """The prompt text for one user turn, ending where the assistant's text (after ``prefill``) begins.

        ``examples`` are earlier turns, (user's, assistant's), for few-shot prompts.
        """
        if not user.strip():
            raise UserError("the prompt is empty: write some text")
        if self.tokenizer.chat_template is None:
            return "".join(f"{asked}{answered}\n\n" for asked, answered in examples) + user + prefill
        turns = [turn for asked, answered in examples for turn in (("user", asked), ("assistant", answered))]
        messages = [{"role": role, "content": text} for role, text in (*turns, ("user", user))]
        return as_utf8(self.render(messages) + prefill)

    def render(self, messages: list[dict[str, str]], answer: bool = True, unfinished: bool = False) -> str:
        """Messages as the chat template writes them; UserError where it cannot.

        ``answer``: add the beginning of the assistant's next turn; ``unfinished``: end inside the last message.
        """
        # enable_thinking is Qwen3's: without it, its template asks for another format. Other templates pass it over.
        how: dict[str, Any] = {"add_generation_prompt": answer, "continue_final_message": unfinished}
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False, **how)
        except (TemplateError, ValueError, TypeError) as error:
            refuses = f"the chat template of {self.name} refuses the messages ({error})"
            raise UserError(f"{refuses}: change them, or repair the template") from None
        return str(text)

    def tokens(self, text: Text) -> list[int]:
        """Token ids of a text, without special tokens around it; ids as they are. Raises UserError for what cannot be one."""
        if isinstance(text, str):
            return self.tokenizer(as_utf8(text), add_special_tokens=False)["input_ids"]
        ids, vocabulary = [int(i) for i in text], len(self.model.get_input_embeddings().weight)  # type: ignore[arg-type]
        for i in ids:
            if not 0 <= i < vocabulary:
                outside = f"token id {i} lies outside the vocabulary of {self.name}"
                raise UserError(f"{outside}: choose 0 to {vocabulary - 1}")
        return ids

    def encode(
        self, prompts: Sequence[Text], canvas: int = 0, width: int = 0, empty: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Prompts of any lengths as one left-padded batch, at least ``width`` tokens wide, on the model's device.

        ids (B, P) int64 and the padding mask (B, P) bool (False = padding). Raises UserError for a prompt that is empty (unless
        it may be), no Unicode text, too long with a canvas of so many tokens behind it, or holds the mask token.
        """
        rows = [self.tokens(prompt) for prompt in prompts]
        for text, row in zip(prompts, rows, strict=True):
            if not row and not empty:
                raise UserError("the prompt is empty: pass some text")
            if self.mask_id in row:
                token = self.tokenizer.convert_ids_to_tokens(self.mask_id)
                raise UserError(f"the prompt {text[:60]!r} holds the mask token {token}: remove it")
            if len(row) + canvas > self.max_length:
                long = f"the prompt has {len(row)} tokens and the canvas {canvas}, but {self.name} takes at most"
                raise UserError(f"{long} {self.max_length} together: shorten the prompt or lower --max-new-tokens")
        width = max([width, *map(len, rows)])
        ids = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, width - len(row) :] = torch.tensor(row)
            mask[i, width - len(row) :] = True
        return ids.to(self.device), mask.to(self.device)

    def text(self, tokens: Tensor, mask: str | None = None) -> list[str]:
        """Each row's text up to its first end token, masks as ``mask`` (None: as the tokenizer writes them). (B, L) int64."""
        rows = [row[:n] for row, n in zip(tokens.tolist(), self.lengths(tokens).tolist(), strict=True)]
        if mask is None:
            return [str(self.tokenizer.decode(row)) for row in rows]
        runs = [[(key, list(run)) for key, run in groupby(row, lambda token: token == self.mask_id)] for row in rows]
        return [
            "".join(mask * len(run) if hidden else str(self.tokenizer.decode(run)) for hidden, run in row)
            for row in runs
        ]

    def lengths(self, tokens: Tensor) -> Tensor:
        """Number of tokens before the first end token, (B,) int64; L where there is none. tokens (B, L)."""
        ends = torch.isin(tokens, torch.tensor(self.end_ids, device=tokens.device))
        return (ends.cumsum(1) == 0).sum(1)

    @torch.no_grad()
    def self_test(self) -> dict[str, float]:
        """Check on short rows that the checkpoint is a usable bidirectional model (within its blocks), in its own dtype.

        Returns ``padding`` (logit change that left padding makes, in standard deviations of the logits: the root mean square of
        the worst position, since the largest of millions may be rounding in bfloat16; of the median one where rounding may
        choose other experts for a token), ``left`` and ``right`` (largest change at one end of a row when the other end's token
        changes, in the same unit; of two blocks, ``right`` is within the first).
        Raises UserError if padding shows, a side is not seen, a later block is, something is not finite, or the mask id is no
        token's.
        """
        vocabulary = len(self.model.get_input_embeddings().weight)  # type: ignore[arg-type]
        if not 0 <= self.mask_id < vocabulary:
            outside = f"its mask id {self.mask_id} lies outside its vocabulary of {vocabulary}"
            raise UserError(f"{self.name} is refused: {outside}")
        usable = torch.tensor([i for i in range(vocabulary) if i not in (self.mask_id, *self.end_ids)][:64])
        length = 2 * (self.block_length or 6)
        end = length if self.block_length is None else self.block_length  # of what the first token sees
        row = usable[torch.arange(length) * 5 % len(usable)].to(self.device)
        row[length // 3 : length // 2] = self.mask_id
        every, pads = torch.arange(length, device=self.device), torch.full((5,), self.pad_id, device=self.device)
        training = self.model.training
        self.model.eval()

        def run(ids: Tensor, mask: Tensor | None = None, skip: int = 0) -> Tensor:
            return self.model(input_ids=ids[None], attention_mask=mask, positions=every + skip).logits.float()

        def edited(at: int) -> Tensor:
            """The logits when the token there is another one."""
            return run(row.index_fill(0, every[at : at + 1], int(usable[-1])))

        def change(one: Tensor, other: Tensor) -> float:
            positions = (one - other).square().mean(-1).sqrt()
            return float(positions.median() if hasattr(self.model.config, "num_experts_per_tok") else positions.max())

        plain, left, right, later = run(row), edited(0), edited(end - 1), edited(length - 1)
        padded = run(torch.cat([pads, row]), (torch.arange(length + 5, device=self.device) >= 5)[None], 5)
        self.model.train(training)
        scale = float(plain.std()) or 1.0
        found = {
            "padding": change(plain, padded) / scale,
            "left": float((plain - left)[-1].abs().max()) / scale,
            "right": float((plain - right)[0].abs().max()) / scale,
        }
        tolerance = 1e-3 if self.model.dtype == torch.float32 else 0.1
        if not all(t.isfinite().all() for t in (plain, padded, left, right)):
            raise UserError(f"{self.name} is refused: its logits are not finite (weights or rotary tables are broken)")
        if found["padding"] > tolerance:
            changes = (
                f"left padding changes its logits by {found['padding']:.2g} standard deviations (at most {tolerance:g})"
            )
            raise UserError(f"{self.name} is refused: {changes}, so batches of different prompts would be wrong")
        for side in (side for side in ("left", "right") if found[side] == 0.0):
            blind = f"it does not see tokens to the {side}, so it is not bidirectional"
            raise UserError(f"{self.name} is refused: {blind}")
        if end < length and change(plain[:end], later[:end]) / scale > tolerance:
            beyond = f"a block of {end} tokens sees the block behind it, so it is not block-causal"
            raise UserError(f"{self.name} is refused: {beyond}")
        return found

    def info(self) -> dict[str, Any]:
        """Facts for a record: name, family, parameters, ids."""
        return {
            "name": self.name,
            "family": self.model.config.model_type,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **{k: getattr(self, k) for k in ("mask_id", "eos_id", "eot_id", "max_length", "weights")},
            **({} if self.block_length is None else {"block_length": self.block_length}),
        }
