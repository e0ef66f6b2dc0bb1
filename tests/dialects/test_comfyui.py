"""ComfyUI, as its own example scripts speak to it: urllib, websocket-client, a graph in the API's format."""

import copy
import io
import json
import random
import threading
import urllib.error
import urllib.parse
import urllib.request
import uuid
from contextlib import suppress
from typing import Any

import httpx
import pytest
import websocket
from PIL import Image

from tests.dialects.conftest import RED, RunningFarm
from tests.dialects.front import busy

pytestmark = pytest.mark.xdist_group("dialects")

GRAPH: dict[str, Any] = {
    "3": {
        "class_type": "KSampler",
        "inputs": {
            "cfg": 4, "denoise": 1, "latent_image": ["5", 0], "model": ["4", 0], "negative": ["7", 0],
            "positive": ["6", 0], "sampler_name": "euler", "scheduler": "normal", "seed": 8566257, "steps": 4,
        },
    },
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "starter.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"batch_size": 1, "height": 64, "width": 64}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": RED}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "a square"}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
}  # fmt: skip
PAUSE = threading.Event()
NATIVE = {"negative_prompt": "a square", "steps": 4, "guidance": 4.0, "sampler": "euler"}


def graph(**inputs: Any) -> dict[str, Any]:
    """The graph with other inputs: n3_seed=5 is the seed of node 3."""
    made = copy.deepcopy(GRAPH)
    for place, value in inputs.items():
        node, _, name = place[1:].partition("_")
        made[node]["inputs"][name] = value
    return made


def new_seed() -> int:
    """One that no image was made of: those are known."""
    return random.getrandbits(62)


