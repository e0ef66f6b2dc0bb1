"""Lines of bulk uploads: the short way says what the long one says, and each kind of bad line is named."""

import json
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from farm import drafts
from farm.bulk.lines import FAULTS, MAX_NAME, Read, Reader, Row
from farm.bulk.matrices import MAX_COMBINATIONS, MAX_PROMPTS, MAX_TEXT, SHOWN, Matrix, expanded
from farm.errors import Invalid
from farm.spec import MAX_SEED, Asked
from tests.factories import CATALOG

RED = {"custom_id": "a", "prompt": "a red circle", "model": "alpha"}


def ndjson(*said: Any, defaults: dict[str, Any] | None = None) -> Read:
    data = b"".join((s if isinstance(s, bytes) else json.dumps(s).encode()) + b"\n" for s in said)
    return Reader(CATALOG, defaults or {}).ndjson(data, line=0, final=True)


def csv(text: str | bytes, *, final: bool = True) -> Read:
    data = text if isinstance(text, bytes) else text.encode()
    return Reader(CATALOG, {"model": "alpha"}).csv(data, line=0, final=final)


def faults(read: Read) -> list[tuple[int, str, Any, str]]:
    return [(e.line, e.fault.field, e.fault.value, e.fault.allowed) for e in read.errors]


def prompts(read: Read) -> list[str]:
    return [
        r.template.spec.prompt if not r.template.json else json.loads(r.spec_json)["prompt"]
        for r in read.rows
    ]


# ------------------------------------------------------------------------------------------------ the short way


VARIETY: list[dict[str, Any]] = [
    {},
    {"steps": 7, "width": 128},
    {"negative_prompt": 'a "blur", \\ \u2028 “x”', "guidance": 3, "format": "webp", "quality": 80},
    {"model": "flat"},
    {"sampler": "euler", "guidance": 1.0},
    {"style": "anime"},
    {"prompt_enhancement": True},
]


@pytest.mark.parametrize("more", VARIETY)
def test_a_line_says_what_the_same_spec_sent_to_jobs_says(more: dict[str, Any]) -> None:
    texts = ['a "red" circle', "ein grüner Kreis\nneben \\ allem", "\u2028 日本 🙂", "x" * 4096]
    for text in texts if "style" not in more and "prompt_enhancement" not in more else texts[:3]:
        # the second line of its kind goes the short way
        said = [
            {**RED, **more, "prompt": text, "seed": seed, "custom_id": f"{seed}"} for seed in (5, MAX_SEED)
        ]
        read = ndjson(*said)

        assert read.errors == []
        for row, line in zip(read.rows, said, strict=True):
            asked = Asked(**{k: v for k, v in line.items() if k != "custom_id"})
            (frame,) = drafts.draft([("spec", asked)], CATALOG).frames
            assert json.loads(row.spec_json) == json.loads(frame.as_json)
            assert row.spec_json.decode() == frame.as_json
            assert (row.print, row.seed, row.seeded) == (frame.fingerprint(), line["seed"], True)


def test_seeds_that_are_left_out_are_drawn_each_for_itself() -> None:
    read = ndjson(*({**RED, "custom_id": str(n)} for n in range(3000)))

    assert not any(r.seeded for r in read.rows)
    assert len({r.seed for r in read.rows}) == len({r.print for r in read.rows}) == 3000
    assert all(0 <= r.seed <= MAX_SEED for r in read.rows)


def test_what_a_line_leaves_out_the_defaults_say() -> None:
    read = ndjson({"custom_id": "a"}, {"custom_id": "b", "steps": 9}, defaults={**RED, "steps": 3, "seed": 4})

    assert [(r.name, r.seed, json.loads(r.spec_json)["steps"]) for r in read.rows] == [
        ("a", 4, 3),
        ("b", 4, 9),
    ]


