"""Every operation of the OpenAPI, with what its schema allows and what it does not: no 5xx, answers as documented.

A few examples of each here; `make schema` sends 300 and more of each: FARM_SCHEMA_EXAMPLES says how many.
"""

import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from farm import accounts, catalog, pricing
from farm.accounts import Role
from farm.db import transaction
from farm.settings import settings
from tests.test_client import serving


def no_server_error(context: Any, response: Any, case: Any) -> bool | None:
    """No 5xx, but that a wait ran out, which is said: nothing renders here."""
    return None if response.status_code == RAN_OUT else not_a_server_error(context, response, case)


RAN_OUT = 504
NO_PATH = "There is no such path."
CHECKS = [
    no_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
FEW = 2
MANY = int(os.environ.get("FARM_SCHEMA_EXAMPLES", "300"))
TIMEOUT_S = 30
ONLY = os.environ.get("FARM_SCHEMA_ONLY", "")  # operations whose name holds this


@pytest.fixture
def farm(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """An API, and the key of an admin that may send as much as it likes."""
    rates = ("FARM_READS_PER_S", "FARM_WRITES_PER_S", "FARM_SUBMISSIONS_PER_S")
    for name, value in {
        **dict.fromkeys(rates, "1000000"),
        "FARM_SYNC_WAIT_S": "0.05",
        "FARM_WRONG_KEYS_PER_MIN": "1e6",
        "FARM_FETCH_S": "0.2",
    }.items():
        monkeypatch.setenv(name, value)
    settings.cache_clear()
    with transaction() as db:
        pricing.sync(db, catalog.catalog())
        key = accounts.issue_key(db, accounts.create(db, "tester"), role=Role.ADMIN)[1]
    with serving() as url:
        yield url, key


@pytest.mark.parametrize("examples", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.timeout(36_000)
def test_every_operation_answers_as_it_is_documented(farm: tuple[str, str], examples: int) -> None:
    url, key = farm
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    wrong, tried = [], 0
    with requests.Session() as session, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session.headers["Authorization"] = f"Bearer {key}"
        for found in schema.get_all_operations():
            operation = found.ok()
            if ONLY in operation.label:
                tried += 1
                if examples != FEW:
                    print(f"{tried:4} {operation.label}", flush=True)  # noqa: T201 - it takes an hour
                for mode in GenerationMode:
                    wrong += failures(operation, mode, session, examples)
    assert not wrong, "\n\n".join(wrong)
    assert tried > 60 or ONLY


def failures(operation: Any, mode: GenerationMode, session: requests.Session, examples: int) -> list[str]:
    """What one operation answered that it must not; the smallest request that makes it do so."""
    try:
        cases = operation.as_strategy(generation_mode=mode)
    except Exception as e:  # nothing can be made against a schema that takes everything
        return [] if mode is GenerationMode.NEGATIVE else [f"{operation.label}: {e}"]

    @given(case=cases)
    @hypothesis_settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=examples == FEW,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if examples != FEW else [])],
        suppress_health_check=list(HealthCheck),
    )
    def run(case: Any) -> None:
        response = case.call(session=session, timeout=TIMEOUT_S)
        if response.status_code == 404 and NO_PATH in response.text:  # a slash in an id: it is another path
            return
        case.validate_response(response, checks=CHECKS)

    try:
        run()
    except (Failure, FailureGroup) as e:
        return [f"{operation.label} ({mode.value}): {said(e)}"]
    except Exception as e:
        if type(e).__name__ in ("Unsatisfiable", "SkipTest"):
            return []
        return [f"{operation.label} ({mode.value}): {type(e).__name__} {said(e)}"]
    return []


def said(error: BaseException) -> str:
    parts = error.exceptions if isinstance(error, BaseExceptionGroup) else [error]
    return "\n".join(str(part)[:1500] for part in parts)
