"""unmask — decode, post-train and evaluate masked diffusion language models."""

from importlib.metadata import PackageNotFoundError, version

from unmask.decoding import PRESETS, Decoder, Plan, ascending, decode, make_decoder, replay, uniform
from unmask.models.load import load
from unmask.models.masked_lm import MaskedLM
from unmask.spec import UserError
from unmask.tasks import Grade, Problem, Task, make_task
from unmask.trajectory import Trajectory

try:
    __version__ = version("unmask")
except PackageNotFoundError:  # run from a source folder that is not installed
    __version__ = "0+unknown"

__all__ = [
    "PRESETS",
    "Decoder",
    "Grade",
    "MaskedLM",
    "Plan",
    "Problem",
    "Task",
    "Trajectory",
    "UserError",
    "__version__",
    "ascending",
    "decode",
    "load",
    "make_decoder",
    "make_task",
    "replay",
    "uniform",
]