class Script:
    """What the example scripts do, line for line but for the address."""

    def __init__(self, server_address: str) -> None:
        self.server_address = server_address
        self.client_id = str(uuid.uuid4())

    def queue_prompt(self, prompt: dict[str, Any], **more: Any) -> dict[str, Any]:
        p = {"prompt": prompt, "client_id": self.client_id, **more}
        data = json.dumps(p).encode("utf-8")
        req = urllib.request.Request(f"http://{self.server_address}/prompt", data=data)
        return dict(json.loads(urllib.request.urlopen(req).read()))

    def get_image(self, filename: str, subfolder: str, folder_type: str) -> bytes:
        data = {"filename": filename, "subfolder": subfolder, "type": folder_type}
        url_values = urllib.parse.urlencode(data)
        with urllib.request.urlopen(f"http://{self.server_address}/view?{url_values}") as response:
            return bytes(response.read())

    def get_history(self, prompt_id: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://{self.server_address}/history/{prompt_id}") as response:
            return dict(json.loads(response.read()))

    def connect(self) -> websocket.WebSocket:
        ws = websocket.WebSocket()
        ws.connect(f"ws://{self.server_address}/ws?clientId={self.client_id}", timeout=60)
        return ws

    def get_images(
        self, ws: websocket.WebSocket, prompt: dict[str, Any], said: list[Any] | None = None, **more: Any
    ) -> dict[str, list[bytes]]:
        prompt_id = self.queue_prompt(prompt, **more)["prompt_id"]
        output_images: dict[str, list[bytes]] = {}
        while True:
            out = ws.recv()
            if said is not None:
                said.append(out)
            if isinstance(out, str):
                message = json.loads(out)
                if message["type"] == "executing":
                    data = message["data"]
                    if data["node"] is None and data["prompt_id"] == prompt_id:
                        break
        history = self.get_history(prompt_id)[prompt_id]
        for node_id, node_output in history["outputs"].items():
            output_images[node_id] = [
                self.get_image(image["filename"], image["subfolder"], image["type"])
                for image in node_output.get("images", [])
            ]
        return output_images


@pytest.fixture
def script(farm: RunningFarm) -> Script:
    return Script(f"{farm.url.removeprefix('http://')}/k/{farm.api_key}")


def rgb(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def ended(script: Script, prompt_id: str) -> dict[str, Any]:
    """A prompt's entry in the history, once it is there."""
    for _ in range(600):
        found = script.get_history(prompt_id)
        if found:
            return dict(found[prompt_id])
        PAUSE.wait(0.1)
    raise AssertionError(f"{prompt_id} does not end")


def refused(script: Script, prompt: dict[str, Any], **more: Any) -> dict[str, Any]:
    with pytest.raises(urllib.error.HTTPError) as error:
        script.queue_prompt(prompt, **more)
    assert error.value.code == 400
    return dict(json.loads(error.value.read()))


def test_the_example_script_gets_the_images_of_the_native_api(farm: RunningFarm, script: Script) -> None:
    said: list[Any] = []
    ws, bystander = script.connect(), Script(script.server_address).connect()
    images = script.get_images(ws, graph(n5_batch_size=2), said)
    ws.close()
    bystander.settimeout(0.5)
    others = []
    with suppress(websocket.WebSocketTimeoutException):
        while True:
            others.append(json.loads(bystander.recv())["type"])
    bystander.close()

    assert [rgb(i) for i in images["9"]] == [rgb(i) for i in farm.native(seed=8566257, count=2, **NATIVE)]
    kinds = [json.loads(s)["type"] for s in said if isinstance(s, str)]
    assert kinds[0] == "status"
    assert set(others) == {"status"}
    order = ["execution_start", "execution_cached", "executing", "executed", "execution_success", "executing"]
    assert [k for k in dict.fromkeys(kinds) if k in order] == list(dict.fromkeys(order))
    assert kinds.index("executed") < kinds.index("execution_success")


def test_images_come_over_the_socket_where_that_is_asked_for(farm: RunningFarm, script: Script) -> None:
    prompt = graph(n3_seed=3)
    prompt["live"] = {"class_type": "SaveImageWebsocket", "inputs": {"images": ["8", 0]}}
    said: list[Any] = []

    ws = script.connect()
    script.get_images(ws, prompt, said)
    ws.close()

    (image,) = [s for s in said if isinstance(s, bytes)]
    assert image[:8] == b"\0\0\0\1\0\0\0\2"
    assert rgb(image[8:]) == rgb(farm.native(seed=3, **NATIVE)[0])


def test_several_samplers_and_savers_in_one_graph(farm: RunningFarm, script: Script) -> None:
    prompt = graph(n9_filename_prefix="cats/first")
    prompt["13"] = copy.deepcopy(prompt["3"])
    prompt["13"]["inputs"] |= {"seed": 5, "sampler_name": "dpmpp_2m", "scheduler": "karras"}
    prompt["18"] = {"class_type": "VAEDecode", "inputs": {"samples": ["13", 0], "vae": ["4", 2]}}
    prompt["19"] = {"class_type": "PreviewImage", "inputs": {"images": ["18", 0]}}
    prompt["20"] = {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "again"}}

    entry = ended(script, script.queue_prompt(prompt)["prompt_id"])

    first, preview, again = (entry["outputs"][n]["images"] for n in ("9", "19", "20"))
    assert (first[0]["subfolder"], first[0]["type"], preview[0]["type"]) == ("cats", "output", "temp")
    assert first[0]["filename"].startswith("first_")
    assert script.get_image(**_args(first[0])) == script.get_image(**_args(again[0]))
    native = farm.native(seed=5, **{**NATIVE, "sampler": "dpm++2m-karras"})
    assert rgb(script.get_image(**_args(preview[0]))) == rgb(native[0])
    assert entry["status"]["status_str"] == "success"
    assert entry["prompt"][2] == prompt


def _args(image: dict[str, str]) -> dict[str, str]:
    return {"filename": image["filename"], "subfolder": image["subfolder"], "folder_type": image["type"]}


def test_an_upload_is_started_from_by_its_name(farm: RunningFarm, script: Script) -> None:
    start = farm.native(seed=5, steps=4)[0]
    url = f"http://{script.server_address}"
    with httpx.Client(trust_env=False) as client:
        first = client.post(f"{url}/upload/image", files={"image": ("my cat.png", start)}).json()
        same = client.post(f"{url}/upload/image", files={"image": ("my cat.png", start)}).json()
        other = client.post(
            f"{url}/upload/image", files={"image": ("my cat.png", farm.native(seed=6)[0])}
        ).json()
        listed = client.get(f"{url}/object_info/LoadImage").json()
    prompt = graph(n3_latent_image=["12", 0], n3_denoise=0.5, n3_seed=9)
    prompt["11"] = {"class_type": "LoadImage", "inputs": {"image": first["name"]}}
    prompt["12"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["11", 0], "vae": ["4", 2]}}
    del prompt["5"]

    entry = ended(script, script.queue_prompt(prompt)["prompt_id"])

    (image,) = entry["outputs"]["9"]["images"]
    kept = farm.api.post("/v1/inputs", content=start, headers={"Content-Type": "image/png"}).json()["id"]
    native = farm.native(seed=9, image=kept, strength=0.5, **{**NATIVE, "steps": 8})
    assert rgb(script.get_image(**_args(image))) == rgb(native[0])
    assert (first["name"], same["name"], other["name"]) == ("my cat.png", "my cat.png", "my cat (1).png")
    assert "my cat.png" in listed["LoadImage"]["input"]["required"]["image"][0]
    assert script.get_image("my cat.png", "", "input") == start
    prompt["11"]["inputs"]["image"] = "nothing.png"
    assert "Invalid image file: nothing.png" in str(refused(script, prompt)["node_errors"]["11"])


