"""AUTOMATIC1111's web API, through webuiapi as it is installed from PyPI, and plainly."""

import base64
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import webuiapi
from PIL import Image

from tests.dialects.conftest import RED, RunningFarm
from tests.dialects.front import busy

pytestmark = pytest.mark.xdist_group("dialects")

STARTER = {"sd_model_checkpoint": "starter"}
SMALL = {"width": 64, "height": 64, "steps": 4, "cfg_scale": 4.0}


@pytest.fixture(scope="module")
def webui(farm: RunningFarm) -> webuiapi.WebUIApi:
    """The client, with a key in the path."""
    return webuiapi.WebUIApi(baseurl=f"{farm.url}/k/{farm.api_key}/sdapi/v1", sampler="DPM++ 2M", steps=4)


def rgb(image: Image.Image) -> bytes:
    return image.convert("RGB").tobytes()


def native(farm: RunningFarm, prompt: str = RED, **spec: object) -> list[bytes]:
    asked = {"width": 64, "height": 64, "steps": 4, "guidance": 4.0, "sampler": "dpm++2m-karras", **spec}
    return [rgb(Image.open(io.BytesIO(data))) for data in farm.native(prompt, **asked)]


def eventually(look: object, within_s: float = 30) -> object:
    """What look() gives, once it is something."""
    pause = threading.Event()
    for _ in range(int(within_s * 20)):
        if found := look():  # type: ignore[operator]
            return found
        pause.wait(0.05)
    raise AssertionError("it never came")


def test_txt2img_gives_the_images_of_the_native_api(farm: RunningFarm, webui: webuiapi.WebUIApi) -> None:
    made = webui.txt2img(
        prompt=RED, negative_prompt="a square", seed=7, batch_size=2, n_iter=2,
        override_settings=STARTER, **SMALL,
    )  # fmt: skip

    assert [rgb(i) for i in made.images] == native(farm, seed=7, count=4, negative_prompt="a square")
    assert made.info["all_seeds"] == [7, 8, 9, 10]
    assert made.info["infotexts"][1].splitlines()[:2] == [RED, "Negative prompt: a square"]
    assert (
        "Steps: 4, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4, Seed: 8, Size: 64x64"
        in (made.info["infotexts"][1])
    )
    assert made.parameters["prompt"] == RED


def test_img2img_starts_from_an_image(farm: RunningFarm, webui: webuiapi.WebUIApi) -> None:
    start = farm.native(seed=5, steps=4)[0]

    made = webui.img2img(
        images=[Image.open(io.BytesIO(start))], prompt=RED, seed=6, denoising_strength=0.5,
        override_settings=STARTER, **SMALL,
    )  # fmt: skip

    kept = farm.api.post("/v1/inputs", content=start, headers={"Content-Type": "image/png"}).json()["id"]
    assert rgb(made.image) == native(farm, seed=6, image=kept, strength=0.5)[0]
    assert made.parameters["init_images"] is None


def test_an_image_is_not_stretched_to_another_shape(webui: webuiapi.WebUIApi) -> None:
    wide = {"images": [Image.new("RGB", (96, 64), "blue")], "prompt": RED, "override_settings": STARTER}

    with pytest.raises(RuntimeError, match="with 1 it is cut to the shape") as refused:
        webui.img2img(**wide, **SMALL)
    cut = webui.img2img(**wide, **SMALL, resize_mode=1)

    assert "resize_mode" in str(refused.value)
    assert cut.image.size == (64, 64)


def test_base64_may_have_line_ends(farm: RunningFarm) -> None:
    start = base64.encodebytes(farm.native(seed=5, steps=4)[0]).decode()
    asked = {"init_images": [start], "prompt": RED, "steps": 4, **SMALL}

    made = farm.api.post("/sdapi/v1/img2img", json=asked)

    assert "\n" in start
    assert made.status_code == 200, made.text


def half(size: tuple[int, int], left: int) -> Image.Image:
    """A mask: what is right of left is painted."""
    mask = Image.new("L", size)
    mask.paste(255, (left, 0, *size))
    return mask


def differs(one: Image.Image, other: Image.Image, box: tuple[int, int, int, int]) -> bool:
    return rgb(one.crop(box)) != rgb(other.crop(box))


def test_a_mask_with_hard_edges_is_what_the_farm_does_itself(
    farm: RunningFarm, webui: webuiapi.WebUIApi
) -> None:
    start, hole = farm.native(seed=5, steps=4)[0], io.BytesIO()
    half((64, 64), 32).save(hole, "PNG")

    made = webui.img2img(
        images=[Image.open(io.BytesIO(start))], mask_image=half((64, 64), 32), prompt=RED, seed=6,
        denoising_strength=1.0, mask_blur=0, inpaint_full_res=False, inpainting_fill=1,
        override_settings=STARTER, **SMALL,
    )  # fmt: skip

    ids = [
        farm.api.post("/v1/inputs", content=data, headers={"Content-Type": "image/png"}).json()["id"]
        for data in (start, hole.getvalue())
    ]
    assert rgb(made.image) == native(farm, seed=6, image=ids[0], mask=ids[1], strength=1.0)[0]


