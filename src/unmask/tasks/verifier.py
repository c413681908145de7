"""Problems and scores of reasoning-gym's data sets, made in a bounded process in which no answer runs as code.

Verifiers are other people's code that meets text of a model: some pass it to ``eval`` or to sympy, which is the same, some take
forever over it. So they run in a helper (``unmask.tasks.bounded``), where an audit hook refuses whatever a verifier does beyond
a short list: above all to compile text that is not the problem's own, to start processes, to connect, to write files. A
verifier that is refused, fails or takes too long says that the answer is wrong.

A data set is probed before it is used: its own answers must be right and nonsense must not be paid.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from typing import Any

from unmask.config import build
from unmask.errors import UserError
from unmask.tasks import bounded

Options = tuple[tuple[str, str], ...]

ENDLESS = 2**31
SIZES = {"acre": 2**12, "gsm_symbolic": 2**16, "list_functions": 2**16, "word_ladder": 20_000}
"""Problems per seed of data sets that build a list of them first, or allow no more; all others are endless."""
MAKE_SECONDS = 30.0  # of processor time, for a data set or a problem
PROBES = 2  # problems per data set
NONSENSE = ("", "nonsense", "nan", "-987654321987", "(1,", "{}")
MAX_NONSENSE_SCORE = 0.5

_HARMLESS = {"builtins.id", "exec", "import", "marshal.loads", "os.listdir", "os.scandir", "sys._getframe"}
"""Events that a verifier may cause. ``exec`` is of compiled code, and compiling is guarded."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
HELPER = bounded.Helper(__name__)


class _Guard:
    """An audit hook that is at work while ``own``, the texts that may be compiled, is not None."""

    own: frozenset[str] | None = None
    refused = ""
    """The event that was refused last."""

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.own is None or event in _HARMLESS or (event == "open" and not arguments[2] & _WRITES):
            return
        if event == "compile":
            text, file = arguments
            text = text.decode(errors="replace") if isinstance(text, bytes) else text
            if not str(file).startswith("<") or text in self.own:  # a module imported late, or the problem's own
                return
        self.refused = event
        raise PermissionError(f"a verifier may not use {event}")


_guard = _Guard()


@lru_cache(maxsize=64)
def _source(name: str, options: Options, seed: int) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    bounded.limit_time(MAKE_SECONDS)
    fixed = {"seed": seed, "size": SIZES.get(name, ENDLESS)}
    config = build(DATASETS[name][1], {**dict(options), **fixed}, f"task 'reasoning_gym:{name}'")
    return reasoning_gym.create_dataset(name, **vars(config))


@lru_cache(maxsize=4096)
def _entry(name: str, options: Options, seed: int, index: int) -> dict[str, Any]:
    source = _source(name, options, seed)
    bounded.limit_time(MAKE_SECONDS)
    return source[index]


def _score(name: str, options: Options, seed: int, index: int, answer: str) -> float:
    try:
        entry = deepcopy(_entry(name, options, seed, index))
        source = _source(name, options, seed)
        bounded.limit_time(bounded.CPU_SECONDS)
        _guard.own = frozenset(t for t in (*entry.values(), *entry["metadata"].values()) if isinstance(t, str))
        found = float(source.score_answer(answer, entry))
    except BaseException:  # noqa: BLE001  (a verifier that is not ours met text it was not made for: the answer is wrong)
        found = 0.0
    finally:
        _guard.own = None
    return found if found > 0 else 0.0  # no number is no score


def _probe(name: str, options: Options) -> str:
    """Why a data set is refused, as a sentence; empty where it is not."""
    try:
        answers = [_entry(name, options, 0, index)["answer"] for index in range(PROBES)]
    except UserError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  (a generator that is not ours)
        return f"reasoning_gym:{name} refuses its parameters: {error}"
    for index, own in enumerate(answers):
        _guard.refused = ""
        if own is not None and _score(name, options, 0, index, own) < 1:  # none: many answers are right
            fault = "would execute model text" if _guard.refused == "compile" else "calls the right answer wrong"
            return f"the verifier of reasoning_gym:{name} {fault}"
        for text in NONSENSE:
            if text != own and (paid := _score(name, options, 0, index, text)) > MAX_NONSENSE_SCORE:
                return f"the verifier of reasoning_gym:{name} pays {paid:.2g} for the answer {text!r}"
    return ""


def prepare() -> Callable[..., Any]:
    """The helper's function: what is asked (``probe``, ``question``, ``score``), then the data set, its options, and more."""
    import reasoning_gym  # noqa: F401  (slow: before copies are made)

    sys.addaudithook(_guard)
    asked: dict[str, Callable[..., Any]] = {
        "probe": _probe,
        "question": lambda *problem: str(_entry(*problem)["question"]),
        "score": _score,
    }
    return lambda what, name, options, *more: asked[what](name, tuple(map(tuple, options)), *more)
