"""What the web UI's clients send, and what the farm is asked for."""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from farm.api.dialects import emphasis, samplers
from farm.api.dialects.served import (
    model_named,
)
from farm.catalog import Model
from farm.errors import Fault, Invalid
from farm.spec import Format
from farm.styles import STYLES

MOST = 32  # images of a request: they are one answer


Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Words = Annotated[str, Field(strict=True, max_length=20_000)]
Blur = Annotated[int, Field(strict=True, ge=0, le=64)]
Flag = Annotated[bool, Field(strict=True)]
YesNo = Flag | Annotated[int, Field(strict=True, ge=0, le=1)]


class Txt2Img(BaseModel):
    """Text to image, as the web UI's clients send it; null is as good as left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Words | None = None
    negative_prompt: Words | None = None
    styles: list[Words] | None = None
    seed: Whole | None = Field(None, description="-1: any")
    sampler_name: Words | None = None
    sampler_index: Words | None = Field(None, description="as sampler_name, which comes first")
    scheduler: Words | None = None
    batch_size: Annotated[int, Field(strict=True, ge=1, le=MOST)] | None = None
    n_iter: Annotated[int, Field(strict=True, ge=1, le=MOST)] | None = None
    steps: Whole | None = None
    cfg_scale: Number | None = None
    width: Whole | None = None
    height: Whole | None = None
    denoising_strength: Number | None = None
    override_settings: dict[str, Any] | None = None
    enable_hr: Flag | None = None
    hr_scale: Number | None = None
    hr_upscaler: Words | None = None
    hr_second_pass_steps: Whole | None = None
    hr_resize_x: Whole | None = None
    hr_resize_y: Whole | None = None
    send_images: Flag | None = None
    force_task_id: Words | None = None
    # what the farm has not, and takes where it means nothing
    restore_faces: Any = None
    tiling: Any = None
    subseed: Any = None
    subseed_strength: Any = None
    seed_resize_from_h: Any = None
    seed_resize_from_w: Any = None
    eta: Any = None
    s_churn: Any = None
    s_tmax: Any = None
    s_tmin: Any = None
    s_noise: Any = None
    s_min_uncond: Any = None
    script_name: Any = None
    script_args: Any = None
    alwayson_scripts: Any = None
    hr_checkpoint_name: Any = None
    hr_sampler_name: Any = None
    hr_scheduler: Any = None
    hr_prompt: Any = None
    hr_negative_prompt: Any = None
    firstphase_width: Any = None
    firstphase_height: Any = None
    refiner_checkpoint: Any = None
    refiner_switch_at: Any = None
    infotext: Any = None
    # of the vendor's own disk
    do_not_save_samples: Any = None
    do_not_save_grid: Any = None
    save_images: Any = None
    override_settings_restore_afterwards: Any = None
    disable_extra_networks: Any = None
    comments: Any = None

    def has(self, name: str) -> Any:
        return getattr(self, name, None)


class Img2Img(Txt2Img):
    """Image to image, and with a mask inpainting."""

    init_images: list[Annotated[str, Field(strict=True)]] | None = None
    mask: Annotated[str, Field(strict=True)] | None = None
    include_init_images: Flag | None = None
    resize_mode: Whole | None = None
    inpainting_fill: Whole | None = Field(
        None, description="0: from what surrounds it; 1: from what is there"
    )
    inpaint_full_res: YesNo | None = Field(
        None, description="paint the part around the mask at the full size; true if left out"
    )
    inpaint_full_res_padding: Annotated[int, Field(strict=True, ge=0, le=256)] | None = Field(
        None, description="pixels of the image around that part"
    )
    inpainting_mask_invert: YesNo | None = None
    mask_blur: Blur | None = Field(None, description="pixels; 4 if left out")
    mask_blur_x: Blur | None = None
    mask_blur_y: Blur | None = None
    mask_round: Any = None
    initial_noise_multiplier: Any = None
    image_cfg_scale: Any = None
    latent_mask: Any = None


NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
# what each field may say besides, while it asks for nothing
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "restore_faces": (),
    "tiling": (),
    "subseed": (-1,),
    "subseed_strength": (),
    "seed_resize_from_h": (-1,),
    "seed_resize_from_w": (-1,),
    "eta": (1, 1.0),
    "s_churn": (),
    "s_tmax": (),
    "s_tmin": (),
    "s_noise": (1, 1.0),
    "s_min_uncond": (),
    "script_name": ("None",),
    "script_args": (),
    "alwayson_scripts": (),
    "refiner_checkpoint": ("None",),
    "infotext": (),
    "initial_noise_multiplier": (1, 1.0),
    "latent_mask": (),
}
OF_HIRES: Mapping[str, tuple[Any, ...]] = {
    "hr_checkpoint_name": ("Use same checkpoint",),
    "hr_sampler_name": ("Use same sampler",),
    "hr_scheduler": ("Use same scheduler",),
    "hr_prompt": (),
    "hr_negative_prompt": (),
    "firstphase_width": (),
    "firstphase_height": (),
}
UPSCALERS = ("None", "Lanczos")
SETTINGS = ("sd_model_checkpoint", "CLIP_stop_at_last_layers", "samples_format", "jpeg_quality")
FORMATS = {"png": Format.PNG, "jpg": Format.JPEG, "jpeg": Format.JPEG, "webp": Format.WEBP}
NAMES = {
    "guidance": "cfg_scale",
    "sampler": "sampler_name",
    "strength": "denoising_strength",
    "image": "init_images",
    "count": "batch_size",
    "model": "override_settings.sd_model_checkpoint",
    "clip_skip": "override_settings.CLIP_stop_at_last_layers",
    "loras": "prompt",
    "upscale": "enable_hr",
    "hires": "enable_hr",
    "style": "styles",
}


def checkpoint_of(name: Any) -> Model:
    """The model a checkpoint's name or title means. Raises Invalid, UnknownModel."""
    if name is not None and not isinstance(name, str):
        raise Invalid([Fault("override_settings.sd_model_checkpoint", name, "it must be text")])
    plain = re.sub(r"\s*\[[0-9a-f]*\]$", "", name or "")
    return model_named(plain.removesuffix(".safetensors").removesuffix(".ckpt"))


