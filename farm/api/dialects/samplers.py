"""What AUTOMATIC1111, ComfyUI and Replicate call the farm's samplers."""

from collections.abc import Sequence
from dataclasses import dataclass

from farm.catalog import Model
from farm.errors import Fault, Invalid

ANY = "automatic"


@dataclass(frozen=True, slots=True)
class Known:
    """One of the farm's samplers: the names others have for it, each with the schedules it stands for."""

    sampler: str
    webui: tuple[str, tuple[str, ...]]
    comfy: tuple[str, tuple[str, ...]]
    replicate: str = ""


# of one name the first is what a schedule that is left open means, as in AUTOMATIC1111
TABLE = (
    Known("dpm++2m-karras", ("DPM++ 2M", ("karras",)), ("dpmpp_2m", ("karras",)), "KarrasDPM"),
    Known("dpm++2m", ("DPM++ 2M", ("uniform", "normal")), ("dpmpp_2m", ("normal",)), "DPMSolverMultistep"),
    Known("dpm++2m-sde", ("DPM++ 2M SDE", ("uniform", "normal")), ("dpmpp_2m_sde", ("normal",))),
    Known("euler", ("Euler", ("uniform", "normal")), ("euler", ("normal",)), "K_EULER"),
    Known("flow-euler", ("Euler", ("simple", "uniform", "normal")), ("euler", ("simple", "normal")), "K_EULER"),
    Known("euler-a", ("Euler a", ("uniform", "normal")), ("euler_ancestral", ("normal",)), "K_EULER_ANCESTRAL"),
    Known("heun", ("Heun", ("uniform", "normal")), ("heun", ("normal",)), "HeunDiscrete"),
    Known("flow-heun", ("Heun", ("simple", "uniform", "normal")), ("heun", ("simple", "normal")), "HeunDiscrete"),
    Known("ddim", ("DDIM", ("uniform", "normal", "ddim")), ("ddim", ("ddim_uniform", "normal")), "DDIM"),
    Known("unipc", ("UniPC", ("uniform", "normal")), ("uni_pc", ("normal",))),
    Known("lcm", ("LCM", ("uniform", "normal")), ("lcm", ("sgm_uniform", "normal"))),
    Known("ddpm", ("DDPM", ("uniform", "normal")), ("ddpm", ("normal",))),
)  # fmt: skip


def served_by(model: Model) -> Sequence[Known]:
    """Those the model has, in the table's order."""
    return [k for k in TABLE if k.sampler in model.samplers]


def of_webui(name: str | None, schedule: str | None, model: Model) -> str | None:
    """The farm's sampler for AUTOMATIC1111's sampler_name and scheduler; None: the model's own.

    Raises Invalid naming what the model has.
    """
    if not name:
        if not schedule or schedule.lower() == ANY:
            return None
        name = webui_name(model.sampler)[0]
    plain, wanted = name.lower(), (schedule or ANY).lower()
    if plain.endswith(" karras"):
        plain, wanted = plain.removesuffix(" karras"), "karras"
    found = [k for k in served_by(model) if k.webui[0].lower() == plain]
    if not found:
        if name in model.samplers:
            return name
        names = dict.fromkeys(k.webui[0] for k in served_by(model))
        raise Invalid([Fault("sampler_name", name, f"{model.name} has {', '.join(names)}")])
    fitting = [k for k in found if wanted in (ANY, *k.webui[1])]
    if not fitting:
        schedules = dict.fromkeys(s for k in found for s in (ANY, *k.webui[1]))
        raise Invalid([Fault("scheduler", schedule, f"with {name} allowed are {', '.join(schedules)}")])
    return fitting[0].sampler


def of_comfy(name: str, schedule: str, model: Model) -> str | None:
    """The farm's sampler for a KSampler's sampler_name and scheduler; None if the model has none such."""
    fitting = [k for k in served_by(model) if k.comfy[0] == name and schedule in k.comfy[1]]
    return fitting[0].sampler if fitting else None


def of_replicate(name: str | None, model: Model) -> str | None:
    """The farm's sampler for a scheduler of Replicate's models; None: the model's own.

    Raises Invalid naming what the model has.
    """
    if not name:
        return None
    fitting = [k.sampler for k in served_by(model) if k.replicate == name]
    if fitting or name in model.samplers:
        return fitting[0] if fitting else name
    names = dict.fromkeys(k.replicate for k in served_by(model) if k.replicate)
    raise Invalid([Fault("scheduler", name, f"{model.name} has {', '.join(names)}")])


def webui_name(sampler: str) -> tuple[str, str]:
    """What AUTOMATIC1111 calls a sampler and its schedule, as its infotext writes them."""
    for known in TABLE:
        if known.sampler == sampler:
            return known.webui[0], known.webui[1][0].capitalize()
    return sampler, ANY.capitalize()
