"""`farm demo`: two accounts, two priorities, thirty prompts; at the end the pictures and the bills."""

import io
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGINT, SIGTERM, signal

from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from farm.answers import Job
from farm.cli import show
from farm.cli.jobs import save_images, write
from farm.cli.up import Running, up
from farm.client import Farm
from farm.embedded import default_data
from farm.embedded.process import free_port, open_folder
from farm.errors import FarmError, Misconfigured

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross")
PAIRS = (
    ("red", "blue"), ("yellow", "purple"), ("white", "green"), ("orange", "black"), ("blue", "yellow"),
)  # fmt: skip
SCENES = (
    "a large green star on a white background",
    "a small white heart at the top left on a red background",
    "a red circle above a blue square on a white background",
    "a yellow triangle left of a purple ring on a black background",
    "a small orange cross at the bottom right on a green background",
)
SEED = 2026
WATCH_S = 0.3


@dataclass(frozen=True)
class Part:
    """What one account asks for."""

    account: str
    priority: str
    first_seed: int
    prompts: tuple[str, ...]


def _parts() -> tuple[Part, Part]:
    plain = [f"{_a(one)} {shape} on {_a(two)} background" for one, two in PAIRS for shape in SHAPES]
    return (
        Part("studio", "urgent", SEED, (*SCENES, *plain[:10])),
        Part("archive", "bulk", SEED + 100, tuple(plain[10:25])),
    )


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def run(data: Path, *, workers: int) -> None:
    """Start, submit, watch, save, bill, audit, stop.

    Raises FarmError if an image is missing or the books are wrong.
    """
    data, stop = _usable(data), threading.Event()
    for number in (SIGINT, SIGTERM):
        signal(number, lambda *_: stop.set())
    ports = {"api_port": free_port(), "flower_port": free_port()}
    show.say(f"starting a farm in {data}")
    with up(data, **ports, workers=workers, stop=stop, say=show.complain) as (running, children):
        if stop.is_set():
            return
        show.say(f"API {running.url}, Flower {running.flower_url} (admin, {running.flower_password})")
        farms = {part: _account(running, part.account) for part in _parts()}
        jobs = {part: _submit(farm, part) for part, farm in farms.items()}
        if _watch(farms, jobs, stop, mend=children.mend):
            _show(running, farms, jobs)
    show.say("the farm is stopped; its data stay, and `farm demo` starts it again")


def _usable(data: Path) -> Path:
    """The folder; as root, where the database runs as nobody, one that nobody can reach."""
    try:
        return open_folder(data)
    except Misconfigured:
        if os.geteuid() != 0:
            raise
        return open_folder(default_data().with_name("farm-demo"))


def _account(running: Running, name: str) -> Farm:
    """A farm as that account, which is made unless an earlier demo did."""
    with Farm(running.url, running.admin_key) as admin:
        if name not in {a.name for a in admin.accounts()}:
            admin.add_account(name)
        return Farm(running.url, admin.add_key(name).api_key)


def _submit(farm: Farm, part: Part) -> str:
    specs = [{"prompt": prompt, "seed": part.first_seed + k} for k, prompt in enumerate(part.prompts)]
    job = farm.submit(specs, priority=part.priority, name=f"demo of {part.account}")
    show.say(f"{part.account}: {job.id}, {job.frames} images, {part.priority}")
    return job.id


def _watch(
    farms: dict[Part, Farm], jobs: dict[Part, str], stop: threading.Event, *, mend: Callable[[], None]
) -> bool:
    """Show both jobs until they have ended; False if it was interrupted."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[images]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=show.err) as bar:
        lines = {part: bar.add_task(part.account, total=1.0, images="") for part in jobs}
        while not stop.is_set():
            mend()
            now = {part: farms[part].job(job_id) for part, job_id in jobs.items()}
            for part, job in now.items():
                images = f"{job.counts.done}/{job.frames} images, {job.status}"
                bar.update(lines[part], completed=job.progress, images=images)
            if all(job.ended for job in now.values()):
                return True
            stop.wait(WATCH_S)
    return False


def _show(running: Running, farms: dict[Part, Farm], jobs: dict[Part, str]) -> None:
    results = running.data / "results"
    results.mkdir(exist_ok=True)
    bills, ended = [], []
    for part, farm in farms.items():
        job = farm.job(jobs[part])
        save_images(farm, job.id, results / part.account)
        bills.append(_bill(farm, part, job))
        ended.append(job)
    write(results / "bill.txt", "\n\n".join(bills).encode())
    write(results / "sheet.png", stack([farm.sheet(jobs[part]) for part, farm in farms.items()]))
    show.say("\n" + "\n\n".join(bills) + "\n")
    with Farm(running.url, running.admin_key) as admin:
        wrong = admin.audit().violations
    show.say(f"audit: {len(wrong)} violations" if wrong else "audit: the books are right")
    show.say(f"images: {results}\nsheet:  {results / 'sheet.png'}\nbill:   {results / 'bill.txt'}")
    missing = sum(job.frames - job.counts.done for job in ended)
    if wrong or missing:
        raise FarmError(f"{missing} images are missing and {len(wrong)} facts of the books are wrong")


def _bill(farm: Farm, part: Part, job: Job) -> str:
    """What the account used in this job, line by line, and in all."""
    lines = [f"{part.account}: {job.id}, {job.counts.done} images, priority {part.priority}"]
    used = farm.usage(job=job.id)
    for u in used.lines:
        unit = "pixels × steps" if u.method == "mpx_step" else "images"
        per = "2^20 of them" if u.method == "mpx_step" else "image"
        lines.append(
            f"  {u.model}: {u.frames} images, {u.quantity} {unit} at {u.rate} {u.currency} a {per} = {u.amount}"
        )
    lines += [f"  total {amount} {currency}" for currency, amount in used.totals.items()]
    lines += [f"  account's total so far {a} {c}" for c, a in farm.usage().totals.items()]
    return "\n".join(lines)


def stack(sheets: Sequence[bytes]) -> bytes:
    """One picture with the sheets below each other."""
    pages = [Image.open(io.BytesIO(s)).convert("RGB") for s in sheets]
    whole = Image.new("RGB", (max(p.width for p in pages), sum(p.height for p in pages)), "white")
    top = 0
    for page in pages:
        whole.paste(page, (0, top))
        top += page.height
    buffer = io.BytesIO()
    whole.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
