"""Any reasoning-gym data set as a task: ``reasoning_gym:leg_counting,max_animals=4``, graded by its own verifier.

Verifiers are other people's code: some pass a model's text to ``eval`` or sympy, some take forever over it. So they run in a
bounded process, where an audit hook refuses all but a short list of events; one that is refused, fails or takes too long says
that the answer is wrong. A data set is probed before it is used: its own answers must be right and nonsense must not be paid.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from unmask.config import build
from unmask.errors import UserError, unknown
from unmask.tasks import answers, bounded
from unmask.tasks.base import PROMPTS, TASKS, Grade, Judge, Problem, Task, stream_seed

Options = tuple[tuple[str, str], ...]

ENDLESS = 2**31
SIZES = {"acre": 2**12, "gsm_symbolic": 2**16, "list_functions": 2**16, "word_ladder": 20_000}
"""Problems per seed of data sets that build a list of them first, or allow no more."""
MAKE_SECONDS = 30.0  # of processor time, for a data set or a problem
PROBES = 2  # problems per data set
NONSENSE = ("", "nonsense", "nan", "-987654321987", "(1,", "{}")
MAX_NONSENSE_SCORE = 0.5
WORKER = bounded.BoundedProcess(__name__)

_HARMLESS = {"builtins.id", "exec", "import", "marshal.loads", "os.listdir", "os.scandir", "sys._getframe"}
"""Events that a verifier may cause. ``exec`` is of compiled code, and compiling is guarded."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@TASKS.register("reasoning_gym")
@dataclass(frozen=True)
class ReasoningGym(Task):
    """A data set of reasoning-gym; a problem's question fixes its split."""

    name = "reasoning_gym"
    prompt_template = PROMPTS["reasoning_gym"]
    score_name = "score"

    dataset: str = ""
    options: Options = ()
    """Fields of the data set's own config, as (key, text)."""

    def __post_init__(self) -> None:
        from reasoning_gym.factory import DATASETS  # slow: only where it is used

        if self.dataset not in DATASETS:
            raise unknown("reasoning_gym data set", self.dataset, DATASETS)
        if self.style != "paper" or self.extraction != "default":
            raise UserError(f"reasoning_gym:{self.dataset} has one style and one extraction: drop those parameters")
        refusal = self.ask("probe")
        if refusal is None:
            limits = f"{MAKE_SECONDS:.0f} seconds or {bounded.MEMORY >> 30} GiB"
            refusal = f"reasoning_gym:{self.dataset} takes more than {limits} to make"
        if refusal:
            raise UserError(refusal + (": use task 'countdown' instead" if self.dataset == "countdown" else ""))

    def ask(self, what: str, *more: Any) -> Any:
        """The worker's reply about this data set, see ``prepare``; None where it has none within bounds."""
        return WORKER.ask(what, self.dataset, self.options, *more)

    @property
    def label(self) -> str:
        return f"{self.name}_{self.dataset}"

    def draw(self, seed: int) -> Iterator[Problem]:
        for index in range(SIZES.get(self.dataset, ENDLESS)):
            question = self.ask("question", stream_seed(seed), index)
            if question is None:
                what = f"problem {index} of reasoning_gym:{self.dataset}"
                raise UserError(f"{what} cannot be made: choose other parameters or another seed")
            yield Problem(f"{seed}:{index}", question, {"seed": seed, "index": index})

    def identity(self, problem: Problem) -> str:
        return problem.question

    def grade(self, problem: Problem, completion: str) -> Grade:
        text = answers.cut_at_end(completion)
        answer = (answers.tagged(text) or text).strip()
        score = float(self.ask("score", stream_seed(problem.truth["seed"]), problem.truth["index"], answer) or 0)
        return Grade(score >= 1.0, score, 1.0, answer)

    def rewards(self) -> dict[str, tuple[Judge, float]]:
        return {self.dataset: (self.reward, 1.0)}


# ---- in the worker process -------------------------------------------------------------------------------------------


class _Guard:
    """An audit hook that is at work while ``own``, the texts that may be compiled, is not None."""

    own: frozenset[str] | None = None
    refused = ""  # the event that was refused last

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
        source, entry = _source(name, options, seed), deepcopy(_entry(name, options, seed, index))
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
        right = [_entry(name, options, 0, index)["answer"] for index in range(PROBES)]
    except UserError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  (a generator that is not ours)
        return f"reasoning_gym:{name} refuses its parameters: {error}"
    for index, answer in enumerate(right):
        _guard.refused = ""
        if answer is not None and _score(name, options, 0, index, answer) < 1:  # none: many answers are right
            fault = "would execute model text" if _guard.refused == "compile" else "calls the right answer wrong"
            return f"the verifier of reasoning_gym:{name} {fault}"
        for text in NONSENSE:
            if text != answer and (paid := _score(name, options, 0, index, text)) > MAX_NONSENSE_SCORE:
                return f"the verifier of reasoning_gym:{name} pays {paid:.2g} for the answer {text!r}"
    return ""


def prepare() -> Callable[..., Any]:
    """The worker's function: what is asked (``probe``, ``question``, ``score``), then the data set, its options, and more."""
    import reasoning_gym  # noqa: F401  (slow: before copies are made)

    sys.addaudithook(_guard)
    asked: Any = {"probe": _probe, "question": lambda *problem: str(_entry(*problem)["question"]), "score": _score}
    return lambda what, name, options, *more: asked[what](name, tuple(map(tuple, options)), *more)
