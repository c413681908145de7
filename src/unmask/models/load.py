"""From a name or a path to a MaskedLM."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils import logging

from unmask.errors import UserError, unknown
from unmask.io.files import expand_home, read_json
from unmask.io.launcher import local_rank, world_size
from unmask.models import bidirectional, remote
from unmask.models.llada import LLaDAModelLM
from unmask.models.masked_lm import MaskedLM

SHIPPED = {file.parent.name: file.parent for file in sorted(Path(__file__).parent.glob("*/config.json"))}
"""The checkpoints in the package by name."""
_CLASSES = (*bidirectional.MODELS, *bidirectional.UNDER_PARENTS_NAME, LLaDAModelLM)
FAMILIES: dict[str, type[PreTrainedModel]] = {model.config_class.model_type: model for model in _CLASSES}
"""Backbones by model type; where two have the same, the architecture decides."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of these nothing is known here but the name.
_NOT_YET = re.compile(r"nemotron|efficient_?dlm|diffusion_?gemma|re_?fusion", re.IGNORECASE)
HUB_FILES = ("*.json", "*.jinja", "merges.txt", "*.model")  # what describes a model, without its weights
_LOADING: tuple[type[Exception], ...] = (SafetensorError, StrictDataclassError)  # the last: of configurations
_LOADING += (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError)


def load(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    *,
    adapter: str | None = None,
    revision: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
) -> MaskedLM:
    """Load a checkpoint in eval mode, self-tested.

    Args:
        name: ``"tiny"``, a hub name, or the path of a folder with config.json, safetensors and a tokenizer, or of a peft
            adapter, which is merged into the base model that it names.
        device_map: also a dict of module names to devices, as in transformers; this and the rest: see ``source.ModelSource``.

    Raises UserError for an unknown name, an unsupported family, missing files, wrong keys or shapes, or a failed self-test.
    """
    name, adapter = expand_home(name), expand_home(adapter)
    settings = {"dtype": _dtype(dtype), **_placement(name, device, device_map, load_in_4bit)}
    extra = [] if adapter is None else [find_folder(adapter, adapter=True)]
    folder, own = _resolve_adapters(find_folder(name, revision, trust_remote_code))
    if own and adapter is not None:
        raise UserError(f"{name} is an adapter itself: name its base model in --model, or leave --adapter out")
    lm = _load_checkpoint(str(folder) if own else name, folder, settings, trust_remote_code)
    for part in [*own, *extra]:
        lm = _merge(lm, part, name if own else f"{name} + {adapter}")
    return lm


