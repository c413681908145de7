"""``python -m benchmarks serve``: throughput and latency of ``unmask serve`` under load, beside offline decoding."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import openai
import psutil
import torch
from numpy import percentile

from benchmarks.common import write_result
from benchmarks.config import BenchServe
from unmask.decoding import decode_each, make_decoder
from unmask.models.load import load
from unmask.models.masked_lm import MaskedLM
from unmask.tasks import make_task

Messages = list[dict[str, str]]


def run(config: BenchServe, progress: Callable[[str], None]) -> dict[str, Any]:
    """Load and offline decoding in turn, then a burst; writes and returns the result."""
    lm = load(config.model)
    task = make_task(config.task, lm.task_defaults)
    chats = [[{"role": "user", "content": task.instruction(p)}] for p in task.problems("test", 256)]
    offline: list[float] = []

    def rest() -> None:
        progress("offline decoding")
        offline.append(decode_offline(lm, chats, config))
        progress("load")

    with server(config) as (process, address):
        found = asyncio.run(load_server(address, lm.name, chats, config, process, rest))
    found |= {"offline": offline, "ratio": sum(found["rates"]) / sum(offline)}
    return write_result(config, [found])


def decode_offline(lm: MaskedLM, chats: Sequence[Messages], config: BenchServe) -> float:
    """Completions a second of ``decode_each`` with a full batch."""
    prompts = list(islice(cycle([lm.render(chat) for chat in chats]), 100_000))
    decoder, seeds = make_decoder(config.decoder), torch.zeros(len(prompts), dtype=torch.int64)
    done, began = 0, time.perf_counter()
    for numbers, _ in decode_each(lm, prompts, decoder, seeds, config.max_batch):
        done += len(numbers)
        if (seconds := time.perf_counter() - began) >= config.seconds / config.rounds:
            break
    return done / seconds


@contextmanager
def server(config: BenchServe) -> Iterator[tuple[psutil.Process, str]]:
    """``unmask serve`` in a process of its own, and its address."""
    command = [
        sys.executable,
        "-m",
        "unmask",
        "serve",
        "--model",
        config.model,
        "--decoder",
        config.decoder,
        "--port",
        "0",
    ]
    command += ["--max-batch", str(config.max_batch), "--max-queue", str(config.max_queue)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as started:
        try:
            assert started.stdout is not None
            yield psutil.Process(started.pid), started.stdout.readline().split()[1]
        finally:
            started.terminate()


async def load_server(
    address: str,
    model: str,
    chats: Sequence[Messages],
    config: BenchServe,
    process: psutil.Process,
    rest: Callable[[], None],
) -> dict[str, Any]:
    """Clients in a closed loop, in rounds with a ``rest`` behind each; then a burst of more requests than the queue takes."""
    api = openai.AsyncOpenAI(base_url=f"{address}v1", api_key="none", max_retries=0, timeout=600)
    latencies: list[float] = []
    statuses: Counter[str] = Counter()

    async def ask(chat: Messages) -> None:
        began = time.perf_counter()
        try:
            await api.chat.completions.create(model=model, messages=chat)  # type: ignore[arg-type]
        except openai.APIStatusError as error:
            statuses[str(error.status_code)] += 1
        except openai.APIError as error:
            statuses[type(error).__name__] += 1
        else:
            statuses["200"] += 1
            latencies.append(time.perf_counter() - began)

    def taken() -> dict[str, float]:
        return {"mib": process.memory_info().rss / 2**20, "files": process.num_fds(), "threads": process.num_threads()}

    async def again(first: int) -> None:
        for chat in islice(cycle(chats), first, None):
            await ask(chat)
            if time.perf_counter() > end:
                return

    await asyncio.gather(*(ask(chat) for chat in chats[: config.clients]))  # the first batches meet a cold server
    found: dict[str, Any] = {"rates": [], "before": taken()}
    latencies.clear()
    for _ in range(config.rounds):
        began, done = time.perf_counter(), len(latencies)
        end = began + config.seconds / config.rounds
        await asyncio.gather(*(again(7 * i) for i in range(config.clients)))
        found["rates"].append((len(latencies) - done) / (time.perf_counter() - began))
        rest()
    found |= {"requests": len(latencies), "errors": sum(n for status, n in statuses.items() if status != "200")}
    found |= {f"p{share}": float(percentile(latencies, share)) for share in (50, 99)}
    found["after"] = taken()
    statuses.clear()
    burst = 2 * (config.max_queue + config.max_batch)
    await asyncio.gather(*(ask(chat) for chat in islice(cycle(chats), burst)))
    return {**found, "burst": dict(statuses), "after_burst": taken()}


def table(config: BenchServe, result: dict[str, Any]) -> tuple[str, list[dict[str, str]]]:
    """Title, and text by heading."""
    (c,) = result["cells"]
    row = {
        "requests": str(c["requests"]),
        "errors": str(c["errors"]),
        "requests/s": " ".join(f"{rate:.2f}" for rate in c["rates"]),
        "offline": " ".join(f"{rate:.2f}" for rate in c["offline"]),
        "ratio": f"{c['ratio']:.2f}",
        "p50 s": f"{c['p50']:.2f}",
        "p99 s": f"{c['p99']:.2f}",
        "burst": ", ".join(f"{count} x {status}" for status, count in sorted(c["burst"].items())),
        "MiB before, after, after the burst": " ".join(
            f"{c[key]['mib']:.0f}" for key in ("before", "after", "after_burst")
        ),
        "files": " ".join(str(c[key]["files"]) for key in ("before", "after", "after_burst")),
    }
    return f"{config.clients} clients, {config.decoder}, {config.max_batch} rows, {config.model}, {config.task}", [row]
