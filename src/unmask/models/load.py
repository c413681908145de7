"""From a name or a path to a MaskedLM."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity, set_verbosity_error

from unmask.models import bidirectional, remote
from unmask.models.llada import LLaDAModelLM
from unmask.models.masked_lm import MaskedLM
from unmask.spec import UserError, unknown

SHIPPED = {"tiny": Path(__file__).parent / "tiny"}
FAMILIES: dict[str, type[PreTrainedModel]] = {
    "llada": LLaDAModelLM,
    **{model.config_class.model_type: model for model in bidirectional.MODELS},
    # Converted checkpoints that kept their parent's name; one without a mask token is refused.
    "qwen2": bidirectional.A2DQwen2LMHeadModel,
    "qwen3": bidirectional.A2DQwen3LMHeadModel,
    "llama": bidirectional.A2DLlamaLMHeadModel,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "*.model"]
_LOADING = (OSError, RuntimeError, ValueError, TypeError, KeyError, ArithmeticError, AttributeError, SafetensorError)


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
        dtype, device, adapter, revision, device_map, load_in_4bit, trust_remote_code: see ``source.ModelSource``;
            ``device_map`` may also be a dict of module names to devices, as in transformers.

    Raises:
        UserError: one sentence, for an unknown name, a hub that cannot be reached, an unsupported family, missing files, wrong
            keys or shapes, or a failed self-test.
    """
    if dtype not in (*DTYPES, "auto"):
        raise unknown("dtype", dtype, [*DTYPES, "auto"])
    folder = find_folder(name, revision, trust_remote_code)
    own: dict[str, Any] = {
        "device_map": device_map,
        "load_in_4bit": load_in_4bit,
        "trust_remote_code": trust_remote_code,
    }
    if (folder / "adapter_config.json").is_file():
        if adapter is not None:
            raise UserError(f"{name} is an adapter itself: name its base model in --model, or leave --adapter out")
        return _merged(load(_base_of(folder), dtype, device, **own), folder)
    config = read_json(folder / "config.json", name)
    kind = _family(config, trust_remote_code)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{name} holds no .safetensors weights: convert the checkpoint to safetensors first")
    settings = _placement(name, device, device_map, load_in_4bit)
    settings["dtype"] = DTYPES.get(dtype, "auto")
    disable_progress_bar()
    verbosity = get_verbosity()
    set_verbosity_error()  # what its report warns of is refused below, in one sentence
    try:
        if kind is None:
            model: Any = remote.load(folder, config, settings)
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        else:
            model = _in_tree(kind, folder, name, config, settings)
            tokenizer = _tokenizer(folder, kind, name)
        if not load_in_4bit and device_map is None:
            model = model.to(settings["device_map"][""])
    except (*_LOADING, AssertionError) as error:
        raise UserError(f"cannot load {name}: {_first_line(error)}") from None
    finally:
        set_verbosity(verbosity)
    lm = MaskedLM.wrap(model.eval(), tokenizer, name, fingerprint(weights))
    lm.self_test()
    return lm if adapter is None else _merged(lm, find_folder(adapter, None, False))


def outline(name: str, dtype: str = "auto", revision: str | None = None) -> MaskedLM:
    """A checkpoint's shape, ids and tokenizer without its weights: a model on the meta device. Adapters count as their base.

    Raises:
        UserError: as ``load``, for what can be seen without weights.
    """
    folder = find_folder(name, revision, weights=False)
    if (folder / "adapter_config.json").is_file():
        return outline(_base_of(folder), dtype)
    config = read_json(folder / "config.json", name)
    kind = _family(config, False)
    assert kind is not None and kind.config_class is not None
    stated = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    try:
        settings = kind.config_class.from_pretrained(folder)
        tokenizer = _tokenizer(folder, kind, name)
        model = skeleton(kind, settings, DTYPES.get(stated if dtype == "auto" else dtype, torch.float32))
    except _LOADING as error:
        raise UserError(f"cannot read {name}: {_first_line(error)}") from None
    return MaskedLM.wrap(model.eval(), tokenizer, name)


def _family(config: dict[str, Any], trust_remote_code: bool) -> type[PreTrainedModel] | None:
    """The class of a config.json; None for one of an unknown family whose own code is trusted. Raises UserError."""
    family = str(config.get("model_type"))
    if family in FAMILIES:
        return FAMILIES[family]
    if "auto_map" not in config:
        raise unknown("model family", family, FAMILIES)
    if not trust_remote_code:
        hint = "or run the checkpoint's own code with --trust-remote-code"
        raise UserError(f"{unknown('model family', family, FAMILIES)}; {hint}")
    return None