BAD = {
    "no JSON": (b'{"custom_id": "a', "line", None, "it must be JSON"),
    "a list": ([], "line", [], "it must be an object"),
    "a surrogate": (b'{"custom_id": "a", "prompt": "\\ud800"}', "line", None, "it must be JSON"),
    "no UTF-8": (b'{"custom_id": "a", "prompt": "\xff"}', "line", None, "it must be JSON"),
    "NaN": (b'{"custom_id": "a", "prompt": "a", "guidance": NaN}', "line", None, "it must be JSON"),
    "deep": (b"[" * 100_000, "line", None, "it must be JSON"),
    "no name": ({"prompt": "a"}, "custom_id", None, "it is required"),
    "an empty name": ({**RED, "custom_id": ""}, "custom_id", "", "allowed are 1 to 255"),
    "a long name": ({**RED, "custom_id": "x" * 256}, "custom_id", "x" * 256, "allowed are 1 to 255"),
    "a name with NUL": ({**RED, "custom_id": "a\0"}, "custom_id", "a\0", "NUL"),
    "a number as name": ({**RED, "custom_id": 3}, "custom_id", 3, "allowed are 1 to 255"),
    "no prompt": ({"custom_id": "a"}, "prompt", None, "it is required"),
    "a long prompt": ({**RED, "prompt": "a" * 4097}, "prompt", "a" * 4097, "allowed are 1 to 4096"),
    "NUL": ({**RED, "prompt": "a\0"}, "prompt", "a\0", "NUL"),
    "unknown field": ({**RED, "stepz": 3}, "stepz", 3, "there is no such field; allowed are prompt"),
    "unknown model": ({**RED, "model": "x"}, "model", "x", "allowed are alpha"),
    "width": ({**RED, "width": 65}, "width", 65, "allowed are multiples of 8 from 64 to 2048"),
    "true as a number": ({**RED, "steps": True}, "steps", True, "it must be an integer"),
    "a number as text": ({**RED, "steps": "4"}, "steps", "4", "it must be an integer"),
    "an endless number": ({**RED, "width": 10**300}, "width", 10**300, "multiples of 8"),
    "a negative seed": ({**RED, "seed": -1}, "seed", -1, "allowed are 0 to"),
    "a large seed": ({**RED, "seed": 2**63}, "seed", 2**63, "allowed are 0 to"),
    "a seed with a point": ({**RED, "seed": 1.5}, "seed", 1.5, "allowed are 0 to"),
    "several images": ({**RED, "count": 2}, "count", 2, "a line is one image"),
    "an image by no name": ({**RED, "image": "a.png"}, "image", "a.png", "allowed are inp_… of an upload"),
    "format": ({**RED, "format": "gif"}, "format", "gif", "allowed are 'png', 'webp' or 'jpeg'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_each_kind_of_bad_line_is_named_and_its_neighbours_are_taken(kind: str) -> None:
    line, field, value, allowed = BAD[kind]
    good = [{**RED, "custom_id": f"ok {n}", "steps": 4} for n in range(4)]

    read = ndjson(good[0], good[1], line, b"", good[2], b"\r", good[3])

    assert [r.name for r in read.rows] == ["ok 0", "ok 1", "ok 2", "ok 3"]
    [(no, at, came, said)] = faults(read)
    assert (no, at, came) == (3, field, value)
    assert allowed in said
    assert read.lines == 7


def test_every_fault_of_a_line_is_named() -> None:
    read = ndjson({**RED, "width": 65, "steps": 0})

    assert [(line, field) for line, field, _, _ in faults(read)] == [(1, "width"), (1, "steps")]


def test_a_mark_at_the_start_and_ends_of_line_of_any_kind_are_taken() -> None:
    data = (
        b"\xef\xbb\xbf" + json.dumps(RED).encode() + b"\r\n" + json.dumps({**RED, "custom_id": "b"}).encode()
    )
    read = Reader(CATALOG, {}).ndjson(data, line=0, final=True)

    assert [r.name for r in read.rows] == ["a", "b"]
    assert read.used == len(data)


def test_of_a_part_only_whole_lines_are_used() -> None:
    data = json.dumps(RED).encode() + b"\n" + b'{"custom_id": "b", "pro'

    read = Reader(CATALOG, {}).ndjson(data, line=0, final=False)

    assert (read.used, read.lines, len(read.rows), read.errors) == (data.index(b"\n") + 1, 1, 1, [])


# ------------------------------------------------------------------------------------------------ CSV


def test_csv_as_spreadsheets_write_it() -> None:
    text = (
        "\ufeffcustom_id, prompt,steps,guidance,seed,negative_prompt,long_prompt\r\n"
        'a,"a ""red"" circle, large",4,2.5,7,,true\r\n'
        'b,"two\r\nlines",,,,"blur",\r\n'
        "\r\n"
        "c,grün,5,1,0,,0"
    )
    read = csv(text)

    assert faults(read) == []
    assert [(r.name, r.seeded) for r in read.rows] == [("a", True), ("b", False), ("c", True)]
    first, second, third = (json.loads(r.spec_json) for r in read.rows)
    assert (first["prompt"], first["steps"], first["guidance"]) == ('a "red" circle, large', 4, 2.5)
    assert (second["prompt"].replace("\r", ""), second["negative_prompt"]) == ("two\nlines", "blur")
    assert (third["prompt"], read.lines, read.used) == ("grün", 6, len(text.encode()))


@pytest.mark.parametrize(
    ("header", "field", "allowed"),
    [
        ("custom_id,prompt,stepz", "columns[2]", "allowed are custom_id, prompt"),
        ("custom_id,prompt,prompt", "columns[2]", "it is there twice"),
        ("prompt,steps", "columns", "custom_id is required"),
        ("custom_id,count", "columns[1]", "allowed are custom_id"),
    ],
)
def test_columns_that_are_not_allowed_refuse_the_file(header: str, field: str, allowed: str) -> None:
    with pytest.raises(Invalid) as error:
        csv(header + "\na,b,c\n")

    [fault] = error.value.faults
    assert fault.field == field
    assert allowed in fault.allowed


def test_bad_records_are_named_by_the_line_they_start_in() -> None:
    read = csv(
        b"custom_id,prompt,steps,control\n"
        b'a,"x\ny",4,\n'  # lines 2 and 3
        b"b,x\n"
        b"c,x,many,\n"
        b"d,\xff,4,\n"
        b'e,"x"y,4,\n'
        b"f,x,4,[1]\n"
        b"g,x,5,\n"
        b'h,"never ends\n'
    )

    assert [r.name for r in read.rows] == ["a", "g"]
    assert [(line, field) for line, field, _, _ in faults(read)] == [
        (4, "line"), (5, "steps"), (6, "prompt"), (7, "line"), (8, "control[0]"), (10, "line"),
    ]  # fmt: skip


def test_of_a_line_full_of_faults_the_first_are_told() -> None:
    wrong = {f"field{n}": n for n in range(1000)}

    read = ndjson({**RED, **wrong}, {**RED, "custom_id": "b"})

    assert [e.fault.field for e in read.errors] == list(wrong)[:FAULTS]
    assert [row.name for row in read.rows] == ["b"]


def test_a_cell_holds_what_a_line_may_hold() -> None:
    image = "data:image/png;base64," + "A" * 200_000  # beyond the limit of Python's csv

    read = csv(f'custom_id,prompt,image\na,x,"{image}"\n')

    assert (faults(read), [one.asked.image for one in read.unresolved]) == ([], [image])


def test_a_quote_without_its_end_says_which_lines_it_took() -> None:
    read = csv('custom_id,prompt\na,x\nb,"never ends\nc,x\nd,x\n')

    [(line, field, _, allowed)] = faults(read)
    assert (line, field, [r.name for r in read.rows]) == (3, "line", ["a"])
    assert allowed == "it must be CSV: unexpected end of data; read up to line 5"


def test_a_quoted_field_may_be_cut_anywhere() -> None:
    text = 'custom_id,prompt\na,"one\ntwo\nthree"\nb,"four\nfive"\nc,six\n'
    for cut in range(1, len(text)):
        reader, rest, rows, lines = Reader(CATALOG, {"model": "alpha"}), b"", list[Row](), 0
        for part, final in ((text[:cut], False), (text[cut:], True)):
            rest += part.encode()
            read = reader.csv(rest, line=lines, final=final)
            assert read.errors == []
            rows, lines, rest = rows + read.rows, lines + read.lines, rest[read.used :]
        assert [json.loads(r.spec_json)["prompt"] for r in rows] == [
            "one\ntwo\nthree",
            "four\nfive",
            "six",
        ], cut
        assert (rest, lines) == (b"", 7)


# ------------------------------------------------------------------------------------------------ matrices


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a red circle", ["a red circle"]),
        ("a (red, blue) circle", ["a red circle", "a blue circle"]),
        ("(a,b) (c,d)", ["a c", "a d", "b c", "b d"]),
        ("(A,B)*C", ["A C", "B C"]),
        ("(A,B)*(C,D)", ["A C", "A D", "B C", "B D"]),
        ("(a,b)*2", ["a", "a", "b", "b"]),
        ("a (big,) dog", ["a big dog", "a  dog"]),
        (r"\(a,b\) (c\,d,e)", ["(a,b) c,d", "(a,b) e"]),
        ("(red)1.4 ball, (soft, round)1.2", ["(red)1.4 ball, (soft, round)1.2"]),
        ("(soft, round)++ ball", ["(soft, round)++ ball"]),
    ],
)
def test_groups_in_prompts_multiply(prompt: str, prompts: list[str]) -> None:
    assert expanded(prompt) == prompts


