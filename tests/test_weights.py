"""Weights in prompts: what is refused when it is sent is what compel and the engines could not render."""

import random

import pytest

from farm import weights
from farm.bulk.matrices import Matrix
from farm.catalog import BUILTIN, Catalog, read
from farm.errors import Fault, Invalid
from farm.spec import Asked, Spec, resolve
from farm.weights import MAX_NESTED, MAX_WEIGHT, fault_of

MODELS = Catalog([read(BUILTIN)["sd15"], read(BUILTIN)["flux1-dev"]])
GOOD = [
    "a red circle", "(red)1.4", "ball++", "ball--", '"a red ball"0.5', "((red)1.2 circle)1.1", "(red", "red)", "((red)",
    '"red', ":-)", "a (b, c), d.", r"\(red\)", "(red:1.2)", "(a)0", "red.attend(1.3)", "(a) (b) (c)", "(((((a)))))",
    '("a", "b").blend(0.7, 0.3)', '("a","b").blend(1,1,no_normalize)', '("a", "b").blend()', '("a", b).and(1, 0.5)',
    '("a (b)1.2", "c").blend(-1, 3)', '("a").blend(1)', '("a, b", "c", "d").add()', ' ("a","") .blend (1, 1) ',
    r'("say \"x\"", "b").and()', "(a)100", "a" + "+" * 48, "(" * MAX_NESTED + "a" + ")1.1" * MAX_NESTED, "", "  ",
]  # fmt: skip
BAD = [
    '("a", "b").blend(0.7)', '("a", "b").blend(x, y)', '("a","b").blend(1,1) c', '("a","b").blend(1,1,1)',
    '("a","b").blend(1, s=1)', '("a","b").and(1)', '("a","b").and(x, 1)', '("a","b").blend(1,1).blend(2)',
    '("a","b").blend(0,0)', '("a","b").blend(1,-1)', '("a","()").blend(1,1)', "()", "() ()", "(()1.2)", '"()"+',
    "withLora(ink)", "().swap(dog)(", "cat.swap(dog, shape_freedom=x)", "(cat.swap(dog)).swap(x)",
    "(red)1" + "0" * 400, "(red)1000", "((red)50)50", "red" + "+" * 2000, "red.attend(101)", '"red"1000',
    "(" * 200 + "a", "(" * 40 + "a" + ")" * 40,
]  # fmt: skip


@pytest.mark.parametrize("prompt", GOOD)
def test_what_can_be_rendered_is_taken(prompt: str) -> None:
    assert fault_of(prompt) is None


@pytest.mark.parametrize("prompt", BAD)
def test_what_cannot_be_rendered_is_refused(prompt: str) -> None:
    found = fault_of(prompt)

    assert found is not None
    assert found[0] in prompt
    assert found[1].startswith(("allowed", "brackets may", ".swap() is", "LoRAs are"))


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_a_spec_with_bad_weights_is_refused_by_field(field: str) -> None:
    bad = '("a", "b").blend(1)'
    said = {"model": "sd15", "prompt": "a", field: bad}

    found = resolve(Asked(**said, prompt_weights=True), MODELS, path="spec")

    assert found == [Fault(f"spec.{field}", "1", weights.TOGETHER)]
    assert isinstance(resolve(Asked(**said), MODELS), Spec)  # words, where weights are not read


def test_a_matrix_with_bad_weights_is_refused_by_its_prompt() -> None:
    axes = {"model": ["sd15"], "prompt": ["(red)1.2", "()"], "prompt_weights": True}

    with pytest.raises(Invalid) as refused:
        Matrix(axes, {}, MODELS, most=10)

    assert refused.value.faults == [Fault("matrix.prompt", "()", weights.NO_WORDS)]
    assert Matrix({**axes, "prompt_weights": False}, {}, MODELS, most=10).count == 2


# ------------------------------------------------------------------------------------------------ compel itself

PIECES = [
    "(", ")", '"', "a", "red", " ", " ", ",", ".", "+", "-", "1.2", "0.5", "2", ".blend(", ".and(", ".swap(",
    "withLora(", "no_normalize", "=", "\\", "()", '("a","b")', "(a b)1.3", '"c d"0.4', ".attend(", '""', "+++",
    "\n", "é", ":", "[", '("a", "b").blend(1, 1)', '("a b", "c").and()', "99999999999999999999", "1e9",
]  # fmt: skip
PARTS = ['"a"', '"b"', "c", '"a (b)1.2"', '""', '"()"', '"a+"', '"(a"', '"a)"', '"a, b"', r'"a \"q\""', "(b)"]
NUMBERS = ["", "1", "1,1", "1, 0.5", "-1,2", ".5,1.", "x", "1,y", "1,1,1", "1,1,no_normalize", "no_normalize", "0,0",
           "1 1", "+1,2", "1,-1", "1,1,"]  # fmt: skip


def prompts(count: int) -> list[str]:
    """Some that are nearly right: pieces in any order, and operators with any parts and weights."""
    draw, made = random.Random(7), []
    for n in range(count):
        if n % 3:
            kinds = PIECES if n % 3 == 1 else '()".+-a 1,\\'
            made.append("".join(draw.choice(kinds) for _ in range(draw.randint(1, 10))))
            continue
        parts = draw.choice([",", ", ", " , "]).join(draw.choices(PARTS, k=draw.randint(1, 3)))
        verb = draw.choice([".blend(", ".and(", ".add (", " .blend("])
        made.append(f"({parts}){verb}{draw.choice(NUMBERS)}){draw.choice(['', '', '', ' c', ' ()'])}")
    return made


def test_compel_fails_on_nothing_that_is_taken() -> None:
    parser = pytest.importorskip("compel.prompt_parser")
    compel = pytest.importorskip("compel")
    pytest.importorskip("workers.engine.words")  # which has it remember what it read
    taken = [p for p in (*GOOD, *prompts(600)) if fault_of(p) is None]
    assert len(taken) > 150

    for prompt in taken:
        read_as = compel.Compel.parse_prompt_string(prompt)
        assert read_as.prompts, prompt
        for one in read_as.prompts:
            if isinstance(one, parser.Blend):
                assert not one.normalize_weights or abs(sum(one.weights)) > 0, prompt
            for text in one.prompts if isinstance(one, parser.Blend) else [one]:
                assert all(
                    type(f) is parser.Fragment and f.weight <= 1.01 * MAX_WEIGHT for f in text.children
                ), prompt


def test_what_is_taken_is_rendered_and_what_is_refused_is_not() -> None:
    pytest.importorskip("compel")
    import torch

    from farm.errors import RenderFailed
    from tests.tiny import tiny_ask, tiny_engine
    from workers.engine.words import Words

    engine = tiny_engine("sd")
    words = Words(engine.pipe)

    def is_read(prompt: str) -> bool:
        try:
            found = words.encode(prompt, tiny_ask(engine.model, prompt, prompt_weights=True).spec)
        except RenderFailed:
            return False
        return all(bool(torch.isfinite(t).all()) for t in found.values())

    served = {p for p in BAD if ".swap" in p} | {"(red)1000", "((red)50)50", "red.attend(101)", '"red"1000'}
    assert [p for p in (*GOOD, '""0.5', 'red ""0.5 b') if not is_read(p)] == []
    assert [p for p in BAD if p not in served and is_read(p)] == []
