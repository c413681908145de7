"""From a name or a path to a MaskedLM."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Tokenizer
from transformers.utils.logging import (
    disable_progress_bar,
    enable_progress_bar,
    get_verbosity,
    is_progress_bar_enabled,
    set_verbosity,
    set_verbosity_error,
)

from unmask.errors import UserError, unknown
from unmask.io.files import expand_home, read_text
from unmask.io.launcher import local_rank, world_size
from unmask.models import bidirectional, remote
from unmask.models.llada import LLaDAModelLM
from unmask.models.masked_lm import MaskedLM

SHIPPED = {"tiny": Path(__file__).parent / "tiny"}
FAMILIES: dict[str, type[PreTrainedModel]] = {
    "llada": LLaDAModelLM,
    **{model.config_class.model_type: model for model in bidirectional.MODELS},
    # Converted checkpoints that kept their parent's name; one without a mask token is refused.
    **{model.config_class.model_type: model for model in bidirectional.UNDER_PARENTS_NAME},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Block diffusion and mixtures of experts (SDAR and TraDo, LLaDA2, LLaDA-MoE, Fast-dLLM v2, Stable-DiffCoder, BD3LM, Nemotron).
_NOT_YET = re.compile(r"sdar|trado|llada_?-?(?:2|moe)|fast_?-?dllm|stable_?-?diff_?coder|bd3lm|nemotron", re.IGNORECASE)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ["*.json", "*.jinja", "merges.txt", "*.model"]
_LOADING = (
    OSError,
    RuntimeError,
    ValueError,
    TypeError,
    KeyError,
    ArithmeticError,
    AttributeError,
    SafetensorError,
    StrictDataclassError,  # of configurations
)


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
    check_dtype(dtype)
    name, adapter = expand_home(name), expand_home(adapter)
    adapters = [] if adapter is None else [find_folder(adapter, adapter=True)]
    folder, own = _resolve_adapters(find_folder(name, revision, trust_remote_code))
    if own and adapter is not None:
        raise UserError(f"{name} is an adapter itself: name its base model in --model, or leave --adapter out")
    lm = _plain(name if not own else str(folder), folder, dtype, device, device_map, load_in_4bit, trust_remote_code)
    for part in own:
        lm = _merged(lm, part, name)
    for part in adapters:
        lm = _merged(lm, part, f"{name} + {adapter}")
    return lm


def _resolve_adapters(folder: Path) -> tuple[Path, list[Path]]:
    """The plain checkpoint under a folder, and the adapters on the way to it, the lowest first."""
    adapters: list[Path] = []
    while (folder / "adapter_config.json").is_file():
        if folder.resolve() in adapters:
            raise UserError(f"the adapter {folder} is its own base model: set base_model_name_or_path to another")
        adapters.insert(0, folder.resolve())
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if not base or not isinstance(base, str):
            raise UserError(
                f"the adapter {folder} names no base model: set base_model_name_or_path in its adapter_config.json"
            )
        folder = find_folder(base)
    return folder, adapters


def _plain(
    name: str,
    folder: Path,
    dtype: str,
    device: str,
    device_map: str | dict[str, Any] | None,
    load_in_4bit: bool,
    trust_remote_code: bool,
) -> MaskedLM:
    """A checkpoint that is no adapter."""
    config = read_json(folder / "config.json")
    kind = _family(config, trust_remote_code)
    weights = _weight_files(folder, name)
    settings = _placement(name, device, device_map, load_in_4bit)
    settings["dtype"] = DTYPES.get(dtype, "auto")
    bars, verbosity = is_progress_bar_enabled(), get_verbosity()
    disable_progress_bar()
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
        if bars:
            enable_progress_bar()
    lm = MaskedLM.wrap(model.eval(), tokenizer, name, fingerprint(weights))
    lm.self_test()
    return lm


def check_dtype(dtype: str) -> None:
    """Raises UserError for a dtype that weights cannot be loaded in."""
    if dtype not in (*DTYPES, "auto"):
        raise unknown("dtype", dtype, [*DTYPES, "auto"])


def warn_of_slow_bf16(device: torch.device) -> None:
    """Say so where bfloat16 products run on a processor without instructions for them (measured: 29 times slower)."""
    slow = device.type == "cpu" and torch.backends.mkldnn.is_available()
    if slow and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print(
            "unmask: warning: this processor has no bfloat16 instructions, so bfloat16 takes many times as long as float32: "
            "set bf16 to false and dtype to float32",
            file=sys.stderr,
        )


def load_meta(name: str, dtype: str = "auto", revision: str | None = None) -> MaskedLM:
    """A checkpoint's shape, ids and tokenizer without its weights: a model on the meta device. Adapters count as their base.

    Raises:
        UserError: as ``load``, for what can be seen without weights.
    """
    check_dtype(dtype)
    folder, _ = _resolve_adapters(find_folder(name, revision, weights=False))
    config = read_json(folder / "config.json")
    kind = _family(config, False)
    assert kind is not None and kind.config_class is not None
    stated = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    try:
        settings = kind.config_class.from_pretrained(folder)
        tokenizer = _tokenizer(folder, kind, name)
        model = meta_model(kind, settings, DTYPES.get(stated if dtype == "auto" else dtype, torch.float32))
    except _LOADING as error:
        raise UserError(f"cannot read {name}: {_first_line(error)}") from None
    return MaskedLM.wrap(model.eval(), tokenizer, name)


def _family(config: dict[str, Any], trust_remote_code: bool) -> type[PreTrainedModel] | None:
    """The class of a config.json; None for one of an unknown family whose own code is trusted. Raises UserError."""
    family = str(config.get("model_type"))
    names = [family, *map(str, config.get("architectures") or ())]
    if not trust_remote_code and any(_NOT_YET.search(name) for name in names):
        raise UserError(
            f"model family {' / '.join(names)} is not supported yet: block-causal and mixture-of-experts diffusion models need "
            f"another attention or another loader; choose a checkpoint of {', '.join(FAMILIES)}"
        )
    if family in FAMILIES:
        return FAMILIES[family]
    if "auto_map" not in config:
        raise unknown("model family", family, FAMILIES)
    if not trust_remote_code:
        hint = "or run the checkpoint's own code with --trust-remote-code"
        raise UserError(f"{unknown('model family', family, FAMILIES)}; {hint}")
    return None


def find_folder(
    name: str, revision: str | None = None, remote_code: bool = False, weights: bool = True, adapter: bool = False
) -> Path:
    """The folder of a shipped model, of a path, or of a hub name, which is downloaded to the hub's cache if it is not there.

    Args:
        remote_code: fetch Python files too. weights: without them, only what describes the model.
        adapter: whether an adapter is looked for, not a model.

    Raises:
        UserError: for a name that is none of these, or a hub that does not give it.
    """
    name = expand_home(name)
    folder = SHIPPED.get(name, Path(name))
    if folder.is_dir():
        if revision is not None:
            raise UserError(f"revision={revision} belongs to a hub name, and {name} is a folder here: leave it out")
        if adapter and not (folder / "adapter_config.json").is_file():
            raise UserError(f"{name} holds no adapter_config.json: give the folder of an adapter saved by peft")
        if not any((folder / f"{kind}config.json").is_file() for kind in ("", "adapter_")):
            raise UserError(f"{name} holds no config.json: give the folder of a saved checkpoint")
        return folder
    if not _HUB_NAME.fullmatch(name) or folder.exists() or name.startswith("."):
        if folder.exists():
            raise UserError(f"{name} is a file: give the folder of a checkpoint")
        if adapter:
            raise UserError(f"unknown adapter {name!r}: give the path of an adapter's folder, or a hub name")
        raise UserError(
            f"unknown model {name!r}: give {', '.join(SHIPPED)}, the path of a checkpoint folder, or a hub name like "
            "GSAI-ML/LLaDA-8B-Instruct"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    files = [*_HUB_FILES, *["*.safetensors"] * weights, *["*.py"] * remote_code]
    instead = "give the path of a folder that holds the checkpoint"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files))
    except GatedRepoError:
        raise UserError(f"the hub wants a log-in for {name}: run hf auth login, or {instead}") from None
    except RepositoryNotFoundError:
        raise UserError(f"the hub has no {name} for you: check the name, or {instead}") from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise UserError(f"cannot fetch {name} from the hub ({_first_line(error)}): {instead}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A checkpoint's JSON file. Raises UserError where it is no JSON object."""
    try:
        found = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}): repair or fetch it again") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object: repair or fetch it again")
    return found