def test_other_nodes_are_refused_by_name(script: Script) -> None:
    prompt = graph()
    prompt["30"] = {"class_type": "UltimateSDUpscale", "inputs": {"image": ["8", 0]}}

    answer = refused(script, prompt)

    assert answer["error"]["message"] == "Cannot execute because node UltimateSDUpscale does not exist."
    assert answer["node_errors"]["30"]["class_type"] == "UltimateSDUpscale"


@pytest.mark.parametrize(
    ("changed", "node", "kind"),
    [
        ({"n3_sampler_name": "res_multistep"}, "3", "value_not_in_list"),
        ({"n3_steps": 0}, "3", "value_smaller_than_min"),
        ({"n3_steps": 500}, "3", "custom_validation_failed"),
        ({"n3_cfg": "much"}, "3", "invalid_input_type"),
        ({"n3_cfg": 10**400}, "3", "invalid_input_type"),
        ({"n3_model": ["6", 0]}, "3", "return_type_mismatch"),
        ({"n3_positive": ["99", 0]}, "3", "bad_linked_input"),
        ({"n3_denoise": 0.5}, "3", "custom_validation_failed"),
        ({"n3_latent_image": ["3", 0]}, "3", "custom_validation_failed"),
        ({"n4_ckpt_name": "dreamer.safetensors"}, "4", "value_not_in_list"),
        ({"n5_width": 512}, "5", "custom_validation_failed"),
        ({"n6_text": 7}, "6", "invalid_input_type"),
        ({"n9_filename_prefix": "../../etc/passwd"}, "9", "custom_validation_failed"),
    ],
)
def test_what_is_wrong_is_said_of_its_node(
    script: Script, changed: dict[str, Any], node: str, kind: str
) -> None:
    answer = refused(script, graph(**changed))

    assert answer["error"]["type"] == "prompt_outputs_failed_validation"
    assert [e["type"] for e in answer["node_errors"][node]["errors"]] == [kind]
    assert answer["node_errors"][node]["dependent_outputs"] == ["9"]


def test_of_several_samplers_the_right_one_is_blamed(script: Script) -> None:
    prompt = graph()
    prompt["13"] = {**prompt["3"], "inputs": {**prompt["3"]["inputs"], "positive": ["16", 0]}}
    prompt["16"] = {"class_type": "CLIPTextEncode", "inputs": {"clip": ["4", 1], "text": "x" * 5000}}
    prompt["18"] = {"class_type": "VAEDecode", "inputs": {"samples": ["13", 0], "vae": ["4", 2]}}
    prompt["19"] = {"class_type": "PreviewImage", "inputs": {"images": ["18", 0]}}

    answer = refused(script, prompt)

    assert list(answer["node_errors"]) == ["16"]
    assert answer["node_errors"]["16"]["dependent_outputs"] == ["19"]


def test_what_is_no_graph_is_refused(script: Script) -> None:
    assert refused(script, {})["error"]["type"] == "no_prompt"
    assert refused(script, {"4": GRAPH["4"]})["error"]["type"] == "prompt_no_outputs"
    assert refused(script, {"4": {"inputs": {}}})["error"]["type"] == "invalid_prompt"
    assert "front" in refused(script, graph(), front=True)["error"]["message"]


