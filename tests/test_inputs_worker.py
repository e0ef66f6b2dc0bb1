"""From an uploaded image to a rendered one: the API, a worker with the starter model, and what lies between."""

import base64
import io
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from sqlalchemy import text

from farm import accounts, inputs, pricing
from farm.api.app import create_app
from farm.catalog import Model, catalog
from farm.db import transaction
from farm.errors import RenderFailed
from farm.queue import ClaimedFrame
from farm.settings import settings
from farm.storage import open_store
from tests.factories import must_claim, violations
from workers.edges import canny
from workers.encode import read_metadata
from workers.gpu import limit_threads
from workers.inputs import InputReader
from workers.run import Worker
from workers.starter.measure import one_thing
from workers.starter.pictures import Scene, Thing, draw
from workers.starter.reading import read


@pytest.fixture
def api(database: str) -> Iterator[TestClient]:
    with transaction() as db:
        pricing.sync(db, catalog())
        key = accounts.issue_key(db, accounts.create(db, "acme"))[1]
    with TestClient(create_app(), raise_server_exceptions=False) as client:
        client.headers["Authorization"] = f"Bearer {key}"
        yield client
    assert violations() == []


def starter(engine: str) -> Model:
    packs_by = "shape" if engine == "step" else "call"
    return catalog()["starter"].model_copy(update={"engine": engine, "packs_by": packs_by})


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def uploaded(api: TestClient, pixels: np.ndarray) -> str:
    answer = api.post("/v1/inputs", content=png(pixels), headers={"Content-Type": "image/png"})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def opened(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


# ------------------------------------------------------------------------------------------------ end to end


@pytest.mark.parametrize("engine", ["pipe", "step"])
def test_the_starter_model_starts_from_images_paints_masks_anew_and_draws_larger(
    api: TestClient, engine: str
) -> None:
    limit_threads()
    drawn = one_thing("circle", "red", "white", size="large")
    before = draw(Scene("white", (Thing("square", "blue", 0.25, 0.25, 0.16),)))
    mask = np.zeros((64, 64), np.uint8)
    mask[32:, 32:] = 255
    circle, square, corner = (uploaded(api, p) for p in (draw(drawn), before, mask))
    prompt = "a large red circle on a white background"
    specs: dict[str, dict[str, Any]] = {
        "image": {"image": circle, "strength": 0.5, "guidance": 3.0},
        "mask": {
            "prompt": "a red circle in the bottom right on a white background", "image": square, "mask": corner,
        },
        "hires": {"hires": {"width": 96, "height": 112, "steps": 10, "strength": 0.4}},
        "upscale": {"upscale": {"factor": 2, "steps": 10, "strength": 0.3}},
        "webp": {"format": "webp", "prompt_weights": True, "prompt": "a large (red)1.2 circle on a white background"},
        "jpeg": {"format": "jpeg", "quality": 40, "reproducible": "strict"},
        "png": {"reproducible": "strict"},
    }  # fmt: skip
    body = {"specs": [{"prompt": prompt, "seed": 1, **spec} for spec in specs.values()]}
    made = api.post("/v1/jobs", json=body).json()

    Worker("w", pool="starter", models=[starter(engine)], device="cpu").burst(lambda _: None)

    job = api.get(made["urls"]["self"]).json()
    frames = api.get(made["urls"]["frames"]).json()["frames"]
    assert (job["status"], job["counts"]["done"]) == ("finished", len(specs)), [f["reason"] for f in frames]
    assert float(job["charged"]) == pytest.approx(float(made["quoted"]))
    files = {n: api.get(f"/v1/jobs/{job['id']}/frames/{k}/image").content for k, n in enumerate(specs)}
    pixels = {n: opened(data) for n, data in files.items()}
    assert read(pixels["image"]).background == "white"
    assert read(pixels["image"]).things[0].colour == "red"
    assert np.abs(pixels["mask"][:28, :28].astype(int) - before[:28, :28]).mean() < 10
    assert np.abs(pixels["mask"][36:, 36:].astype(int) - before[36:, 36:]).mean() > 20
    assert pixels["hires"].shape == (112, 96, 3)
    assert pixels["upscale"].shape == (128, 128, 3)
    assert read(pixels["upscale"]).background == "white"
    assert len(files["jpeg"]) < 2500
    facts = read_metadata(files["mask"])
    assert facts["image"] == frames[1]["spec"]["image"]
    assert facts["mask"].startswith("sha256:")
    assert "image" not in read_metadata(files["png"])


# ------------------------------------------------------------------------------------------------ fetch and decode


def claimed(api: TestClient, **spec: Any) -> ClaimedFrame:
    answer = api.post("/v1/jobs", json={"spec": {"prompt": "a", **spec}})
    assert answer.status_code == 202, answer.text
    return must_claim("w", models=("starter",), frames=8).frames[0]


@pytest.fixture
def reader(database: str) -> InputReader:
    import threading

    store = open_store(settings().storage_url.get_secret_value())
    return InputReader(store, [catalog()["starter"]], give_up=threading.Event())


def key_of(frame: ClaimedFrame) -> str:
    with transaction() as db:
        (key,) = inputs.files(db, frame.account_id, frame.spec.inputs).values()
    return key


def test_an_image_comes_in_the_frames_size_cut_evenly_and_an_equal_one_as_it_is(
    api: TestClient, reader: InputReader
) -> None:
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = (0, 200, 0)
    same = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    frames = [claimed(api, image=uploaded(api, p)) for p in (wide, same)]

    first, second = (reader.ask(f).inputs.image for f in frames)

    assert first is not None
    assert second is not None
    assert first.shape == (64, 64, 3)
    assert np.abs(first.astype(int) - (0, 200, 0)).max() <= 1
    assert np.array_equal(second, same)


def test_what_is_transparent_is_white_in_an_image_and_kept_by_a_mask(
    api: TestClient, reader: InputReader
) -> None:
    clear = np.zeros((64, 64, 4), np.uint8)
    clear[:32] = (255, 0, 0, 255)
    masked = np.full((64, 64, 4), 255, np.uint8)
    masked[:32, :, 3] = 0
    frame = claimed(api, image=uploaded(api, clear), mask=uploaded(api, masked))

    found = reader.ask(frame).inputs

    assert found.image is not None
    assert found.mask is not None
    assert found.image[0, 0].tolist() == [255, 0, 0]
    assert found.image[-1, -1].tolist() == [255, 255, 255]
    assert (found.mask[0, 0], found.mask[-1, -1]) == (0, 255)


def test_inputs_of_a_job_are_fetched_once(api: TestClient, reader: InputReader) -> None:
    frame = claimed(api, image=uploaded(api, np.full((64, 64, 3), 7, np.uint8)))
    first = reader.ask(frame)
    open_store(settings().storage_url.get_secret_value()).delete(key_of(frame))

    assert reader.ask(frame).inputs.image is first.inputs.image


def test_an_input_that_is_damaged_or_gone_fails_its_frame_alone(api: TestClient, reader: InputReader) -> None:
    store = open_store(settings().storage_url.get_secret_value())
    damaged = claimed(api, image=uploaded(api, np.full((64, 64, 3), 1, np.uint8)))
    gone = claimed(api, image=uploaded(api, np.full((64, 64, 3), 2, np.uint8)))
    plain = claimed(api)
    store.put(key_of(damaged), png(np.zeros((64, 64, 3), np.uint8)), content_type="image/png")
    store.delete(key_of(gone))

    results = reader.asks([damaged, plain, gone])

    assert [isinstance(r, RenderFailed) for r in results] == [True, False, True]
    assert "is damaged in the store" in str(results[0])
    assert "is not in the store" in str(results[2])


def test_a_worker_fails_such_a_frame_and_renders_the_others(api: TestClient) -> None:
    limit_threads()
    up = uploaded(api, np.full((64, 64, 3), 3, np.uint8))
    bad = api.post("/v1/jobs", json={"spec": {"prompt": "a", "image": up, "steps": 2}}).json()
    with transaction() as db:
        key = db.execute(text("SELECT account_id, id FROM inputs")).one()
    open_store(settings().storage_url.get_secret_value()).delete(
        inputs.key_of(key.account_id, UUID(str(key.id)))
    )
    good = api.post("/v1/jobs", json={"spec": {"prompt": "a red circle", "steps": 2}}).json()

    worker = Worker("w", pool="starter", models=[starter("pipe")], device="cpu")
    worker.burst(lambda _: None)

    assert api.get(good["urls"]["self"]).json()["counts"]["done"] == 1
    assert api.get(bad["urls"]["self"]).json()["counts"]["failed"] == 1
    frame = api.get(bad["urls"]["frames"]).json()["frames"][0]
    assert "is not in the store" in frame["reason"]


def test_a_data_url_is_rendered_like_an_upload(api: TestClient) -> None:
    limit_threads()
    data = "data:image/png;base64," + base64.b64encode(png(np.full((64, 64, 3), 9, np.uint8))).decode()
    made = api.post(
        "/v1/jobs", json={"spec": {"prompt": "a", "image": data, "steps": 4, "strength": 0.5}}
    ).json()

    Worker("w", pool="starter", models=[starter("pipe")], device="cpu").burst(lambda _: None)

    assert api.get(made["urls"]["self"]).json()["counts"]["done"] == 1


# ------------------------------------------------------------------------------------------------ edges


def test_edges_are_where_the_picture_changes_and_one_pixel_wide() -> None:
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[16:48, 16:48] = 255

    edges = canny(picture)

    assert edges.shape == (64, 64)
    assert set(np.unique(edges)) == {0, 255}
    assert not edges[:14].any()
    assert not edges[20:44, 20:44].any()
    for row in (20, 32, 43):
        assert np.count_nonzero(edges[row]) == 2
    for column in (20, 32, 43):
        assert np.count_nonzero(edges[:, column]) == 2


def test_a_weak_edge_counts_only_where_a_strong_one_reaches_it() -> None:
    strong = np.zeros((40, 64, 3), np.uint8)
    strong[:, 32:] = 200
    strong[:, 32:48] = np.linspace(34, 200, 40, dtype=np.uint8)[:, None, None]  # the edge at 32 fades upwards
    alone = np.zeros((40, 64, 3), np.uint8)
    alone[:, 32:] = 34  # weak everywhere: |dx| = 136

    assert np.count_nonzero(canny(strong)[:, 30:34]) >= 38
    assert not canny(alone).any()
    assert not canny(np.full((16, 16, 3), 80, np.uint8)).any()
