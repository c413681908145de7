"""Thousands of requests by the server's own schema and beyond it: never a status of 500, never a hang, errors in one form."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from conftest import CHARACTERS, toy
from serving import fetch, serving
from unmask.serve.app import Service

EXAMPLES = 300
FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[*HealthCheck], phases=[Phase.generate], derandomize=True
)
ROUTES = ["/v1/chat/completions", "/v1/completions", "/unmask/candidates", "/unmask/grade", "/unmask/view"]