def _resolve_adapters(folder: Path) -> tuple[Path, list[Path]]:
    """The plain checkpoint under a folder, and the adapters on the way to it, the lowest first."""
    adapters: list[Path] = []
    while (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json", dict, "fetch it again").get("base_model_name_or_path")
        named = bool(base) and isinstance(base, str)
        if not named or folder.resolve() in adapters:
            fault = f"the adapter {folder} {'is its own' if named else 'names no'} base model"
            raise UserError(f"{fault}: set base_model_name_or_path in adapter_config.json")
        adapters.insert(0, folder.resolve())
        folder = find_folder(base)
    return folder, adapters


def _load_checkpoint(name: str, folder: Path, settings: dict[str, Any], trust_remote_code: bool) -> MaskedLM:
    """A checkpoint that is no adapter. ``settings``: keyword arguments of ``from_pretrained``."""
    config, kind = family(folder, trust_remote_code)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{name} holds no .safetensors weights: fetch them, or convert the checkpoint to safetensors")
    try:
        with _quiet():  # what it would warn of is refused below, in one sentence
            if kind is None:
                model: Any = remote.load(folder, config, settings)
                tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
            else:
                model = _load_family(kind, folder, name, config, settings)
                tokenizer = _tokenizer(folder, kind, name)
            if [*settings["device_map"]] == [""] and "quantization_config" not in settings:
                model = model.to(settings["device_map"][""])
    except _LOADING as error:
        raise UserError(f"cannot load {name}: {_first_line(error)}") from None
    lm = MaskedLM.wrap(model.eval(), tokenizer, name, fingerprint(weights))
    lm.self_test()
    return lm


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Without those of transformers and, which it switches along, huggingface_hub; what the caller had set is restored."""
    bars, hub_bars = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
        (enable_progress_bars if hub_bars else disable_progress_bars)()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings and progress bars."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with without_progress_bars():
            yield
    finally:
        logging.set_verbosity(verbosity)


def _dtype(name: str) -> Any:
    """A dtype that weights can be loaded in, or ``auto``. Raises UserError."""
    if name not in (*DTYPES, "auto"):
        raise unknown("dtype", name, [*DTYPES, "auto"])
    return DTYPES.get(name, "auto")


def warn_of_slow_bf16(device: torch.device) -> None:
    """Say so where bfloat16 products run on a processor without instructions for them (measured: 29 times slower)."""
    on_mkldnn = device.type == "cpu" and torch.backends.mkldnn.is_available()
    if on_mkldnn and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        slow = "this processor has no bfloat16 instructions, so bfloat16 takes many times as long as float32"
        print(f"unmask: warning: {slow}: set bf16 to false and dtype to float32", file=sys.stderr)


def load_meta(name: str, dtype: str = "auto", revision: str | None = None) -> MaskedLM:
    """A checkpoint's shape, ids and tokenizer without its weights: a model on the meta device. Adapters count as their base.

    Raises UserError as ``load``, for what can be seen without weights.
    """
    chosen = _dtype(dtype)
    folder, _ = _resolve_adapters(find_folder(name, revision, weights=False))
    config, kind = family(folder)
    stated = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    try:
        settings = kind.config_class.from_pretrained(folder, **_block_in_name(kind, config, name))
        tokenizer = _tokenizer(folder, kind, name)
        with torch.device("meta"):
            model = kind._from_config(settings, dtype=DTYPES.get(stated, torch.float32) if chosen == "auto" else chosen)
    except _LOADING as error:
        raise UserError(f"cannot read {name}: {_first_line(error)}") from None
    return MaskedLM.wrap(model.eval(), tokenizer, name)


def family(folder: Path, trust_remote_code: bool = False) -> tuple[dict[str, Any], Any]:
    """A folder's config.json and its class; None for one of an unknown family whose own code is trusted. Raises UserError."""
    config = read_json(folder / "config.json", dict, "fetch it again")
    model_type = str(config.get("model_type"))
    names = [model_type, *map(str, config.get("architectures") or ())]
    if not trust_remote_code and any(_NOT_YET.search(name) for name in names):
        choose = f"choose a checkpoint of {', '.join(FAMILIES)}"
        raise UserError(f"model family {' / '.join(names)} is not supported: {choose}")
    if model_type not in FAMILIES:
        if "auto_map" in config and trust_remote_code:
            return config, None
        hint = "; or run the checkpoint's own code with --trust-remote-code" if "auto_map" in config else ""
        raise UserError(f"{unknown('model family', model_type, FAMILIES)}{hint}")
    alike = [kind for kind in _CLASSES if kind.config_class.model_type == model_type]
    kind = next((kind for kind in alike if _is_named(kind, config)), FAMILIES[model_type])
    field = getattr(kind, "block", None)
    named = field or "block_length"
    block = {**getattr(kind.config_class, "unsaid", {}), **config}.get(named)
    if (field or block is not None) and (not isinstance(block, int) or isinstance(block, bool) or block < 1):
        says = f"{folder / 'config.json'} has {named}={block!r}, and {kind.__name__} attends in blocks"
        raise UserError(f"{says}: set {named} to the block length that it was trained with")
    return config, kind


def _is_named(kind: Any, config: dict[str, Any]) -> bool:
    """Whether a config.json names this class as its architecture, or in its own code; also where it names none."""
    names, aliases = {*map(str, config.get("architectures") or [kind.__name__])}, {*getattr(kind, "aliases", ())}
    code = {str(value).split(".")[-1] for value in (config.get("auto_map") or {}).values()}
    return bool(names & {kind.__name__, *aliases} or code & aliases)


def _block_in_name(kind: Any, config: dict[str, Any], name: str) -> dict[str, int]:
    """SDAR's block length where its config.json has none: the published ones are named ``…-b16``, or have 4.

    Raises UserError for a BD3LM conversion, whose files do not say that it attends in blocks.
    """
    field = getattr(kind, "block", None)
    a2d = kind.config_class.model_type.startswith("a2d-")
    if a2d and "bd3lm" in name.lower() and config.get("block_length") is None:
        raise UserError(
            f"{name} attends in blocks by its name, and its config.json has no block_length: add the one that it was trained "
            'with, "block_length": 32 for those published'
        )
    if field != "block_size" or config.get(field) is not None:
        return {}
    found = re.search(r"-b(\d+)(?=[-/]|$)", name)
    length = int(found[1]) if found else kind.config_class.unsaid[field]
    print(f"unmask: {name} names no block length in its config.json: {length} is taken", file=sys.stderr)
    return {field: length}


def find_folder(
    name: str, revision: str | None = None, remote_code: bool = False, weights: bool = True, adapter: bool = False
) -> Path:
    """The folder of a shipped model, of a path, or of a hub name, which is downloaded to the hub's cache if it is not there.

    remote_code: fetch Python files too. weights: without them, only what describes the model. adapter: whether an adapter is
    looked for, not a model. Raises UserError for a name that is none of these, or a hub that does not have it.
    """
    name = expand_home(name)
    folder = SHIPPED.get(name, Path(name))
    instead = f"the folder of {'an adapter saved by peft' if adapter else 'a saved checkpoint'}"
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"revision={revision} belongs to a hub name, and {name} is a folder here: leave it out")
        found = [kind for kind in ("config.json", "adapter_config.json") if (folder / kind).is_file()]
        if not found or (adapter and "adapter_config.json" not in found):
            raise UserError(f"{name} holds no {'adapter_' * adapter}config.json: choose {instead}")
        return folder
    if folder.exists():
        raise UserError(f"{name} is a file: choose {instead}")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        kind, shipped = ("adapter", "") if adapter else ("model", f"{', '.join(SHIPPED)}, ")
        hub = "a hub name like GSAI-ML/LLaDA-8B-Instruct"
        raise UserError(f"unknown {kind} {name!r}: choose {shipped}{instead}, or {hub}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    files = [*HUB_FILES, *["*.safetensors"] * weights, *["*.py"] * remote_code]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        says = f"could not download {name} from the hub ({_first_line(error)})"
        raise UserError(f"{says}: check the name, run hf auth login for a gated one, or choose {instead}") from None


def _placement(name: str, device: str, device_map: Any, load_in_4bit: bool) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` that say where the weights go and how."""
    if device_map is not None and (world := world_size()) > 1:
        spreads = f"device_map={device_map} spreads one model over the devices of {world} processes"
        raise UserError(f"{spreads}: start a single process, or leave it out")
    if device_map is not None and device != "auto":
        raise UserError(f"device={device} and device_map={device_map} contradict each other: set one of them")
    if device == "auto":
        count = torch.cuda.device_count()
        device = f"cuda:{local_rank() % count}" if count else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = _first_line(error).split(" device type at start")[0]  # (what follows lists twenty kinds)
        raise UserError(f"device {device!r} cannot be used ({reason}): choose cpu, cuda or cuda:N") from None
    settings: dict[str, Any] = {"device_map": {"": device} if device_map is None else device_map}
    if load_in_4bit:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(f"loading {name} in 4 bits needs bitsandbytes: pip install bitsandbytes")
        from transformers import BitsAndBytesConfig

        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["model.transformer.ff_out", "lm_head"],  # the heads; a block's ff_out is quantized
        )
    return settings


def _load_family(kind: Any, folder: Path, name: str, config: dict[str, Any], settings: dict[str, Any]) -> Any:
    """A model of a known family; refused by name where its files hold other keys or shapes."""
    architecture = next(iter(config.get("architectures") or [kind.__name__]))
    if not _is_named(kind, config) and kind not in bidirectional.UNDER_PARENTS_NAME:
        known = f"{kind.__name__}, the one implemented for {config['model_type']}"
        raise UserError(f"{name} is refused: its architecture {architecture} is not {known}")
    settings = {**settings, **_block_in_name(kind, config, name)}
    _check_experts(folder, config, name)
    model, report = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, **settings)
    vars(model.config).pop("auto_map", None)  # names Python files that are neither needed nor saved with the model
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, report[problem])):
            some = f"{', '.join(keys[:4])} ({len(keys)} in all)"
            raise UserError(f"{name} is refused: {problem.replace('_', ' ')} {some}")
    return model


def _check_experts(folder: Path, config: dict[str, Any], name: str) -> None:
    """Raises UserError for experts that are not in the files: transformers, which stacks them, would not name them."""
    count = int(config.get("num_experts") or 0)
    keys: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")) if count else []:
        with safe_open(file, "pt") as tensors:
            keys.update(tensors.keys())
    found = [m for key in keys if (m := re.fullmatch(r"(.*\.experts)\.\d+\.(\w+\.weight)", key))]
    expected = {f"{m[1]}.{n}.{m[2]}" for m in found for n in range(count)}
    if missing := sorted(expected - keys):
        raise UserError(
            f"{name} is refused: missing keys {', '.join(missing[:4])} ({len(missing)} in all): fetch it again"
        )


def _tokenizer(folder: Path, kind: Any, name: str) -> PreTrainedTokenizerBase:
    """Dream's class of tokenizers is Qwen2's under another name; it and Qwen2's own come without a tokenizer.json at times."""
    qwen = issubclass(kind.config_class, (Qwen2Config, Qwen3Config, Qwen3MoeConfig))
    files = ("tokenizer.json", "vocab.json") if qwen else ("tokenizer.json",)
    if not any((folder / file).is_file() for file in files):
        raise UserError(f"{name} holds no tokenizer.json: save the tokenizer beside the weights")
    dream = kind is bidirectional.DreamModel or not (folder / "tokenizer.json").is_file()
    reader: Any = Qwen2Tokenizer if dream else AutoTokenizer
    try:
        how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        if FAMILIES[kind.config_class.model_type] is not kind:  # AutoConfig would read another family's configuration
            how["config"] = kind.config_class.from_pretrained(folder)
        found = reader.from_pretrained(folder, **how)
    except Exception as error:  # noqa: BLE001  (the tokenizers library raises nothing narrower)
        raise UserError(f"the tokenizer of {name} cannot be read ({_first_line(error)}): fetch it again") from None
    found.init_kwargs.pop("auto_map", None)  # as with the model
    return found


def as_masked_lm(model: MaskedLM | PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None = None) -> MaskedLM:
    """What trainers accept: a MaskedLM, a name or path, or a backbone with its tokenizer. Raises UserError."""
    if isinstance(model, MaskedLM):
        return model
    if isinstance(model, str):
        return load(model)
    if tokenizer is None:
        raise UserError("a PreTrainedModel needs its tokenizer: pass processing_class")
    return MaskedLM.wrap(model, tokenizer, model.config.name_or_path or "model")


def _merge(lm: MaskedLM, adapter: Path, name: str) -> MaskedLM:
    """The model, now called ``name``, with an adapter merged into its weights (kept beside them where they are quantized)."""
    from peft import PeftModel, get_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import load_peft_weights
    from peft.utils.other import AuxiliaryTrainingWrapper

    files = sorted(adapter.glob("*.safetensors"))
    if not files:
        raise UserError(f"the adapter {adapter} holds no .safetensors weights: save it again as safetensors")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys, which are compared, and of tied weights, which are untied
            base: Any = lm.model
            model: Any = PeftModel.from_pretrained(base, adapter, local_files_only=True)
            wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
            there = set(load_peft_weights(str(adapter), device="cpu"))
            strange = sorted(wanted ^ (there - set(model.state_dict())))  # peft adds the model's embeddings at times
            if strange:
                raise ValueError(f"{len(strange)} keys differ, among them {', '.join(strange[:2])}")
            if not getattr(base, "is_loaded_in_4bit", False):
                ends = (base.get_input_embeddings(), base.get_output_embeddings())
                if any(isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends):
                    base.untie()  # merged into weights that both share, an adapter of one would change the other
                model = model.merge_and_unload()
    except _LOADING as error:
        raise UserError(f"cannot add the adapter {adapter} to {lm.name}: {_first_line(error)}") from None
    lm = replace(lm, model=model.eval(), name=name, weights=f"{lm.weights}+{fingerprint(files)}")
    lm.self_test()
    return lm


def _first_line(error: BaseException) -> str:
    text = (str(error).strip() or repr(error)).splitlines()[0]
    if "ignore_mismatched_sizes" in text:
        return "its weights have other shapes than its config.json says"
    plain = isinstance(error, (OSError, ValueError, RuntimeError)) or type(error) is Exception
    return text if plain else f"{type(error).__name__}: {text}"


def fingerprint(files: list[Path], samples: int = 64, size: int = 1 << 16) -> str:
    """A short hash that changes with the weights: names, sizes and evenly spaced samples of the files (all of small ones)."""
    digest = hashlib.sha256()
    for file in files:
        total = file.stat().st_size
        digest.update(f"{file.name} {total} ".encode())
        with file.open("rb") as stream:
            for offset in range(0, total, max(size, total // samples)):
                stream.seek(offset)
                digest.update(stream.read(size if total > samples * size else total))
    return digest.hexdigest()[:16]
