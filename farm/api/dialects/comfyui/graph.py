"""From a graph in the API's format to what the farm renders: walked back from the nodes that save.

Each KSampler that something saved comes from is one spec; a batch is so many frames, whose seeds count up. Two nodes
that save the same images share them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from farm.api.dialects import emphasis, samplers
from farm.api.dialects.comfyui.errors import BadGraph, said
from farm.api.dialects.comfyui.inputs import Inputs, checked, short
from farm.api.dialects.comfyui.nodes import Node, model_file, takes_guidance_inside
from farm.api.dialects.served import model_named
from farm.catalog import Model
from farm.errors import FarmError, Invalid, NotFound
from farm.features import Given
from farm.spec import MAX_SEED

Loras = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Weights:
    """A MODEL, CLIP or VAE on its way: of which checkpoint, with which LoRAs; skip: layers left out."""

    model: Model
    loras: Loras = ()
    skip: int = 0


@dataclass(frozen=True, slots=True)
class Words:
    """A CONDITIONING: its text, the node that has it, and who encodes it."""

    text: str
    node: str
    clip: Weights
    guidance: float | None = None
    guided_by: str = ""


@dataclass(frozen=True, slots=True)
class Latent:
    """What a sampler starts from: nothing of a size, or an upload."""

    node: str
    width: int | None = None
    height: int | None = None
    batch: int = 1
    upload: str | None = None
    loader: str = ""


@dataclass(frozen=True, slots=True)
class Made:
    """A LATENT or IMAGE that a sampler makes."""

    sampler: str


@dataclass(frozen=True, slots=True)
class Loaded:
    """An IMAGE that was uploaded."""

    upload: str
    node: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """One sampler's frames: what is asked of the farm, and which node's input each field comes from."""

    sampler: str
    fields: Mapping[str, Any]
    places: Mapping[str, tuple[str, str]]
    count: int


@dataclass
class Plan:
    """All that a graph asks for, and what each node saves: the number of one of wanted."""

    wanted: list[Wanted] = field(default_factory=list)
    saves: dict[str, int] = field(default_factory=dict)


class Walk:
    """One graph, walked. uploads: the account's images by their names, as the farm names them, with their sizes."""

    def __init__(
        self, graph: Any, nodes: Mapping[str, Node], uploads: Callable[[str], tuple[str, Given]]
    ) -> None:
        self._graph = checked(graph, nodes)
        self._nodes = nodes
        self._uploads = uploads
        self._inputs = Inputs(self._graph, nodes, self._value)
        self.wrong = self._inputs.wrong
        self.give_up = self._inputs.give_up

    def plan(self) -> Plan:
        """Raises BadGraph."""
        outputs = [n for n, node in self._graph.items() if self._nodes[node["class_type"]].saves]
        if not outputs:
            raise BadGraph(said("prompt_no_outputs", "Prompt has no outputs"))
        plan, places = Plan(), dict[str, int]()
        for output in outputs:
            self._inputs.begin(output)
            made = self._inputs.read(output, "images", 0)
            if isinstance(made, Loaded):
                self._inputs.refuse(
                    output, "images", "an upload is not rendered here; save what a KSampler made"
                )
            if not isinstance(made, Made):
                continue
            if made.sampler not in places:
                wanted = self._sample(made.sampler)
                if wanted is None:
                    continue
                places[made.sampler] = len(plan.wanted)
                plan.wanted.append(wanted)
            plan.saves[output] = places[made.sampler]
        self.give_up()
        return plan

    # -------------------------------------------------------------------------------------------- nodes

    def _value(self, node: str, slot: int, deep: int) -> Any:
        """What comes out of a node; None if something before it is wrong."""
        kind = self._graph[node]["class_type"]
        values = {
            name: self._inputs.read(node, name, deep)
            for name in self._nodes[kind].takes
            if kind != "KSampler"  # it is read when it is known that its images are wanted
        }
        if any(v is None for v in values.values()):
            return None
        made = getattr(self, f"_of_{kind}")(node, **values)
        return made[slot] if isinstance(made, tuple) else made

    def _of_CheckpointLoaderSimple(self, node: str, *, ckpt_name: str) -> Any:  # noqa: N802
        try:
            found = Weights(model_named(model_file(ckpt_name)))
        except FarmError as e:
            self.wrong.add(
                node,
                "value_not_in_list",
                "Value not in list",
                f"ckpt_name: '{short(ckpt_name)}': {e.detail}",
                input_name="ckpt_name",
                received_value=short(ckpt_name),
            )
            return None, None, None
        return found, found, found

    def _of_LoraLoader(  # noqa: N802
        self,
        node: str,
        *,
        model: Weights,
        clip: Weights,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
    ) -> Any:
        if strength_model != strength_clip:
            self._inputs.refuse(node, "strength_clip", "the farm has one strength for both; send the model's")
            return None, None
        name = model_file(lora_name)
        if name not in model.model.loras:
            self.wrong.add(
                node,
                "value_not_in_list",
                "Value not in list",
                f"lora_name: '{short(lora_name)}' not in {list(model.model.loras)}",
                input_name="lora_name",
            )
            return None, None
        used = ((name, strength_model),)
        return (
            Weights(model.model, model.loras + used, model.skip),
            Weights(clip.model, clip.loras + used, clip.skip),
        )

    def _of_CLIPSetLastLayer(self, _node: str, *, clip: Weights, stop_at_clip_layer: int) -> Any:  # noqa: N802
        return Weights(clip.model, clip.loras, -1 - stop_at_clip_layer)

    def _of_CLIPTextEncode(self, node: str, *, text: str, clip: Weights) -> Any:  # noqa: N802
        return Words(text, node, clip)

    def _of_FluxGuidance(self, node: str, *, conditioning: Words, guidance: float) -> Any:  # noqa: N802
        return Words(conditioning.text, conditioning.node, conditioning.clip, guidance, node)

    def _of_EmptyLatentImage(self, node: str, *, width: int, height: int, batch_size: int) -> Any:  # noqa: N802
        return Latent(node, width, height, batch_size)

    _of_EmptySD3LatentImage = _of_EmptyLatentImage  # noqa: N815

    def _of_LoadImage(self, node: str, *, image: str) -> Any:  # noqa: N802
        return Loaded(image, node), None

    def _of_VAEEncode(self, node: str, *, pixels: Any, vae: Weights) -> Any:  # noqa: N802
        del vae
        if not isinstance(pixels, Loaded):
            self._inputs.refuse(node, "pixels", "only an upload can be started from: link a LoadImage")
            return None
        return Latent(node, upload=pixels.upload, loader=pixels.node)

    def _of_KSampler(self, node: str) -> Any:  # noqa: N802
        return Made(node)

    def _of_VAEDecode(self, _node: str, *, samples: Any, vae: Weights) -> Any:  # noqa: N802
        del vae
        if not isinstance(samples, Made):
            self._inputs.refuse(_node, "samples", "only what a KSampler made can be decoded")
            return None
        return samples

    # -------------------------------------------------------------------------------------------- samplers

    def _sample(self, node: str) -> Wanted | None:
        found = {name: self._inputs.read(node, name, 0) for name in self._nodes["KSampler"].takes}
        if any(v is None for v in found.values()):
            return None
        weights: Weights = found["model"]
        positive, negative, latent = found["positive"], found["negative"], found["latent_image"]
        model = weights.model
        if isinstance(latent, Made):
            self._inputs.refuse(
                node, "latent_image", "a second pass over what another KSampler made is not served"
            )
            return None
        for words, name in ((positive, "positive"), (negative, "negative")):
            if words.clip.model is not model or words.clip.loras != weights.loras:
                self._inputs.refuse(
                    node, name, "model and text have to come through the same checkpoint and LoRAs"
                )
        sampler = samplers.of_comfy(found["sampler_name"], found["scheduler"], model)
        if sampler is None:
            pairs = ", ".join(f"{k.comfy[0]}/{s}" for k in samplers.served_by(model) for s in k.comfy[1])
            self.wrong.add(
                node,
                "value_not_in_list",
                "Value not in list",
                f"sampler_name/scheduler: '{short(found['sampler_name'])}/{short(found['scheduler'])}' not in"
                f" {model.name}'s {pairs}",
                input_name="sampler_name",
            )
        texts = self._texts(positive, negative, model, guided=found["cfg"] != 1)
        if texts is None:
            return None
        return self._wanted(node, found, texts, sampler)

    def _texts(
        self, positive: Words, negative: Words, model: Model, *, guided: bool
    ) -> tuple[emphasis.Prompt, emphasis.Prompt] | None:
        """Both prompts in the farm's words; at cfg 1 the negative one has no say, as in ComfyUI."""
        said_there = Words("", negative.node, negative.clip) if not guided else negative
        read = []
        for words in (positive, said_there):
            try:
                read.append(emphasis.read(words.text, model, field="text", webui=False))
            except Invalid as e:
                self._inputs.refuse(words.node, "text", e.faults[0].allowed)
                return None
        return read[0], read[1]

    def _wanted(
        self,
        node: str,
        found: Mapping[str, Any],
        texts: tuple[emphasis.Prompt, emphasis.Prompt],
        sampler: str | None,
    ) -> Wanted | None:
        weights, positive, latent = found["model"], found["positive"], found["latent_image"]
        model: Model = weights.model
        prompt, negative = texts
        places = {
            "prompt": (positive.node, "text"),
            "negative_prompt": (found["negative"].node, "text"),
            "width": (latent.node, "width"),
            "height": (latent.node, "height"),
            "count": (latent.node, "batch_size"),
            "image": (latent.loader or latent.node, "image"),
            "steps": (node, "steps"),
            "guidance": (node, "cfg"),
            "sampler": (node, "sampler_name"),
            "seed": (node, "seed"),
            "strength": (node, "denoise"),
            "clip_skip": (positive.node, "clip"),
            "loras": (node, "model"),
            "prompt_weights": (positive.node, "text"),
        }
        guidance: float | None = found["cfg"]
        if takes_guidance_inside(model):
            if guidance != 1:
                self._inputs.refuse(node, "cfg", f"{model.name} is guided by FluxGuidance; cfg stays 1")
            guidance = positive.guidance
            places["guidance"] = (positive.guided_by or node, "guidance" if positive.guided_by else "cfg")
        elif positive.guidance is not None:
            self._inputs.refuse(
                positive.guided_by, "guidance", f"{model.name} is guided by the KSampler's cfg"
            )
        fields: dict[str, Any] = {
            "model": model.name,
            "prompt": prompt.text or " ",
            "negative_prompt": negative.text or None,
            "prompt_weights": (prompt.weighted or negative.weighted) or None,
            "seed": found["seed"] & MAX_SEED,
            "steps": found["steps"],
            "guidance": guidance,
            "sampler": sampler,
            "clip_skip": positive.clip.skip or None,
            "loras": [{"name": n, "scale": s} for n, s in weights.loras] or None,
            "count": latent.batch,
        }
        size = self._start(node, latent, found, fields)
        return None if size is None else Wanted(node, {**fields, **size}, places, latent.batch)

    def _start(
        self, node: str, latent: Latent, found: Mapping[str, Any], fields: dict[str, Any]
    ) -> Mapping[str, Any] | None:
        """Size, and the image to start from."""
        denoise: float = found["denoise"]
        if latent.upload is None:
            if denoise != 1:
                self._inputs.refuse(node, "denoise", "from an empty latent it has to be 1")
            return {"width": latent.width, "height": latent.height}
        try:
            name, given = self._uploads(latent.upload)
        except NotFound:
            self.wrong.add(
                latent.loader,
                "custom_validation_failed",
                "Custom validation failed for node",
                f"image - Invalid image file: {short(latent.upload)}",
                input_name="image",
            )
            return None
        if denoise <= 0:
            self._inputs.refuse(node, "denoise", "it has to be more than 0")
            return None
        # ComfyUI runs `steps` of a schedule of steps / denoise; the farm runs its share of a schedule
        model = found["model"].model
        fields["steps"] = min(model.steps.max, math.ceil(found["steps"] / denoise))
        return {
            "width": given.width // 8 * 8,
            "height": given.height // 8 * 8,
            "image": name,
            "strength": denoise,
        }