def title_of(model: Model) -> str:
    return f"{model.name}.safetensors [{hash_of(model)}]"


def hash_of(model: Model) -> str:
    """Ten letters that change with the checkpoint."""
    plain = re.sub(r"[^0-9a-f]", "", model.revision.lower())
    return plain[:10].ljust(10, "0")


def spec_of(asked: Txt2Img) -> tuple[dict[str, Any], Model]:
    """What the farm is asked for, and of which model. Raises Invalid naming each field that is refused."""
    chosen = asked.override_settings or {}
    faults = [
        Fault(f"override_settings.{name}", value, f"allowed are {', '.join(SETTINGS)}")
        for name, value in chosen.items()
        if name not in SETTINGS
    ]
    faults += _asked_in_vain(asked, NEUTRAL)
    hires = bool(asked.enable_hr) and not isinstance(asked, Img2Img)
    if hires:
        faults += _asked_in_vain(asked, OF_HIRES)
        if asked.hr_upscaler not in (None, *UPSCALERS):
            faults.append(Fault("hr_upscaler", asked.hr_upscaler, f"allowed are {', '.join(UPSCALERS)}"))
    init = asked.init_images if isinstance(asked, Img2Img) else None
    mask = asked.mask if isinstance(asked, Img2Img) else None
    if isinstance(asked, Img2Img):
        faults += _faults_of_images(asked)
    styles = [s for s in asked.styles or [] if s and s != "None"]
    if len(styles) > 1 or any(s not in STYLES for s in styles):
        faults.append(Fault("styles", ", ".join(styles), f"allowed is one of {', '.join(STYLES)}"))
    if (asked.batch_size or 1) * (asked.n_iter or 1) > MOST:
        faults.append(Fault("n_iter", asked.n_iter, f"allowed are {MOST} images, batch_size times n_iter"))
    if faults:
        raise Invalid(faults)
    model = checkpoint_of(chosen.get("sd_model_checkpoint"))
    prompt = emphasis.read(asked.prompt or "", model, field="prompt", webui=True)
    negative = emphasis.read(asked.negative_prompt or "", model, field="negative_prompt", webui=True)
    weighted = prompt.weighted or negative.weighted
    return {
        "model": model.name,
        "prompt": prompt.text or " ",
        "negative_prompt": negative.text,
        "style": styles[0] if styles else None,
        "prompt_weights": weighted or None,
        "loras": [{"name": n, "scale": s} for n, s in (*prompt.loras, *negative.loras)] or None,
        "width": asked.width,
        "height": asked.height,
        "steps": asked.steps,
        "guidance": asked.cfg_scale,
        "sampler": samplers.of_webui(asked.sampler_name or asked.sampler_index, asked.scheduler, model),
        "seed": None if asked.seed in (None, -1) else asked.seed,
        "count": (asked.batch_size or 1) * (asked.n_iter or 1),
        "image": _ref(init[0]) if init else None,
        "mask": _ref(mask) if mask else None,
        "strength": (0.75 if asked.denoising_strength is None else asked.denoising_strength)
        if init
        else None,
        **_hires(asked, hires=hires),
        **_settings(chosen),
    }, model


