"""What the families have in common: how a frame begins, is denoised with others, and is decoded."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar
from uuid import UUID

import torch
from diffusers.utils.torch_utils import randn_tensor

from farm.catalog import Model
from farm.errors import RenderFailed
from farm.spec import Spec
from workers.engine import Ask
from workers.engine.faults import judge
from workers.engine.featured import second_ask
from workers.engine.modes import Modes
from workers.engine.samplers import copied, fresh_sampler
from workers.engine.step import control, inputs
from workers.engine.step.loras import CONDITION, Mixed
from workers.engine.step.record import Record
from workers.engine.step.text import Encoded, TextCache

SAMPLERS_KEPT = 256  # prepared noise schedules, some KiB each


@dataclass(frozen=True, slots=True)
class Rows:
    """The input of one forward."""

    sample: torch.Tensor  # (rows, …)
    times: torch.Tensor  # (rows,), float32
    conditions: Mapping[str, torch.Tensor]  # each (rows, …)
    shape: Hashable


class Family(ABC):
    """A loaded pipeline, taken apart. Texts, sizes and files of a frame become a Record; nothing is kept of it."""

    init_scaled: ClassVar[bool] = (
        True  # whether the first noise is multiplied by the sampler's init_noise_sigma
    )
    # what this loop cannot do yet: such a frame is refused, not rendered without
    refused: ClassVar[frozenset[str]] = frozenset(
        {
            "image",
            "mask",
            "control",
            "loras",
            "hires",
            "upscale",
            "clip_skip",
            "prompt_weights",
            "long_prompt",
        }
    )

    def __init__(self, pipe: Any, model: Model, *, device: str) -> None:
        self.pipe = pipe
        self.model = model
        self.device = device
        self.text = TextCache()
        self.modes = Modes(pipe, model, device=device)
        self.loras = Mixed(pipe, self.denoiser, model, device=device)
        self._said: Hashable = None  # what decides, beside a text, how it is encoded just now
        self._words: Any = None
        self._sampler_config = pipe.scheduler.config
        self._samplers: OrderedDict[Hashable, Any] = OrderedDict()

    # ------------------------------------------------------------------------------------------ to begin

    def begin(self, frame: UUID, ask: Ask) -> Record:
        """Make a frame's record at its first step.

        Raises RenderFailed if it asks for what does not go step by step.
        """
        spec = ask.spec
        if unknown := sorted(name for name in self.refused if getattr(spec, name, None)):
            raise RenderFailed(f"{self.model.pipeline} does not take {', '.join(unknown)} step by step")
        generator = torch.Generator("cpu").manual_seed(ask.seed)
        height, width = self.size(spec)
        sampler = self.sampler(spec, height, width)
        started = self._start(ask, sampler, generator, height, width)
        times = sampler.timesteps[started.first :].tolist()
        conditions = self._conditions(ask, height, width, times)
        strict = spec.reproducible == "strict"
        names = tuple((name, tuple(c.shape[1:])) for name, c in conditions.items())
        two = len(spec.passes) > 1
        return Record(
            frame=frame,
            ask=ask,
            sampler=sampler,
            latents=started.latents,
            conditions=conditions,
            rows=self.rows(spec),
            guidance=spec.guidance,
            generator=generator,
            shape=(height, width, names, started.extra is not None, strict),
            height=height,
            width=width,
            first=started.first,
            after=started.after,
            extra=started.extra,
            following=self._second if two else None,
            steps_later=spec.passes[1].steps if two else 0,
            strict=strict,
        )

    def _start(
        self, ask: Ask, sampler: Any, generator: torch.Generator, height: int, width: int
    ) -> inputs.Start:
        if ask.inputs.image is None:
            latents = self.noise(generator, height, width)
            return inputs.Start(latents * sampler.init_noise_sigma if self.init_scaled else latents, 0)
        channels = self.pipe.vae.config.latent_channels
        return inputs.start(self.modes, ask, sampler, generator, channels=channels, dtype=self.dtype)

    def _second(self, record: Record) -> Record:
        """The second pass of a frame whose first has ended: from its image, made larger."""
        image = judge(self.decode(record))
        if isinstance(image, RenderFailed):
            raise image
        following = self.begin(record.frame, second_ask(record.ask, image))
        following.stage, following.steps_before = record.stage + 1, record.steps[0]
        return following

    def _conditions(
        self, ask: Ask, height: int, width: int, times: list[float]
    ) -> Mapping[str, torch.Tensor]:
        """Text, and what LoRAs and control images bring, by rows."""
        spec, rows = ask.spec, self.rows(ask.spec)
        more: dict[str, torch.Tensor] = {}
        if spec.loras:
            self.loras.load(ask)
        if self.loras.any:
            more[CONDITION] = self.loras.condition(ask, rows)
        if spec.control:
            more |= control.conditions(ask, self.modes, times, rows, dtype=self.dtype)
        with self.loras.in_text(ask) if spec.loras else nullcontext():
            self._said = (spec.loras, spec.clip_skip, spec.prompt_weights, spec.long_prompt)
            return {**self.conditions(spec, height, width), **more}

    def size(self, spec: Spec) -> tuple[int, int]:
        """Height and width, in pixels, of what is denoised."""
        return spec.height, spec.width

    def rows(self, spec: Spec) -> int:
        """Rows a frame takes in a forward."""
        return 2 if spec.guided and self.two_rows else 1

    @property
    def two_rows(self) -> bool:
        """Whether guidance is a second, unconditional row; distilled models have it embedded instead."""
        return True

    def sampler(self, spec: Spec, height: int, width: int) -> Any:
        """A sampler of this frame alone, at its first step."""
        key = (spec.sampler, spec.steps, height, width)
        if key not in self._samplers:
            prepared = fresh_sampler(spec.sampler, self._sampler_config, steps=spec.steps)
            # On the CPU, like its sigmas: a timestep on a GPU would be waited for in every step.
            prepared.set_timesteps(
                **{"num_inference_steps": spec.steps, **self.schedule(spec, height, width)}
            )
            self._samplers[key] = prepared
            if len(self._samplers) > SAMPLERS_KEPT:
                self._samplers.popitem(last=False)
        return copied(self._samplers[key])

    def schedule(self, spec: Spec, height: int, width: int) -> dict[str, Any]:
        """What set_timesteps takes beside the number of steps."""
        return {}

    def noise(self, generator: torch.Generator, height: int, width: int) -> torch.Tensor:
        """Noise in the shape of this family's latents, one frame."""
        scale = self.pipe.vae_scale_factor
        shape = (1, self.channels, height // scale, width // scale)
        noise: torch.Tensor = randn_tensor(
            shape, generator=generator, device=torch.device(self.device), dtype=self.dtype
        )
        return noise

    @property
    @abstractmethod
    def denoiser(self) -> Any:
        """The UNet or transformer."""

    @property
    def channels(self) -> int:
        """Of the latents."""
        channels: int = self.denoiser.config.in_channels
        return channels

    @property
    def dtype(self) -> torch.dtype:
        """Of the latents, which is that of the text."""
        dtype: torch.dtype = self.denoiser.dtype
        return dtype

    # ------------------------------------------------------------------------------------------ text

    def conditions(self, spec: Spec, height: int, width: int) -> dict[str, torch.Tensor]:
        """What goes into the forward beside latents and time, each (rows, …)."""
        if spec.clip_skip or spec.prompt_weights or spec.long_prompt:
            positive, negative = self._worded(spec)
        else:
            positive = self.encoded(spec.prompt)
            negative = self.negative(spec, positive) if self.rows(spec) > 1 else {}
        if self.rows(spec) == 1:
            return dict(positive)
        return {name: torch.cat([negative[name], positive[name]]) for name in positive}

    def negative(self, spec: Spec, positive: Encoded) -> Encoded:
        """The unconditional row."""
        return self.encoded(spec.negative_prompt)

    def encoded(self, text: str) -> Encoded:
        """One text through the text encoders, from the cache if it was there lately."""
        return self.text.get((text, self._said), lambda: self.encode(text))

    def _worded(self, spec: Spec) -> tuple[Encoded, Encoded]:
        """Both prompts where not the stock pipeline's way of reading them is asked for, of one length."""
        if self._words is None:
            from workers.engine.words import Words

            self._words = Words(self.pipe)
        key = ("words", spec.prompt, spec.negative_prompt, self._said)

        def both() -> Encoded:
            positive, negative = self._words.pair(spec)
            return {**positive, **{f"negative {name}": t for name, t in negative.items()}}

        found = self.text.get(key, both)
        negative = {n.removeprefix("negative "): t for n, t in found.items() if n.startswith("negative ")}
        return {name: found[name] for name in negative}, negative

    @abstractmethod
    def encode(self, text: str) -> Encoded:
        """One text through the text encoders."""

    # ------------------------------------------------------------------------------------------ the forward

    @abstractmethod
    def denoise(self, rows: Rows) -> torch.Tensor:
        """One forward. Returns what the denoiser predicts, (rows, …) as the latents."""

    # ------------------------------------------------------------------------------------------ to decode

    def decode(self, record: Record) -> torch.Tensor:
        """A frame's latents as an image, (3, height, width) in 0 … 1."""
        decoded = self._decoded(self.spatial(record.latents, record.height, record.width))
        return self._shown(self.resized(decoded, record.ask.spec))

    def picture(self, latents: torch.Tensor) -> torch.Tensor:
        """Spatial latents, (1, channels, height, width), as an image, (3, height, width) in 0 … 1."""
        return self._shown(self._decoded(latents))

    def _decoded(self, latents: torch.Tensor) -> torch.Tensor:
        vae = self.pipe.vae
        decoded: torch.Tensor = vae.decode(self.unscaled(latents.to(vae.dtype)), return_dict=False)[0]
        return decoded

    def _shown(self, decoded: torch.Tensor) -> torch.Tensor:
        image: torch.Tensor = self.pipe.image_processor.postprocess(decoded, output_type="pt")
        return image[0]

    def spatial(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Latents of an image of this size as (1, channels, height, width)."""
        return latents

    def unscaled(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the VAE takes them."""
        scaled: torch.Tensor = latents / self.pipe.vae.config.scaling_factor
        return scaled

    def resized(self, image: torch.Tensor, spec: Spec) -> torch.Tensor:
        """The image in the size that was asked for."""
        return image


def guidance_embedding(
    pipe: Any, guidance: float, unet: Any, *, dtype: torch.dtype, device: str
) -> torch.Tensor:
    """The row with which a distilled UNet (LCM) is told the guidance, (1, time_cond_proj_dim)."""
    scale = torch.tensor([guidance - 1])
    embedding: torch.Tensor = pipe.get_guidance_scale_embedding(
        scale, embedding_dim=unet.config.time_cond_proj_dim
    )
    return embedding.to(device=device, dtype=dtype)