def test_a_short_matrix_does_not_come_to_more_text_than_memory_holds() -> None:
    long = "(a,b)" * 16 + "x" * 3900  # 65,536 prompts of 3,916 characters

    with pytest.raises(Invalid) as refused:
        Matrix({"prompt": long}, {}, CATALOG, most=1_000_000)
    with pytest.raises(Invalid) as together:
        Matrix({"prompt": ["(a,b)" * 11 + "x" * 4000] * 3}, {}, CATALOG, most=1_000_000)

    (fault,) = refused.value.faults
    assert fault.field == "matrix.prompt"
    assert fault.allowed.startswith("its groups come to 256638976 characters")
    assert together.value.faults[0].allowed == f"allowed are {MAX_TEXT} characters of all prompts"


@pytest.mark.parametrize(
    ("axes", "field", "value"),
    [
        ({"prompt": [""] * (MAX_PROMPTS + 1)}, "matrix.prompt", MAX_PROMPTS + 1),
        ({"prompt": "a", "size": [""] * (MAX_COMBINATIONS + 1)}, "matrix.size", MAX_COMBINATIONS + 1),
        ({"prompt": "a", **{f"axis{n}": n for n in range(50_000)}}, "matrix.axis0", 0),
    ],
)
def test_a_matrix_of_nothing_but_faults_is_told_a_few(axes: dict[str, Any], field: str, value: int) -> None:
    with pytest.raises(Invalid) as refused:
        Matrix(axes, {}, CATALOG, most=1_000_000)

    assert len(refused.value.faults) <= SHOWN
    assert (refused.value.faults[0].field, refused.value.faults[0].value) == (field, value)