def _asked_in_vain(asked: Txt2Img, neutral: Mapping[str, tuple[Any, ...]]) -> list[Fault]:
    def is_nothing(value: Any, words: tuple[Any, ...]) -> bool:
        return any(type(value) is type(n) and value == n for n in (*NOTHING, 0.0, *words))

    return [
        Fault(name, asked.has(name), "the farm has nothing of the kind; leave it out")
        for name, words in neutral.items()
        if not is_nothing(asked.has(name), words)
    ]


def _faults_of_images(asked: Img2Img) -> list[Fault]:
    faults = []
    if not asked.init_images or len(asked.init_images) != 1:
        faults.append(Fault("init_images", len(asked.init_images or []), "send one image, as base64"))
    if asked.resize_mode not in (None, 0, 1):
        faults.append(
            Fault("resize_mode", asked.resize_mode, "allowed is 1: cut to the shape; 0 where it fits")
        )
    if asked.mask is not None and asked.inpainting_fill not in (None, 0, 1):
        faults.append(Fault("inpainting_fill", asked.inpainting_fill, "allowed are 0, fill, and 1, original"))
    return faults


def _hires(asked: Txt2Img, *, hires: bool) -> dict[str, Any]:
    if not hires:
        return {}
    said: dict[str, Any] = {"strength": asked.denoising_strength or 0.7}
    if asked.hr_second_pass_steps:
        said["steps"] = asked.hr_second_pass_steps
    if asked.hr_resize_x or asked.hr_resize_y:
        return {"hires": {**said, "width": asked.hr_resize_x or 0, "height": asked.hr_resize_y or 0}}
    return {"upscale": {**said, "factor": asked.hr_scale or 2.0}}


def _settings(chosen: Mapping[str, Any]) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if (kind := chosen.get("samples_format")) is not None:
        if str(kind).lower() not in FORMATS:
            raise Invalid(
                [Fault("override_settings.samples_format", kind, f"allowed are {', '.join(FORMATS)}")]
            )
        said["format"] = FORMATS[str(kind).lower()]
        if said["format"] is not Format.PNG:
            said["quality"] = chosen.get("jpeg_quality")
    if (layers := chosen.get("CLIP_stop_at_last_layers")) is not None:
        if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= 12:
            raise Invalid(
                [Fault("override_settings.CLIP_stop_at_last_layers", layers, "allowed are 1 to 12")]
            )
        said["clip_skip"] = layers - 1 or None
    return said


def _ref(text: str) -> str:
    """The image as the farm names it: base64 alone is a data URL too, with or without line ends."""
    text = "".join(text.split())
    if text.startswith(("data:", "https://", "http://", "sha256:", "inp_")):
        return text
    return f"data:;base64,{text}"
