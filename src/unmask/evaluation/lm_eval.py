"""``unmask`` as a model of EleutherAI's lm-evaluation-harness: its tasks, prompts and metrics, our decoders and bounds.

lm-eval finds models in a registry that it fills itself, without entry points; importing this module adds ``unmask`` to it.

A masked diffusion model gives no log p(y | x) in closed form. LLaDA (arXiv 2502.09992, Eq. 6 and Algorithm 3) evaluates with a
lower bound: with l uniform in 1..L, and M drawn from the sets of l of the L positions of y,

    log p(y | x) >= E [ (L / l) * sum over i in M of log p(y_i | x, y with M masked) ]

It equals the mean, over all orders, of writing y one token at a time. The context x is never masked.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from unmask import __version__
from unmask.config import build
from unmask.decoding import Decoder, decode, decode_each, make_decoder
from unmask.decoding.generate import until
from unmask.decoding.score import score_states
from unmask.errors import UserError, check_at_least
from unmask.evaluation.distributed import init_distributed
from unmask.models.masked_lm import MaskedLM
from unmask.models.source import ModelSource

try:
    from lm_eval import utils
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import Collator, normalize_gen_kwargs
except ImportError:
    raise UserError("lm-evaluation-harness 0.4.13 or later is not installed: pip install unmask[lm-eval]") from None

log = logging.getLogger(__name__)
Pair = tuple[list[int], list[int]]  # token ids of a context and of the continuation behind it
HINT = "a decoder's own go into it with semicolons, decoder=eoser-ass:blocks=4;temperature=0.7"


@dataclass(kw_only=True)
class HarnessSettings(ModelSource):
    """The model arguments of ``--model unmask``; ``pretrained`` is ``model``."""

    decoder: str = "semi-ar"
    """Decoder spec with semicolons between its parameters, ``eoser-ass:blocks=4;temperature=0.7``, or a YAML file."""
    max_new_tokens: int = 256
    """Canvas length in tokens, unless the task (``max_gen_toks``) or the decoder sets it."""
    batch_size: int = 8
    """Rows of one forward pass. lm-eval's ``--batch_size`` (1 by default) holds unless this is given."""
    mc_samples: int = 128
    """Masked copies of a text from which its log-likelihood is estimated; exact where they are enough for all masks."""
    seed: int = 0
    """Seed of sampling and of masks; lm-eval's own ``--seed`` does not reach a model."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "batch_size", "mc_samples")


@register_model("unmask")
class UnmaskLM(TemplateLM):
    """A masked diffusion language model behind lm-eval's three requests.

    Args:
        pretrained: name or path as in ``ModelSource.model``, or a MaskedLM.
        arguments: fields of ``HarnessSettings``.

    Raises:
        UserError: for anything wrong in the arguments or the checkpoint.
    """

    def __init__(self, pretrained: str | MaskedLM | None = None, **arguments: Any) -> None:
        super().__init__()
        if pretrained is not None:
            if "model" in arguments:
                raise UserError("pretrained and model are one thing: use one of them")
            arguments["model"] = pretrained.name if isinstance(pretrained, MaskedLM) else pretrained
        values = {k: v if v is None else str(v) for k, v in arguments.items()}  # lm-eval has guessed types for them
        self.settings = build(HarnessSettings, values, f"--model unmask ({HINT})")
        self.spec = self.settings.decoder.replace(";", ",")
        self.decoder = make_decoder(self.spec, max_new_tokens=self.settings.max_new_tokens)
        self.processes = init_distributed()
        if self.processes.world > 1 and self.settings.device != "cpu":
            self.settings = replace(self.settings, device="auto")  # each process its own
        self.lm = pretrained if isinstance(pretrained, MaskedLM) else self.settings.load()
        self.tokenizer: Any = self.lm.tokenizer
        self._device = self.lm.device
        self._rank, self._world_size = self.processes.rank, self.processes.world
        self.batch_size, self.max_length = self.settings.batch_size, self.lm.max_length

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> UnmaskLM:
        """From model arguments, and lm-eval's own flags for what these leave open (``cuda:0`` where nobody named a device)."""
        flags = {k: v for k, v in (additional_config or {}).items() if v not in (None, "cuda:0")}
        return cls(**{**flags, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> UnmaskLM:
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @property
    def eot_token_id(self) -> int:
        return self.lm.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What precedes a text without a context: the tokenizer's BOS, else EOS."""
        bos = self.tokenizer.bos_token_id
        return self.lm.eos_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens only where the text spells them, as everywhere here."""
        return self.lm.tokens(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt of a conversation; without a generation prompt it ends inside its last message."""
        if self.tokenizer.chat_template is None:
            raise UserError(f"{self.lm.name} has no chat template: leave --apply_chat_template out")
        return self.lm.render(chat_history, answer=add_generation_prompt, unfinished=not add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's results file: everything that a figure depends on here."""
        info, own = self.lm.info(), {k: getattr(self.settings, k) for k in ("batch_size", "mc_samples", "seed")}
        ours = {"version": __version__, "model": info, "decoder": self.decoder.config(), **own}
        return {"model_num_parameters": info["parameters"], "model_dtype": info["dtype"], "unmask": ours}

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.tensor(self.processes.gather(tensor.tolist()))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        found = self.processes.gather(obj)
        return found if self.rank == dst else None

    def barrier(self) -> None:
        self.processes.gather(None)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The texts, in the order of the requests: up to the first end token, then up to the first stop string."""
        decoders = [self._decoder_for(request.args[1]) for request in requests]
        rooms = [max(1, self.max_length - decoder.max_new_tokens) for decoder in decoders]
        prompts = self._fit([self.tok_encode(request.args[0]) for request in requests], rooms)
        seeds, texts = self._seeds(requests), [""] * len(requests)
        with self._bar(len(requests), "generate_until", disable_tqdm) as bar:
            for decoder in dict.fromkeys(decoders):
                own = (i for i in range(len(requests)) if decoders[i] == decoder)
                members = sorted(own, key=lambda i: -len(prompts[i]))
                chosen = [prompts[i] for i in members]
                for numbers, trajectory in decode_each(self.lm, chosen, decoder, seeds[members], self.batch_size):
                    for number, text in zip(numbers, self.lm.text(trajectory.tokens), strict=True):
                        i = members[number]
                        texts[i] = until(text, normalize_gen_kwargs(requests[i].args[1])["until"])
                    bar.update(len(numbers))
        return texts

    def _decoder_for(self, kwargs: dict[str, Any]) -> Decoder:
        """The decoder with a request's canvas, and its temperature where it asks for sampling."""
        asked = normalize_gen_kwargs(kwargs, self.decoder.max_new_tokens)
        length = asked["max_gen_toks"]
        for name in asked.keys() - {"until", "max_gen_toks", "temperature", "do_sample"}:
            utils.warning_once(log, "unmask does not read %s in generation_kwargs: set the decoder instead", name)
        try:
            decoder = make_decoder(self.spec, max_new_tokens=length)
            decoder = decoder.replace(max_new_tokens=length)  # also where a file names another
            if asked["do_sample"] and "temperature" in kwargs:
                decoder = decoder.replace(temperature=float(kwargs["temperature"]))
        except UserError as error:
            hint = "the canvas is the task's max_gen_toks, which --gen_kwargs max_gen_toks=N sets"
            raise UserError(f"{error}; {hint}") from None
        return decoder.within(self.lm.block_length)

    def _seeds(self, requests: Sequence[Instance]) -> Tensor:
        """One seed a request, of its content; equal requests (repeats) get different ones."""
        copies: defaultdict[int, Iterator[int]] = defaultdict(itertools.count)
        own = [content_seed(self.settings.seed, r.task_name, r.doc_id, *r.args) for r in requests]
        return torch.tensor([content_seed(seed, next(copies[seed])) for seed in own], dtype=torch.int64)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(lower bound on the log-likelihood, whether greedy decoding writes the continuation) for each request."""
        pairs = [(context, continuation) for _, context, continuation in requests]
        return self._score(pairs, "loglikelihood", disable_tqdm, greedy=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Lower bounds on the log-likelihood of whole texts: the sum over windows, each behind what comes before it."""
        start, most = self.prefix_token_id, self.max_length - 1
        texts = [utils.get_rolling_token_windows(self.tok_encode(r.args[0]), start, most, 1) for r in requests]
        windows = [list(map(utils.make_disjoint_window, text)) for text in texts]
        found = iter(self._score(list(itertools.chain(*windows)), "loglikelihood_rolling", disable_tqdm))
        return [sum((bound for bound, _ in itertools.islice(found, len(own))), 0.0) for own in windows]

    def _score(self, pairs: list[Pair], what: str, disable: bool, greedy: bool = False) -> list[tuple[float, bool]]:
        """Bound and, where asked for, ``is_greedy`` of every pair, cut to the model's length."""
        contexts = self._fit([context for context, _ in pairs], [self.max_length - len(text) for _, text in pairs])
        fitting = [(context, text) for context, (_, text) in zip(contexts, pairs, strict=True)]
        order = Collator(fitting, lambda p: (len(p[0]), p[0]), lambda p: {"length": len(p[1])}, "gen_kwargs")
        s, w = self.settings, self.decoder.cfg_scale
        found: list[tuple[float, bool]] = []
        with self._bar(len(pairs), what, disable) as bar:
            for batch in order.get_batched(self.batch_size):
                bound = bounds(self.lm, batch, s.mc_samples, s.seed, s.batch_size, w)
                written = is_greedy(self.lm, batch, w) if greedy else [False] * len(batch)
                found += zip(bound, written, strict=True)
                bar.update(len(batch))
        return order.get_original(found)

    def _fit(self, contexts: list[list[int]], rooms: list[int]) -> list[list[int]]:
        """Contexts of at most so many tokens each: too long a one loses its beginning, with a warning that counts them."""
        fitting = [context[max(0, len(context) - room) :] for context, room in zip(contexts, rooms, strict=True)]
        if cut := sum(a != b for a, b in zip(contexts, fitting, strict=True)):
            said = "%d of %d contexts lost their beginning, to fit into %d tokens"
            log.warning(said, cut, len(contexts), self.max_length)
        return fitting

    def _bar(self, total: int, what: str, disable: bool) -> tqdm:
        return tqdm(total=total, desc=f"Running {what} requests", disable=disable or self.rank != 0)


# ---- the bound ------------------------------------------------------------------------------------------------------


def content_seed(seed: int, *content: Any) -> int:
    """A seed below 2^62 that depends on nothing but ``seed`` and the content (JSON values)."""
    digest = hashlib.sha256(json.dumps([seed, *content], sort_keys=True, default=str).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def mask_sets(length: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sets of positions to mask, (R, L) bool, and the weights (R,) float64 with which their log-probabilities sum to the bound.

    Where all 2^L - 1 sets are no more than ``samples``, these are all of them and the bound is exact. Else l runs over an even
    grid that one draw shifts, so that every l is met equally often, and the positions are drawn without replacement.
    """
    if 2**length - 1 <= samples:
        masks = (torch.arange(1, 2**length)[:, None] >> torch.arange(length)) % 2 == 1
        counts = masks.sum(1)
        alike = torch.tensor([math.comb(length, n) for n in counts.tolist()])
        return masks, 1 / (counts * alike).double()
    generator = torch.Generator().manual_seed(seed)
    grid = (torch.arange(samples) + torch.rand((), generator=generator, dtype=torch.float64)) / samples
    counts = (grid * length).long().clamp(max=length - 1) + 1
    rank = torch.rand(samples, length, generator=generator).argsort(1).argsort(1)
    return rank < counts[:, None], length / (counts * samples).double()


def block_mask_sets(block: int | None, start: int, length: int, samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """``mask_sets`` of a block-causal model, whose bound is a sum over blocks: sets are drawn for each block by itself.

    start: the place in its row where the text begins. Both (R, L): a position's weight is that of its block's set.
    """
    if block is None:
        masks, weights = mask_sets(length, samples, seed)
        return masks, weights[:, None].expand(masks.shape)
    edges = [0, *range(block - start % block, length, block), length]
    parts = [mask_sets(b - a, samples, seed + a) for a, b in pairwise(edges)]
    rows = max(len(masks) for masks, _ in parts)  # a short block's sets are all there are, and fewer
    masks = torch.cat([F.pad(sets, (0, 0, 0, rows - len(sets))) for sets, _ in parts], 1)
    weights = torch.cat([F.pad(w, (0, rows - len(w)))[:, None].expand(rows, sets.shape[1]) for sets, w in parts], 1)
    return masks, weights


@torch.no_grad()
def bounds(
    lm: MaskedLM, pairs: Sequence[Pair], samples: int, seed: int, batch_size: int, cfg_scale: float = 0.0
) -> list[float]:
    """Lower bounds on log p(continuation | context) in nats, of pairs with continuations of one length.

    Args:
        samples: mask sets a pair. seed: with the pair's content it decides which, whatever else is in the batch.
        batch_size: rows of one forward pass; rows that masking makes equal are computed once.
    """
    length = len(pairs[0][1])
    if not length:
        return [0.0] * len(pairs)
    ids, visible = (t.cpu() for t in lm.encode([context + continuation for context, continuation in pairs]))
    found = [
        block_mask_sets(lm.block_length, len(pair[0]), length, samples, content_seed(seed, *pair)) for pair in pairs
    ]
    masks, weights = (torch.cat(parts) for parts in zip(*found, strict=True))
    owner = torch.arange(len(pairs)).repeat_interleave(torch.tensor([len(sets) for sets, _ in found]))
    width, total = ids.shape[1], torch.zeros(len(pairs), dtype=torch.float64)
    for part in torch.arange(len(masks)).split(batch_size):
        rows, seen = ids[owner[part]], visible[owner[part]]
        clean = [] if lm.block_length is None else [rows.clone()]  # each block's masks stand behind the text as it is
        row, column = masks[part].nonzero(as_tuple=True)
        column = column + width - length
        targets = rows[row, column].to(lm.device)
        rows[row, column] = lm.mask_id
        distinct, home = torch.cat([rows, seen.long(), *clean], 1).unique(dim=0, return_inverse=True)
        distinct, scored = distinct.to(lm.device), (home[row].to(lm.device), column.to(lm.device))
        rows, seen, *clean = distinct.split(width, 1)
        mask = None if seen.all() else seen.bool()
        how: dict[str, Any] = {"prompt": width - length, "w": cfg_scale, "clean": clean[0] if clean else None}
        logprob, _ = score_states(lm, rows, mask, scored, targets, **how)
        total.index_add_(0, owner[part][row], weights[part][masks[part]] * logprob.cpu().double())
    if not total.isfinite().all():
        raise UserError("the model's log-probabilities are not finite: try dtype=float32, or check its weights")
    return total.tolist()


def is_greedy(lm: MaskedLM, pairs: Sequence[Pair], cfg_scale: float = 0.0) -> list[bool]:
    """Whether greedy decoding of as many tokens, one a pass and the surest first, writes the continuation.

    The pairs' continuations are of one length; equal contexts are decoded once.
    """
    length = len(pairs[0][1])
    if not length:
        return [True] * len(pairs)
    contexts = list(dict.fromkeys(tuple(context) for context, _ in pairs))
    prompt, visible = lm.encode(contexts, length, empty=True)
    decoder = Decoder(max_new_tokens=length, steps=length, cfg_scale=cfg_scale)
    canvas = torch.full((len(contexts), length), lm.mask_id, device=prompt.device)  # not rounded up to whole blocks
    written = dict(zip(contexts, decode(lm, prompt, visible, decoder, canvas=canvas).tokens.tolist(), strict=True))
    return [written[tuple(context)] == continuation for context, continuation in pairs]


def command(arguments: list[str]) -> None:
    """lm-eval's own command line, in which ``--model unmask`` is known."""
    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()