def test_the_queue_is_ones_own_and_so_is_what_is_dropped(farm: RunningFarm, script: Script) -> None:
    stranger = Script(f"{farm.url.removeprefix('http://')}/k/{farm.stranger_key}")
    url, theirs_url = (f"http://{s.server_address}" for s in (script, stranger))
    ws = script.connect()
    with httpx.Client(trust_env=False) as client, busy(farm):
        mine = script.queue_prompt(graph(n3_seed=new_seed()))["prompt_id"]
        theirs = stranger.queue_prompt(graph(n3_seed=new_seed()))["prompt_id"]
        queue = client.get(f"{url}/queue").json()
        client.post(f"{theirs_url}/queue", json={"delete": [mine]})
        client.post(f"{theirs_url}/interrupt")
        left = client.get(f"{url}/queue").json()
        client.post(f"{url}/queue", json={"clear": True})
        emptied = client.get(f"{url}/queue").json()
        entry = script.get_history(mine)[mine]

    assert [i[1] for i in queue["queue_pending"]] == [mine]
    assert left == queue
    assert emptied == {"queue_running": [], "queue_pending": []}
    assert entry["status"]["status_str"] == "error"
    assert entry["status"]["messages"][-1][0] == "execution_interrupted"
    seen = ""
    while seen != "execution_interrupted":
        seen = json.loads(ws.recv())["type"]
    ws.close()
    assert ended(stranger, theirs)["status"]["completed"]


def test_an_id_of_ones_own_is_queued_once(script: Script) -> None:
    name = str(uuid.uuid4())
    first = script.queue_prompt(graph(n3_seed=1), prompt_id=name)
    again = script.queue_prompt(graph(n3_seed=1), prompt_id=name)

    assert first == again
    assert first["prompt_id"] == name
    assert ended(script, name)["outputs"]["9"]["images"]


def test_what_is_unknown_is_never_done(farm: RunningFarm, script: Script) -> None:
    stranger = Script(f"{farm.url.removeprefix('http://')}/k/{farm.stranger_key}")
    mine = script.queue_prompt(graph(n3_seed=2))["prompt_id"]
    (image,) = ended(script, mine)["outputs"]["9"]["images"]

    assert stranger.get_history(mine) == {}
    assert script.get_history(str(uuid.uuid4())) == {}
    with pytest.raises(urllib.error.HTTPError) as error:
        stranger.get_image(**_args(image))
    assert error.value.code == 404
    url = f"http://{script.server_address}/history"
    with httpx.Client(trust_env=False) as client:
        assert mine not in client.get(f"http://{stranger.server_address}/history").json()
        assert list(client.get(url, params={"max_items": 1}).json()) == [mine]
        client.post(url, json={"delete": [mine]})
        assert mine not in client.get(url).json()


def test_what_there_is_is_listed_and_api_before_it_serves_too(script: Script) -> None:
    url = f"http://{script.server_address}"
    with httpx.Client(trust_env=False) as client:
        nodes = client.get(f"{url}/api/object_info").json()
        stats = client.get(f"{url}/system_stats").json()
        models = client.get(f"{url}/models/checkpoints").json()

    assert nodes["KSampler"]["input"]["required"]["seed"][1]["max"] == 2**64 - 1
    assert nodes["SaveImage"]["output_node"] is True
    assert stats["devices"]
    assert "starter.safetensors" in models


def test_a_socket_needs_a_key_and_no_log_has_it(farm: RunningFarm, script: Script) -> None:
    address = farm.url.removeprefix("http://")
    with pytest.raises(websocket.WebSocketBadStatusException) as refusal:
        websocket.create_connection(f"ws://{address}/ws?clientId=x", timeout=10)
    ws = script.connect()
    assert json.loads(ws.recv())["data"]["sid"] == script.client_id
    ws.close()

    assert refusal.value.status_code == 401
    said = "".join(p.read_text(errors="replace") for p in (farm.data / "logs").iterdir())
    assert "WebSocket /ws?clientId=" in said
    assert farm.api_key[40:] not in said