def _placement(name: str, device: str, device_map: Any, load_in_4bit: bool) -> dict[str, Any]:
    """Keyword arguments of ``from_pretrained`` that say where the weights go and how."""
    if device_map is not None and world_size() > 1:
        raise UserError(
            f"device_map={device_map} spreads one model over all devices, but {world_size()} processes each have "
            "one: start a single process, or leave it out"
        )
    if device_map is not None and device != "auto":
        raise UserError(f"device={device} and device_map={device_map} contradict each other: give one of them")
    if device == "auto":
        count = torch.cuda.device_count()
        device = f"cuda:{local_rank() % count}" if count else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = _first_line(error).split(" device type at start")[0]  # (what follows lists twenty kinds)
        raise UserError(f"device {device!r} cannot be used ({reason}): give cpu, cuda or cuda:N") from None
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


def _weight_files(folder: Path, name: str) -> list[Path]:
    """The safetensors files of a folder. Raises UserError where there are none, or one is missing or damaged."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{name} holds no .safetensors weights: fetch them, or convert the checkpoint to safetensors")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({error}): fetch it again") from None
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) for s in shards.values()):
            raise UserError(f"{index} has no weight_map of keys to files: fetch it again")
        missing = sorted(set(shards.values()) - {file.name for file in files})
        if missing:
            raise UserError(f"{name} lacks {', '.join(missing)}, which its index names: fetch it again")
    return files


def _in_tree(
    kind: type[PreTrainedModel], folder: Path, name: str, config: dict[str, Any], settings: dict[str, Any]
) -> PreTrainedModel:
    """A model of a known family; refused by name where its files hold other keys or shapes."""
    architecture = next(iter(config.get("architectures") or [kind.__name__]))
    own = kind.config_class.model_type if kind.config_class else None
    if config["model_type"] == own and architecture != kind.__name__ and kind not in bidirectional.UNDER_PARENTS_NAME:
        raise UserError(
            f"{name} is refused: its architecture {architecture} is not {kind.__name__}, the one implemented for "
            f"{config['model_type']}"
        )
    loaded: Any = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True, **settings)
    model, report = loaded
    vars(model.config).pop("auto_map", None)  # names Python files that are neither needed nor saved with the model
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            keys = sorted(str(k) for k in report[problem])
            raise UserError(
                f"{name} is refused: {problem.replace('_', ' ')} {', '.join(keys[:4])} ({len(keys)} in all)"
            )
    return model


def _tokenizer(folder: Path, kind: type[PreTrainedModel], name: str) -> PreTrainedTokenizerBase:
    whole = (folder / "tokenizer.json").is_file()
    parts = all((folder / file).is_file() for file in ("vocab.json", "merges.txt"))
    dream = kind is bidirectional.DreamModel  # its tokenizer class is Qwen2's under another name
    if not whole and not (dream and parts):
        raise UserError(f"{name} holds no tokenizer.json: save the tokenizer beside the weights")
    try:
        if dream:
            found = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
        else:
            found = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  (the tokenizers library raises nothing narrower)
        raise UserError(
            f"the tokenizer of {name} cannot be read ({_first_line(error)}): fetch its tokenizer files again"
        ) from None
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


def _merged(lm: MaskedLM, adapter: Path, name: str) -> MaskedLM:
    """The model, now called ``name``, with an adapter merged into its weights (kept beside them where they are quantised)."""
    from peft import PeftModel

    files = sorted(adapter.glob("*.safetensors"))
    if not files:
        raise UserError(f"the adapter {adapter} holds no .safetensors weights: save it again as safetensors")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys, which are compared, and of tied weights, which are untied
            adapted = PeftModel.from_pretrained(lm.model, adapter, local_files_only=True)  # type: ignore[arg-type]
            try:
                check_adapter(adapted, adapter)
            except KeyError as error:
                raise UserError(f"the adapter {adapter} does not belong to {lm.name}: {error.args[0]}") from None
            model: Any = adapted
            if not getattr(lm.model, "is_loaded_in_4bit", False):
                _untie(lm.model)
                model = adapted.merge_and_unload()
    except _LOADING as error:
        raise UserError(f"cannot load the adapter {adapter}: {_first_line(error)}") from None
    lm = replace(lm, model=model.eval(), name=name, weights=f"{lm.weights}+{fingerprint(files)}")
    lm.self_test()
    return lm


def check_adapter(adapted: Any, folder: Path) -> None:
    """Raises KeyError, which says how, where the file of an adapter holds other keys than the model has for it."""
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    there = set(load_peft_weights(str(folder), device="cpu"))
    strange = sorted(wanted ^ (there - set(adapted.state_dict())))  # peft adds the model's embeddings at times
    if strange:
        raise KeyError(f"{', '.join(strange[:2])} ({len(strange)} keys differ)")


def _untie(model: Any) -> None:
    """Where an adapter changes the embeddings or the head of a model that ties them, give the head weights of its own:
    merged into shared ones, what was trained for one of them would change the other too."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends):
        model.untie()


def meta_model(kind: type[PreTrainedModel], config: Any, dtype: torch.dtype) -> Any:
    """A model without data, on the meta device."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return kind(config)
    finally:
        torch.set_default_dtype(before)


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