def test_a_mask_as_the_client_sends_it_by_itself_paints_that_part_at_full_size(
    farm: RunningFarm, webui: webuiapi.WebUIApi
) -> None:
    # given a picture larger than what is painted, and of another shape
    start = Image.open(io.BytesIO(farm.native(seed=5, steps=4)[0])).resize((160, 120)).convert("RGB")
    asked = {"images": [start], "prompt": RED, "seed": 6, "override_settings": STARTER, **SMALL}

    # when
    made = webui.img2img(**asked, mask_image=half(start.size, 130)).image
    sharp = webui.img2img(**asked, mask_image=half(start.size, 130), mask_blur=0).image

    # then the size is the picture's, and what the mask leaves out is as it was
    assert made.size == sharp.size == start.size
    assert not differs(made, start, (0, 0, 110, 120))
    assert differs(made, start, (120, 0, 130, 120)), "a soft edge reaches beyond the mask"
    assert differs(made, start, (131, 0, 160, 120))
    assert not differs(sharp, start, (0, 0, 130, 120))
    assert differs(sharp, start, (130, 0, 160, 120))


def test_a_mask_of_the_whole_picture_is_laid_over_it_with_a_soft_edge(
    farm: RunningFarm, webui: webuiapi.WebUIApi
) -> None:
    start = Image.open(io.BytesIO(farm.native(seed=5, steps=4)[0])).convert("RGB")
    asked = {
        "images": [start], "prompt": RED, "seed": 6, "inpaint_full_res": False, "override_settings": STARTER,
        **SMALL,
    }  # fmt: skip

    right = webui.img2img(**asked, mask_image=half((64, 64), 40), mask_blur=2)
    left = webui.img2img(**asked, mask_image=half((64, 64), 40), mask_blur=2, inpainting_mask_invert=1)
    kept = webui.img2img(**asked, mask_image=half((64, 64), 40), mask_blur=2, inpainting_fill=1)

    assert not differs(right.image, start, (0, 0, 30, 64))
    assert differs(right.image, start, (48, 0, 64, 64))
    assert not differs(left.image, start, (50, 0, 64, 64))
    assert differs(left.image, start, (0, 0, 30, 64))
    assert rgb(kept.image) != rgb(right.image), "what it starts from under the mask is another"


