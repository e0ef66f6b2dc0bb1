"""`farm submit --image …` and `farm inputs`, against a real API."""

import json
from pathlib import Path

from tests.test_cli import Command, command, farm, url
from tests.test_inputs import file

__all__ = ["command", "farm", "url"]  # fixtures


def test_files_are_sent_once_and_named_in_the_spec(farm: Command, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(file("red"))
    (tmp_path / "hole.png").write_bytes(file("white"))

    sent = farm(
        "submit", "a circle", "a square", "--image", str(tmp_path / "photo.png"), "--mask", str(tmp_path / "hole.png"),
        "--strength", "0.5", "--upscale", "2", "--strict", "--json",
    )  # fmt: skip

    assert sent.code == 0, sent.err
    frames = json.loads(farm("frames", json.loads(sent.out)["id"], "--json").out)
    inputs = json.loads(farm("inputs", "--json").out)
    assert len(inputs) == 2
    assert {i["jobs"] for i in inputs} == {1}
    hashes = {f"sha256:{i['sha256']}" for i in inputs}
    for frame in frames:
        spec = frame["spec"]
        assert {spec["image"], spec["mask"]} == hashes
        assert (spec["strength"], spec["upscale"]["factor"], spec["reproducible"]) == (0.5, 2.0, "strict")
    assert farm("inputs", "--delete", inputs[0]["id"]).code == 1


def test_inputs_are_sent_listed_and_removed(farm: Command, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(file("red", size=(80, 48)))

    (made,) = json.loads(farm("inputs", str(path), "--json").out)

    assert "80x48" in farm("inputs").out
    assert farm("inputs", "--delete", made["id"]).code == 0
    assert json.loads(farm("inputs", "--json").out) == []


def test_what_is_wrong_is_said_before_anything_is_sent(farm: Command, tmp_path: Path) -> None:
    missing = farm("submit", "a", "--image", str(tmp_path / "none.png"))
    control = farm("submit", "a", "--control", "canny")
    scale = farm("submit", "a", "--lora", "ink@much")
    unknown = farm("submit", "a", "--lora", "ink@0.5")

    assert (missing.code, control.code, scale.code, unknown.code) == (2, 2, 2, 1)
    shown = missing.err.replace("│", "").replace("\n", "").replace(" ", "")  # however it is wrapped
    assert "none.png" in shown
    assert "NET=IMAGE" in control.err
    assert "spec.loras[0].name" in unknown.err