def find_folder(name: str, revision: str | None = None, remote_code: bool = False, weights: bool = True) -> Path:
    """The folder of a shipped model, of a path, or of a hub name, which is downloaded to the hub's cache if it is not there.

    Args:
        remote_code: fetch Python files too. weights: without them, only what describes the model.

    Raises:
        UserError: for a name that is none of these, or a hub that does not give it.
    """
    folder = SHIPPED.get(name, Path(name))
    if folder.is_dir():
        if not any((folder / f"{kind}config.json").is_file() for kind in ("", "adapter_")):
            raise UserError(f"{name} holds no config.json: give the folder of a saved checkpoint")
        return folder
    if not _HUB_NAME.fullmatch(name) or folder.exists() or name.startswith("."):
        raise UserError(
            f"unknown model {name!r}: give {', '.join(SHIPPED)}, the path of a checkpoint folder, or a hub name like "
            "GSAI-ML/LLaDA-8B-Instruct"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    files = _HUB_FILES + ["*.py"] * remote_code
    instead = "give the path of a folder that holds the checkpoint"
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=files if weights else ["*.json", "*.jinja"])
        )
    except GatedRepoError:
        raise UserError(f"the hub wants a log-in for {name}: run hf auth login, or {instead}") from None
    except RepositoryNotFoundError:
        raise UserError(f"the hub has no {name} for you: check the name, or {instead}") from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise UserError(f"cannot fetch {name} from the hub ({_first_line(error)}): {instead}") from None


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A checkpoint's JSON file. Raises UserError where it is no JSON object."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON ({error}): repair or fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} of {name} is not a JSON object: repair or fetch it again")
    return found


def _placement(name: str, device: str, device_map: Any, load_in_4bit: bool) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` that say where the weights go and how."""
    if device_map is not None and device != "auto":
        raise UserError(f"device={device} and device_map={device_map} contradict each other: give one of them")
    if device == "auto":
        count = torch.cuda.device_count()
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % count}" if count else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {device!r} cannot be used: {_first_line(error)}") from None
    settings: dict[str, Any] = {"device_map": {"": device} if device_map is None else device_map}
    if load_in_4bit:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(f"loading {name} in 4 bits needs bitsandbytes: pip install bitsandbytes")
        from transformers import BitsAndBytesConfig

        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["model.transformer.ff_out", "lm_head"],  # the heads; a block's ff_out is quantised
        )
    return settings


def _in_tree(
    kind: type[PreTrainedModel], folder: Path, name: str, config: dict[str, Any], settings: dict[str, Any]
) -> PreTrainedModel:
    """A model of a known family; refused by name where its files hold other keys or shapes."""
    architecture = next(iter(config.get("architectures") or [kind.__name__]))
    own = kind.config_class.model_type if kind.config_class else None
    if config["model_type"] == own and architecture != kind.__name__:
        raise UserError(
            f"{name} is refused: its architecture {architecture} is not {kind.__name__}, the one implemented for "
            f"{config['model_type']}"
        )
    loaded: Any = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, **settings)
    model, report = loaded
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            keys = sorted(str(k) for k in report[problem])
            raise UserError(
                f"{name} is refused: {problem.replace('_', ' ')} {', '.join(keys[:4])} ({len(keys)} in all)"
            )
    return model


def _tokenizer(folder: Path, kind: type[PreTrainedModel], name: str) -> PreTrainedTokenizerBase:
    if (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if kind is bidirectional.DreamModel and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return Qwen2Tokenizer.from_pretrained(
            folder, local_files_only=True
        )  # its own class is Qwen2's under another name
    raise UserError(f"{name} holds no tokenizer.json: save the tokenizer beside the weights")


def as_masked_lm(model: MaskedLM | PreTrainedModel | str, tokenizer: PreTrainedTokenizerBase | None = None) -> MaskedLM:
    """What trainers accept: a MaskedLM, a name or path, or a backbone with its tokenizer. Raises UserError."""
    if isinstance(model, MaskedLM):
        return model
    if isinstance(model, str):
        return load(model)
    if tokenizer is None:
        raise UserError("a PreTrainedModel needs its tokenizer: pass processing_class")
    return MaskedLM.wrap(model, tokenizer, model.config.name_or_path or "model")


def _base_of(adapter: Path) -> str:
    """The base model that an adapter names."""
    base = read_json(adapter / "adapter_config.json", str(adapter)).get("base_model_name_or_path")
    if not base:
        raise UserError(
            f"the adapter {adapter} names no base model: set base_model_name_or_path in its adapter_config.json"
        )
    return str(base)


def _merged(lm: MaskedLM, adapter: Path) -> MaskedLM:
    """The model with an adapter merged into its weights (kept beside them where those are quantised)."""
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(lm.model, adapter, local_files_only=True)  # type: ignore[arg-type]
        quantised = getattr(lm.model, "is_loaded_in_4bit", False)
        model: Any = adapted if quantised else adapted.merge_and_unload()
    except _LOADING as error:
        raise UserError(f"cannot load the adapter {adapter}: {_first_line(error)}") from None
    lm = replace(lm, model=model.eval(), name=str(adapter), weights=fingerprint(sorted(adapter.glob("*.safetensors"))))
    lm.self_test()
    return lm


def skeleton(kind: type[PreTrainedModel], config: Any, dtype: torch.dtype) -> Any:
    """A model without data, on the meta device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return kind(config)
    finally:
        torch.set_default_dtype(before)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


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
