"""``unmask`` as a model of EleutherAI's lm-evaluation-harness: its tasks, prompts and metrics, our decoders and bounds.

lm-eval finds models in a registry that it fills itself, without entry points; importing this module adds ``unmask`` to it.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from unmask import __version__
from unmask.config import build
from unmask.decoding import Decoder, decode_each, make_decoder
from unmask.decoding.generate import until
from unmask.errors import UserError, check_at_least
from unmask.evaluation.distributed import init_distributed
from unmask.evaluation.likelihood import Pair, batches, bounds, content_seed, is_greedy, truncate_context
from unmask.models.masked_lm import MaskedLM
from unmask.models.source import ModelSource

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string, warning_once
except ImportError:
    raise UserError("lm-evaluation-harness 0.4.13 or later is not installed: pip install unmask[lm-eval]") from None

log = logging.getLogger(__name__)
DEFAULT_DEVICE = "cuda:0"  # what lm-eval's command line passes where nobody named a device


@dataclass(kw_only=True)
class HarnessSettings(ModelSource):
    """The model arguments of ``--model unmask``; ``pretrained`` stands for ``model``."""

    decoder: str = "semi-ar"
    """Decoder spec with semicolons between its parameters, ``eoser-ass:blocks=4;temperature=0.7``, or a YAML file."""
    max_new_tokens: int = 256
    """Canvas length in tokens, unless the task (``max_gen_toks``) or the decoder sets it."""
    batch_size: int = 8
    """Rows of one forward pass. lm-eval's ``--batch_size`` (1 by default) stands unless this is given."""
    mc_samples: int = 128
    """Masked copies of a text from which its log-likelihood is estimated; exact where they are enough for all masks."""
    seed: int = 0
    """Seed of sampling and of masks; lm-eval's own ``--seed`` does not reach a model."""

    def __post_init__(self) -> None:
        check_at_least(self, 1, "batch_size", "mc_samples")

    @classmethod
    def read(cls, arguments: dict[str, Any]) -> HarnessSettings:
        """From lm-eval's model arguments, which it has guessed types for. Raises UserError."""
        if "pretrained" in arguments and "model" in arguments:
            raise UserError("pretrained and model are one thing: use one of them")
        values = {"model" if k == "pretrained" else k: v if v is None else str(v) for k, v in arguments.items()}
        hint = "a decoder's own go into it with semicolons, decoder=eoser-ass:blocks=4;temperature=0.7"
        return build(cls, values, f"--model unmask ({hint})")


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
            arguments["pretrained"] = pretrained.name if isinstance(pretrained, MaskedLM) else pretrained
        self.settings = HarnessSettings.read(arguments)
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
        """From model arguments, and lm-eval's own flags for what these leave open."""
        flags = {k: v for k, v in (additional_config or {}).items() if v not in (None, DEFAULT_DEVICE)}
        return cls(**{**flags, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> UnmaskLM:
        """As ``create_from_arg_obj``, from ``key=value,key=value``."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # ---- what lm-eval asks about a model ---------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.lm.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: the tokenizer's BOS, else EOS."""
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
        info = self.lm.info()
        ours = {"version": __version__, "model": info, "decoder": self.decoder.config()}
        ours |= {k: getattr(self.settings, k) for k in ("batch_size", "mc_samples", "seed")}
        return {"model_num_parameters": info["parameters"], "model_dtype": info["dtype"], "unmask": ours}

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.tensor(self.processes.gather(tensor.tolist()))

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        found = self.processes.gather(obj)
        return found if self.rank == dst else None

    def barrier(self) -> None:
        self.processes.gather(None)

    # ---- generation ------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The texts, in the order of the requests: up to the first end token, then up to the first stop string."""
        prompts: list[list[int]] = []
        groups: dict[Decoder, list[int]] = {}
        cut = 0
        for i, request in enumerate(requests):
            context, kwargs = request.args
            decoder = self._decoder_for(kwargs)
            tokens, room = self.tok_encode(context), max(1, self.max_length - decoder.max_new_tokens)
            prompts.append(tokens[-room:])
            cut += len(tokens) > room
            groups.setdefault(decoder, []).append(i)
        self._tell_cut(cut, len(requests))
        seeds = self._seeds(requests)
        texts = [""] * len(requests)
        with self._bar(len(requests), "generate_until", disable_tqdm) as bar:
            for decoder, members in groups.items():
                members.sort(key=lambda i: -len(prompts[i]))
                chosen = [prompts[i] for i in members]
                for numbers, trajectory in decode_each(self.lm, chosen, decoder, seeds[members], self.batch_size):
                    for number, text in zip(numbers, self.lm.text(trajectory.tokens), strict=True):
                        i = members[number]
                        context, kwargs = requests[i].args
                        texts[i] = until(text, normalize_gen_kwargs(kwargs)["until"])
                        self.cache_hook.add_partial("generate_until", (context, kwargs), texts[i])
                    bar.update(len(numbers))
        return texts

    def _decoder_for(self, kwargs: dict[str, Any]) -> Decoder:
        """The decoder with a request's canvas, and its temperature where it asks for sampling."""
        asked = normalize_gen_kwargs(kwargs, self.decoder.max_new_tokens)
        for name in asked.keys() - {"until", "max_gen_toks", "temperature", "do_sample"}:
            warning_once(log, "unmask does not read %s in generation_kwargs: set the decoder instead", name)
        try:
            decoder = make_decoder(self.spec, max_new_tokens=asked["max_gen_toks"])
            decoder = decoder.replace(max_new_tokens=asked["max_gen_toks"])  # also where a file names another
            if asked["do_sample"] and "temperature" in kwargs:
                decoder = decoder.replace(temperature=float(kwargs["temperature"]))
        except UserError as error:
            hint = "the canvas is the task's max_gen_toks, which --gen_kwargs max_gen_toks=N sets"
            raise UserError(f"{error}; {hint}") from None
        return decoder

    def _seeds(self, requests: Sequence[Instance]) -> Tensor:
        """One seed a request, of its content; equal requests (repeats) get different ones."""
        met: Counter[int] = Counter()
        seeds = []
        for request in requests:
            own = content_seed(self.settings.seed, request.task_name, request.doc_id, *request.args)
            seeds.append(content_seed(own, met[own]))
            met[own] += 1
        return torch.tensor(seeds, dtype=torch.int64)

    # ---- likelihood ------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(lower bound on the log-likelihood, whether greedy decoding writes the continuation) for each request."""
        found = [(0.0, True)] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        for members, chosen, bound in self._bounds(pairs, "loglikelihood", disable_tqdm):
            greedy = is_greedy(self.lm, chosen, self.decoder.cfg_scale)
            for i, result in zip(members, zip(bound, greedy, strict=True), strict=True):
                found[i] = result
                self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Lower bounds on the log-likelihood of whole texts: the sum over windows, each behind what comes before it."""
        windows: list[tuple[int, Pair]] = []  # with the request that each belongs to
        for i, request in enumerate(requests):
            text, most = self.tok_encode(request.args[0]), self.max_length - 1
            found = get_rolling_token_windows(text, self.prefix_token_id, most, context_len=1)
            windows += [(i, make_disjoint_window(window)) for window in found]
        totals = [0.0] * len(requests)
        for members, _, bound in self._bounds([w for _, w in windows], "loglikelihood_rolling", disable_tqdm):
            for i, value in zip(members, bound, strict=True):
                totals[windows[i][0]] += value
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _bounds(
        self, pairs: list[Pair], what: str, disable_tqdm: bool
    ) -> Iterator[tuple[list[int], list[Pair], list[float]]]:
        """Batches of pairs that fit: their indexes, the pairs, their bounds."""
        fitting = [truncate_context(self.lm, pair) for pair in pairs]
        self._tell_cut(sum(a != b for a, b in zip(fitting, pairs, strict=True)), len(pairs))
        s, scale = self.settings, self.decoder.cfg_scale
        with self._bar(len(pairs), what, disable_tqdm) as bar:
            for members in batches(fitting, self.batch_size):
                chosen = [fitting[i] for i in members]
                yield members, chosen, bounds(self.lm, chosen, s.mc_samples, s.seed, s.batch_size, scale)
                bar.update(len(members))

    def _tell_cut(self, cut: int, of: int) -> None:
        if cut:
            log.warning("%d of %d contexts lost their beginning, to fit into %d tokens", cut, of, self.max_length)

    def _bar(self, total: int, what: str, disable: bool) -> tqdm:
        return tqdm(total=total, desc=f"Running {what} requests", disable=disable or self.rank != 0)


def command(arguments: list[str]) -> None:
    """lm-eval's own command line, in which ``--model unmask`` is known."""
    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()