@pytest.mark.parametrize(
    ("mask", "more", "said"),
    [
        (Image.new("L", (32, 32), 255), {}, "as the image"),
        (Image.new("L", (64, 64)), {}, "nothing of it is to be painted"),
        (Image.new("L", (64, 64), 255), {"inpainting_fill": 2}, "inpainting_fill"),
        (Image.new("L", (64, 64), 255), {"mask_blur": 65}, "mask_blur"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused(
    webui: webuiapi.WebUIApi, mask: Image.Image, more: dict[str, object], said: str
) -> None:
    start = Image.new("RGB", (64, 64), "blue")

    with pytest.raises(RuntimeError, match=said):
        webui.img2img(images=[start], mask_image=mask, prompt=RED, override_settings=STARTER, **SMALL, **more)


def test_weights_loras_and_styles_are_read_as_there(farm: RunningFarm, webui: webuiapi.WebUIApi) -> None:
    made = webui.txt2img(prompt="a (red:1.3) circle", seed=3, override_settings=STARTER, **SMALL)
    plain = webui.txt2img(
        prompt=RED, seed=3, override_settings=STARTER, styles=["pixel-art"], sampler_name="Euler a", **SMALL
    )

    assert rgb(made.image) == native(farm, "a (red)1.3 circle", seed=3, prompt_weights=True)[0]
    assert rgb(plain.image) == native(farm, seed=3, style="pixel-art", sampler="euler-a")[0]
    assert made.info["prompt"] == made.info["infotexts"][0].splitlines()[0] == "a (red:1.3) circle"
    assert plain.info["prompt"].startswith(f"{RED}, pixel art")
    with pytest.raises(RuntimeError, match="starter has none"):
        webui.txt2img(prompt=f"{RED} <lora:ink:0.8>", override_settings=STARTER, **SMALL)
    with pytest.raises(RuntimeError, match="between steps"):
        webui.txt2img(prompt="a [red:blue:0.5] circle", override_settings=STARTER, **SMALL)


def test_a_second_pass_is_highres_fix(farm: RunningFarm, webui: webuiapi.WebUIApi) -> None:
    made = webui.txt2img(
        prompt=RED, seed=4, enable_hr=True, hr_scale=1.5, denoising_strength=0.5,
        hr_upscaler=webuiapi.HiResUpscaler.Lanczos, override_settings=STARTER, **SMALL,
    )  # fmt: skip

    assert made.image.size == (96, 96)
    assert rgb(made.image) == native(farm, seed=4, upscale={"factor": 1.5, "strength": 0.5})[0]


def test_what_there_is_is_listed(webui: webuiapi.WebUIApi) -> None:
    assert "starter" in {m["model_name"] for m in webui.get_sd_models()}
    assert {"DPM++ 2M", "Euler a"} <= {s["name"] for s in webui.get_samplers()}
    assert webui.util_get_current_model().startswith("starter")
    assert "pixel-art" in {s["name"] for s in webui.get_prompt_styles()}


def test_how_far_the_accounts_own_request_is_and_interrupt_stops_it_alone(
    farm: RunningFarm, webui: webuiapi.WebUIApi
) -> None:
    other = farm.client(farm.stranger_key)
    asked = {"prompt": RED, "override_settings": STARTER, "force_task_id": "task(mine)", **SMALL}

    with ThreadPoolExecutor() as pool, busy(farm):
        mine = pool.submit(farm.api.post, "/sdapi/v1/txt2img", json=asked)
        theirs = pool.submit(other.post, "/sdapi/v1/txt2img", json={**asked, "force_task_id": "task(theirs)"})
        told = eventually(lambda: webui.get_progress()["current_task"])
        eventually(lambda: other.get("/sdapi/v1/progress").json()["current_task"])
        webui.interrupt()
        stopped = mine.result(60)
        still = other.get("/sdapi/v1/progress").json()
    whole = theirs.result(120)

    assert told == "task(mine)"
    assert stopped.json()["images"] == []
    assert still["current_task"] == "task(theirs)"
    assert len(whole.json()["images"]) == 1
    assert webui.get_progress()["state"]["job_count"] == 0


def test_basic_serves_and_the_key_is_in_no_log(farm: RunningFarm, webui: webuiapi.WebUIApi) -> None:
    with httpx.Client(base_url=farm.url, trust_env=False) as nobody:
        basic = nobody.get("/sdapi/v1/samplers", auth=("anybody", farm.api_key))
        without = nobody.get("/sdapi/v1/samplers")
        missing = nobody.get(f"/k/{farm.api_key}/sdapi/v1/nothing")
    webui.get_samplers()

    assert basic.status_code == 200
    assert without.status_code == 401
    assert without.headers["www-authenticate"].startswith("Basic")
    assert missing.status_code == 404
    said = "".join(p.read_text(errors="replace") for p in (farm.data / "logs").iterdir())
    said += httpx.get(f"{farm.url}/metrics", trust_env=False).text
    assert farm.api_key[40:] not in said
    assert farm.api_key not in missing.text


@pytest.mark.parametrize(
    ("asked", "status", "said"),
    [
        ({"width": 63}, 422, "width"),
        ({"magic": 1}, 422, "magic"),
        ({"restore_faces": True}, 422, "restore_faces"),
        ({"sampler_name": "PLMS"}, 422, "sampler_name"),
        ({"scheduler": "Beta"}, 422, "scheduler"),
        ({"override_settings": {"sd_vae": "x"}}, 422, "override_settings.sd_vae"),
        ({"override_settings": {"sd_model_checkpoint": "dreamer.safetensors"}}, 404, "Model not found"),
        ({"alwayson_scripts": {"ControlNet": {"args": []}}}, 422, "alwayson_scripts"),
        ({"batch_size": 0}, 422, "batch_size"),
    ],
)
def test_what_is_not_served_is_refused_by_its_name(
    farm: RunningFarm, asked: dict[str, object], status: int, said: str
) -> None:
    answer = farm.api.post(
        "/sdapi/v1/txt2img", json={"prompt": RED, "override_settings": STARTER, **SMALL, **asked}
    )

    assert answer.status_code == status
    assert said in answer.text
    assert set(answer.json()) == {"error", "detail", "body", "errors"}


def test_settings_are_not_changed_for_everybody(farm: RunningFarm, webui: webuiapi.WebUIApi) -> None:
    answer = farm.api.post("/sdapi/v1/options", json={"sd_model_checkpoint": "sdxl"})

    assert answer.status_code == 422
    assert "override_settings" in answer.text
    assert webui.util_get_current_model().startswith("starter")


def test_any_seed_is_drawn_and_no_images_need_be_sent(farm: RunningFarm) -> None:
    asked = {"prompt": RED, "seed": -1, "send_images": False, "override_settings": STARTER, **SMALL}
    answer = farm.api.post("/sdapi/v1/txt2img", json=asked).json()
    again = farm.api.post("/sdapi/v1/txt2img", json={**asked, "send_images": True}).json()

    assert answer["images"] == []
    assert base64.b64decode(again["images"][0]).startswith(b"\x89PNG")
    assert '"seed": -1' not in answer["info"]
    assert answer["info"] != again["info"]
