"""What there is: nodes, models, the system."""

import platform
from typing import Any

from fastapi import APIRouter, Response
from pydantic import BaseModel

from farm import tickets
from farm.api.auth import Reader, Submitter
from farm.api.dialects.answers import Responses, answered
from farm.api.dialects.browsers import OwnPages
from farm.api.dialects.comfyui.errors import ERRORS, errors
from farm.api.dialects.comfyui.nodes import checkpoints, described, every, loras
from farm.api.dialects.served import translated
from farm.db import transaction
from farm.errors import NotFound
from farm.tickets import Dialect

VERSION = "0.3.0"  # of the API that is spoken

router = APIRouter(tags=["dialects"], route_class=translated(errors), dependencies=[OwnPages])

OBJECT: Responses = {200: {"content": {"application/json": {"schema": {"type": "object"}}}}}


class ComfySystem(BaseModel):
    """What serves."""

    system: dict[str, Any]
    devices: list[dict[str, Any]]


class ComfyRemaining(BaseModel):
    """How many of the account's own prompts have not ended."""

    exec_info: dict[str, int]


@router.get("/object_info", response_class=Response, responses={**OBJECT, **ERRORS()})
def list_comfy_nodes(caller: Reader) -> Response:
    """The nodes that are accepted, with what may be chosen."""
    with transaction() as db:
        uploads = tickets.input_names(db, caller.account_id)
    return answered({name: described(name, node) for name, node in every(uploads).items()})


@router.get("/object_info/{node_class}", response_class=Response, responses={**OBJECT, **ERRORS()})
def show_comfy_node(caller: Reader, node_class: str) -> Response:
    """A node that is accepted; nothing for any other."""
    with transaction() as db:
        uploads = tickets.input_names(db, caller.account_id)
    node = every(uploads).get(node_class)
    return answered({} if node is None else {node_class: described(node_class, node)})


@router.get("/system_stats", response_class=Response, responses={200: {"model": ComfySystem}, **ERRORS()})
def show_comfy_system(_caller: Reader) -> Response:
    """What serves: the farm, as one device."""
    device = dict.fromkeys(("vram_total", "vram_free", "torch_vram_total", "torch_vram_free"), 0)
    return answered(
        {
            "system": {
                "os": "posix",
                "ram_total": 0,
                "ram_free": 0,
                "comfyui_version": VERSION,
                "python_version": platform.python_version(),
                "pytorch_version": "",
                "embedded_python": False,
                "argv": [],
            },
            "devices": [{"name": "image-farm", "type": "farm", "index": 0, **device}],
        }
    )


@router.get("/prompt", response_class=Response, responses={200: {"model": ComfyRemaining}, **ERRORS()})
def show_comfy_remaining(caller: Reader) -> Response:
    """How many of the account's own prompts have not ended."""
    with transaction() as db:
        count = tickets.count_open(db, caller.account_id, Dialect.COMFYUI)
    return answered({"exec_info": {"queue_remaining": count}})


FOLDERS = {"checkpoints": checkpoints, "loras": loras}


@router.get("/models", response_class=Response, responses={200: {"model": list[str]}, **ERRORS()})
def list_comfy_folders(_caller: Reader) -> Response:
    """The kinds of models."""
    return answered(list(FOLDERS))


@router.get("/models/{folder}", response_class=Response, responses={200: {"model": list[str]}, **ERRORS(404)})
def list_comfy_models(_caller: Reader, folder: str) -> Response:
    """The models of a kind."""
    if folder not in FOLDERS:
        raise NotFound("there are checkpoints and loras")
    return answered(FOLDERS[folder]())


@router.get("/embeddings", response_class=Response, responses={200: {"model": list[str]}, **ERRORS()})
def list_comfy_embeddings(_caller: Reader) -> Response:
    """Embeddings: there are none."""
    return answered([])


@router.post("/free", response_class=Response, responses={200: {"content": {}}, **ERRORS(403)})
def free_comfy_memory(_caller: Submitter) -> Response:
    """Nothing: the farm's memory is not one account's to free."""
    return Response()