def test_a_matrix_turns_seeds_fastest_and_prompts_slowest() -> None:
    axes = {"prompt": ["p", "q"], "model": ["alpha", "flat"], "steps": [4, 8], "seed": [1, 2], "count": 2}

    matrix = Matrix(axes, {}, CATALOG, most=100)

    assert matrix.count == 2 * 2 * 2 * 4
    rows = matrix.rows(0, 100)
    said = [(s["prompt"], s["model"], s["steps"], r.seed) for r in rows if (s := json.loads(r.spec_json))]
    assert said[:5] == [("p", "alpha", 4, 1), ("p", "alpha", 4, 2), ("p", "alpha", 4, 2), ("p", "alpha", 4, 3),
                        ("p", "alpha", 8, 1)]  # fmt: skip
    assert said[-1] == ("q", "flat", 8, 3)
    assert [r.print for r in matrix.rows(7, 5)] == [r.print for r in rows[7:12]]
    shown = [replace(spec) for spec, _ in matrix.shown(30, 2)]
    assert [s.to_json() for s in shown] == [json.loads(r.spec_json) for r in rows[30:32]]


def test_the_longest_name_is_taken() -> None:
    assert ndjson({**RED, "custom_id": "ü" * MAX_NAME}).errors == []
    with pytest.raises(ValidationError):
        Asked(prompt="a", custom_id="b")  # only a line has one
