"""Thousands of requests by the server's own schema and against it: no status of 500, no hang, errors in one form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode

from conftest import toy
from serving import serving
from unmask.serve.service import Service

FUZZ: dict[str, Any] = {"deadline": None, "suppress_health_check": [*HealthCheck], "phases": [Phase.generate]}
ROUTES = ["/v1/chat/completions", "/v1/completions", "/unmask/candidates", "/unmask/grade", "/unmask/view"]
FINE = {200, 400, 404, 405, 413, 429, 504}


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Service]]:
    lm = toy(n_layers=1, max_sequence_length=96)
    with serving(lm, deadline=30, max_new_tokens=16) as found:
        yield found


def check(response: requests.Response) -> None:
    assert response.status_code in FINE, (response.status_code, response.request.body)
    if response.status_code >= 400:
        error = json.loads(response.text)["error"]
        assert {*error} == {"message", "type", "param", "code"} and error["message"]
        assert "Traceback" not in error["message"] and "/unmask/" not in error["message"]


@pytest.mark.parametrize("mode", [*GenerationMode], ids=lambda mode: mode.name)
@pytest.mark.parametrize("route", ROUTES)
def test_what_the_schema_allows_and_what_it_does_not(
    served: tuple[str, Service], route: str, mode: GenerationMode
) -> None:
    address, service = served
    session = requests.Session()
    schema = schemathesis.openapi.from_dict(session.get(f"{address}/openapi.json").json())

    @settings(**FUZZ, max_examples=170)
    @given(case=schema[route]["POST"].as_strategy(generation_mode=mode))
    def send(case: Case) -> None:
        check(case.call(base_url=address, session=session, timeout=60))

    send()
    assert not service.engine.running


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ["max_tokens", "n", "stop", "seed", "temperature", "top_p", "stream", "stream_options", "decoder", "prefill"]


def test_right_requests_with_one_or_two_wrong_fields(served: tuple[str, Service]) -> None:
    """Near the right ones, where a check is easily forgotten; also decoders of any parameters."""
    address, service = served
    session, names = requests.Session(), [field["name"] for field in service.info()["fields"]]
    values = st.sampled_from(
        ["0", "1", "8", "-1", "1e9", "nan", "none", "inf", "0.5", "", "reject", "entropy", "x" * 50]
    )
    parameters = st.lists(st.tuples(st.sampled_from(names), values), max_size=3).map(
        lambda pairs: ",".join(f"{name}={value}" for name, value in pairs)
    )
    decoders = st.tuples(st.sampled_from([*service.info()["decoders"]]), parameters).map(":".join)
    wrong = st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=2)

    @settings(**FUZZ, max_examples=400)
    @given(wrong=wrong, decoder=decoders, text=st.text(max_size=30))
    def send(wrong: dict[str, Any], decoder: str, text: str) -> None:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 16, "decoder": decoder, **wrong}
        data = json.dumps(body, allow_nan=True).encode()
        kind = {"Content-Type": "application/json"}
        check(session.post(f"{address}/v1/chat/completions", data, headers=kind, timeout=60))

    send()
    assert service.engine.thread.is_alive()
