"""Styles, sizes and prompt help: one table, deterministic, and with no say in what equal prompts become."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from fastapi.testclient import TestClient

from farm import accounts, pricing, prompting, styles
from farm.api import enhancer
from farm.api.app import create_app
from farm.catalog import catalog
from farm.db import transaction
from farm.errors import Fault
from farm.settings import settings
from farm.spec import MAX_PROMPT, Asked, Spec, fingerprint, resolve

MODELS = catalog()


def resolved(**asked: Any) -> Spec:
    found = resolve(Asked.model_validate({"prompt": "a castle", **asked}), MODELS)
    assert isinstance(found, Spec), found
    return found


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ratio", [*styles.ASPECT_RATIOS, *styles.SIZES])
def test_every_shape_is_one_that_the_model_allows(model: str, ratio: str) -> None:
    size = styles.named(ratio, MODELS[model])

    assert size is not None
    assert all(map(MODELS[model].side.allows, size))
    if (shape := styles.ratio_of(ratio)) is not None:
        limit = MODELS[model].side.max / MODELS[model].side.min
        wanted = max(min(shape[0] / shape[1], limit), 1 / limit)
        assert size[0] / size[1] == pytest.approx(wanted, rel=0.12)


def test_sizes_a_model_was_trained_on_come_first_and_unknown_names_are_none() -> None:
    assert styles.named("16:9", MODELS["sdxl"]) == (1344, 768)
    assert styles.named("landscape_16_9", MODELS["sdxl"]) == (1024, 576)
    assert styles.named("1:1", MODELS["starter"]) == (64, 64)
    assert styles.named("17:9", MODELS["sdxl"]) is None


# ------------------------------------------------------------------------------------------------ styles


def test_a_style_is_words_and_the_spec_says_which() -> None:
    spec = resolved(model="sdxl", negative_prompt="people", style="origami")

    assert spec.prompt == f"a castle, {styles.STYLES['origami'].prompt}"
    assert spec.negative_prompt == f"people, {styles.STYLES['origami'].negative}"
    assert (spec.original_prompt, spec.style) == ("a castle", "origami")
    assert Spec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_model_without_negative_prompts_gets_none_of_a_style() -> None:
    assert resolved(model="flux1-schnell", style="anime").negative_prompt == ""


def test_a_styled_prompt_has_the_fingerprint_of_the_same_words() -> None:
    styled = resolved(model="sdxl", style="anime")
    plain = resolved(model="sdxl", prompt=styled.prompt, negative_prompt=styled.negative_prompt)

    assert fingerprint(styled, MODELS["sdxl"], 7) == fingerprint(plain, MODELS["sdxl"], 7)
    other = resolved(model="sdxl", style="anime", prompt="a hut")
    assert fingerprint(other, MODELS["sdxl"], 7) != fingerprint(styled, MODELS["sdxl"], 7)


def test_a_plain_spec_says_nothing_of_styles() -> None:
    assert not {"original_prompt", "style", "enhanced_by"} & resolved().to_json().keys()


def test_prompt_and_style_that_are_too_long_together_are_refused() -> None:
    found = resolve(Asked(prompt="a" * MAX_PROMPT, style="anime"), MODELS, path="spec")

    assert isinstance(found, list)
    assert isinstance(found[0], Fault)
    assert (found[0].field, found[0].value) == ("spec.style", "anime")


# ------------------------------------------------------------------------------------------------ the template


@pytest.mark.parametrize("model", ["sdxl", "flux1-dev", "starter", "sd35-medium"])
@pytest.mark.parametrize(
    "prompt", ["a castle", "a red circle.", "A cat, at night, sharp focus", "山の絵", "x" * 4090]
)
def test_help_adds_only_what_is_missing_and_only_once(model: str, prompt: str) -> None:
    helped = prompting.enhanced(prompt, MODELS[model], longest=MAX_PROMPT)

    assert helped.startswith(prompt.rstrip(" ,.;"))
    assert len(helped) <= MAX_PROMPT
    assert prompting.enhanced(helped, MODELS[model], longest=MAX_PROMPT) == helped
    if "night" in prompt:
        assert "light" not in helped


def test_the_starter_is_given_nothing_but_a_ground() -> None:
    assert (
        resolved(prompt="a red circle", prompt_enhancement=True).prompt
        == "a red circle on a white background"
    )
    asked = "a red circle on a blue background"
    spec = resolved(prompt=asked, prompt_enhancement=True)
    assert (spec.prompt, spec.original_prompt, spec.enhanced_by) == (asked, None, "template")


# ------------------------------------------------------------------------------------------------ a text model


class Talker(BaseHTTPRequestHandler):
    """An OpenAI-compatible text endpoint that answers what it is told to."""

    answers: list[tuple[int, Any]]
    asked: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
        status, text = self.answers.pop(0) if self.answers else (500, "")
        data = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def talker(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Talker]]:
    kind = type("Told", (Talker,), {"answers": [], "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("FARM_ENHANCER_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("FARM_ENHANCER_KEY", "secret-of-the-text-model")
    monkeypatch.setenv("FARM_ENHANCER_MODEL", "small-talk")
    monkeypatch.setattr(enhancer, "_known", type(enhancer._known)())
    yield kind
    server.shutdown()
    server.server_close()


@pytest.fixture
def api(database: str) -> Iterator[TestClient]:
    settings.cache_clear()
    with transaction() as db:
        pricing.sync(db, catalog())
        key = accounts.issue_key(db, accounts.create(db, "acme"))[1]
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        yield client


def frame_of(api: TestClient, **spec: Any) -> dict[str, Any]:
    made = api.post("/v1/jobs", json={"spec": {"prompt": "a red circle", "prompt_enhancement": True, **spec}})
    assert made.status_code == 202, made.text
    return dict(api.get(made.json()["urls"]["frames"]).json()["frames"][0])


def test_a_text_model_helps_and_both_prompts_are_kept(talker: type[Talker], api: TestClient) -> None:
    talker.answers = [(200, '"a red circle in morning light"')]

    frame = frame_of(api, style="anime")
    again = frame_of(api, seed=1)

    assert frame["spec"]["original_prompt"] == "a red circle"
    assert frame["spec"]["enhanced_by"] == again["spec"]["enhanced_by"] == "small-talk"
    assert frame["revised_prompt"].startswith("a red circle in morning light, anime")
    assert again["revised_prompt"] == "a red circle in morning light"
    (asked,) = talker.asked  # the second was remembered
    assert asked["path"] == "/v1/chat/completions"
    assert asked["key"] == "Bearer secret-of-the-text-model"
    assert asked["messages"][1] == {"role": "user", "content": "a red circle"}


@pytest.mark.parametrize(
    "answer", [(500, "x"), (302, "x"), (200, ""), (200, "x" * 5000), (200, None), (200, ["x"] * 20_000)]
)
def test_a_text_model_that_fails_leaves_it_to_the_template(
    talker: type[Talker], api: TestClient, answer: tuple[int, Any]
) -> None:
    talker.answers = [answer]

    frame = frame_of(api)

    assert frame["revised_prompt"] == "a red circle on a white background"
    assert frame["spec"]["enhanced_by"] == "template: the text model did not answer"


def test_a_text_model_that_takes_too_long_is_not_waited_for(
    talker: type[Talker], api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = threading.Event()
    monkeypatch.setattr(talker, "do_POST", lambda self: done.wait(30))
    monkeypatch.setenv("FARM_ENHANCER_S", "0.3")
    settings.cache_clear()

    frame = frame_of(api)
    done.set()

    assert frame["spec"]["enhanced_by"].startswith("template")


def test_without_a_text_model_the_template_helps(api: TestClient) -> None:
    assert frame_of(api)["spec"]["enhanced_by"] == "template"


def test_an_unknown_style_names_those_there_are(api: TestClient) -> None:
    answer = api.post("/v1/jobs", json={"spec": {"prompt": "x", "style": "baroque"}})

    assert answer.status_code == 422
    assert answer.json()["errors"][0]["field"] == "spec.style"
    assert "origami" in answer.json()["errors"][0]["allowed"]
