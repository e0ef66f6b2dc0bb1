"""`farm submit` and what can be done to a job."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from farm.answers import Frame, Job
from farm.cli import show, uploads
from farm.cli.inputs import Sender, larger, named
from farm.cli.money import show_quote
from farm.cli.session import JobId, Json, as_account, find, on_job
from farm.cli.times import TIME, moment
from farm.client import Farm
from farm.errors import FarmError

EXTENSIONS = {"image/png": "png", "image/webp": "webp", "image/jpeg": "jpeg"}
DOWNLOADS = 4  # at once
LISTED = 50  # frames whose outcome is listed after watching
INTERRUPTED = 130

app = typer.Typer()

To = Annotated[Path, typer.Option("--to", help="folder for the images; it is made", file_okay=False)]


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})[x×](\d{1,6})", text)
    if match is None:
        raise typer.BadParameter("allowed is WIDTHxHEIGHT in pixels, as 512x768", param_hint="--size")
    return int(match[1]), int(match[2])


def priority_of(text: str) -> int | str:
    return int(text) if text.isdigit() else text


@app.command()
def submit(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT…", help="what to render; several make one job")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="lines, .ndjson or .csv, instead of prompts", dir_okay=False, exists=True),
    ] = None,
    matrix: Annotated[
        Path | None,
        typer.Option(help="a .json of lists, for every combination", dir_okay=False, exists=True),
    ] = None,
    preview: Annotated[bool, typer.Option("--preview", help="only show what a matrix comes to")] = False,
    mode: Annotated[
        str | None, typer.Option(help="of a file with bad lines: all_or_nothing, if left out, or accept_good")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="an upload of this file that was broken off", metavar="UPLOAD")
    ] = None,
    proof: Annotated[
        int | None, typer.Option(help="render so many images; the rest waits for `farm approve`")
    ] = None,
    model: Annotated[str | None, typer.Option(help="`farm models` lists them")] = None,
    count: Annotated[int, typer.Option(help="images a prompt, one seed each")] = 1,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels", metavar="64x64")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="how closely to follow the prompt")] = None,
    sampler: Annotated[str | None, typer.Option(help="`farm models --json` lists them")] = None,
    seed: Annotated[int | None, typer.Option(help="of the first image; the others count up")] = None,
    priority: Annotated[
        str | None,
        typer.Option(help="urgent, standard, bulk, or 0 to 9; if left out, standard, and bulk of a file"),
    ] = None,
    image_format: Annotated[str | None, typer.Option("--format", help="png, webp or jpeg")] = None,
    quality: Annotated[
        int | None, typer.Option(help="1 to 100: of a jpeg; of a webp, lossless without")
    ] = None,
    image: Annotated[
        str | None, typer.Option(help="what to start from: a file, an https URL, or inp_… of an upload")
    ] = None,
    strength: Annotated[float | None, typer.Option(help="how much of the image to change, up to 1")] = None,
    mask: Annotated[
        str | None, typer.Option(help="what of the image to paint anew is white in it: file, URL or inp_…")
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(help="a control net and what it follows, NET=IMAGE[@SCALE]; repeat it for several"),
    ] = None,
    sketch: Annotated[
        bool, typer.Option("--sketch", help="control images are sketches: draw their edges")
    ] = False,
    lora: Annotated[
        list[str] | None, typer.Option(help="a LoRA, NAME[@SCALE]; repeat it for several")
    ] = None,
    hires: Annotated[
        str | None, typer.Option(help="a second pass at WIDTHxHEIGHT", metavar="128x128")
    ] = None,
    upscale: Annotated[
        float | None, typer.Option(help="a second pass so many times as large, up to 4")
    ] = None,
    clip_skip: Annotated[int | None, typer.Option(help="layers of the text encoder to leave out")] = None,
    weights: Annotated[bool, typer.Option("--weights", help="read (red)1.4 and ball++ as weights")] = False,
    long: Annotated[bool, typer.Option("--long", help="read prompts beyond 77 tokens too")] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="bit for bit the same, whatever it is rendered beside")
    ] = False,
    negative: Annotated[str | None, typer.Option(help="what not to show")] = None,
    style: Annotated[str | None, typer.Option(help="words that go with the prompt, as photographic")] = None,
    enhance: Annotated[bool, typer.Option("--enhance", help="add to the prompt what it lacks")] = False,
    name: Annotated[str | None, typer.Option(help="a name for the job")] = None,
    reuse: Annotated[
        bool,
        typer.Option("--reuse/--no-reuse", help="take images of the same spec and --seed that are there"),
    ] = True,
    quote: Annotated[bool, typer.Option("--quote", help="only say what it costs, and send nothing")] = False,
    quoted: Annotated[
        str | None, typer.Option(help="the id of a quote: at its prices", metavar="QUOTE")
    ] = None,
    budget: Annotated[str | None, typer.Option(help="the most it may cost", metavar="AMOUNT")] = None,
    after: Annotated[
        list[str] | None, typer.Option(help="a job that has to end first; repeat it", metavar="JOB")
    ] = None,
    after_ok: Annotated[
        list[str] | None, typer.Option(help="the same, and it has to be all done", metavar="JOB")
    ] = None,
    start_after: Annotated[str | None, typer.Option(help=f"not before {TIME}", metavar="TIME")] = None,
    deadline: Annotated[str | None, typer.Option(help=f"to be done by {TIME}", metavar="TIME")] = None,
    on_late: Annotated[
        str | None, typer.Option(help="what is not done by then: fail, if left out, or demote to bulk")
    ] = None,
    max_parallel: Annotated[int | None, typer.Option(help="images rendered at once, at most")] = None,
    webhook: Annotated[
        str | None, typer.Option(help="tell this URL how it ends (docs/events.md)", metavar="URL")
    ] = None,
    idempotency_key: Annotated[str | None, typer.Option(help="accept the job once under this key")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="show progress until it has ended")] = False,
    save: Annotated[
        Path | None, typer.Option(help="folder for the images; watches too", file_okay=False)
    ] = None,
    json: Json = False,
) -> None:
    """Send a job. It is durable when this returns."""
    sides = _size(size)
    asked = {"model": model, "count": count, "steps": steps, "guidance": guidance, "sampler": sampler,
             "seed": seed, "format": image_format, "negative_prompt": negative,
             "style": style, "prompt_enhancement": enhance or None,
             "width": sides and sides[0], "height": sides and sides[1],
             "quality": quality, "strength": strength, "clip_skip": clip_skip, "prompt_weights": weights or None,
             "long_prompt": long or None, "reproducible": "strict" if strict else None,
             "loras": [named("name", text) for text in lora or []] or None,
             "hires": larger(_size(hires)), "upscale": upscale and {"factor": upscale}}  # fmt: skip
    with as_account() as farm:
        send = Sender(farm)
        asked |= {
            "image": send(image),
            "mask": send(mask),
            "control": [send.control(text, sketch=sketch) for text in control or []] or None,
        }
        common = {k: v for k, v in asked.items() if v is not None}
        if file or matrix:
            timing = {"after": [find(farm, first) for first in after or []],
                      "after_ok": [find(farm, first) for first in after_ok or []],
                      "start_after": start_after and moment(start_after, "--start-after").isoformat(),
                      "deadline": deadline and moment(deadline, "--deadline").isoformat(),
                      "on_late": on_late, "max_parallel": max_parallel}  # fmt: skip
            facts = {"name": name, "priority": priority and priority_of(priority), "mode": mode, "budget": budget,
                     "proof": proof, **timing, "reuse": None if reuse else False,
                     "webhook": webhook and {"url": webhook}}  # fmt: skip
            facts = {k: v for k, v in facts.items() if v not in (None, [])}
            if prompts or quote:
                raise typer.BadParameter("a file or a matrix has its own prompts, and no quote")
            job_id = uploads.submit(
                farm, facts, common, file=file, matrix=matrix, preview=preview,
                resume=resume, key=idempotency_key, json=json and not (watch or save),
            )  # fmt: skip
            if job_id and (watch or save):
                _follow(farm, job_id, json=json, save=save)
            return
        if not prompts:
            raise typer.BadParameter("say what to render, or --file or --matrix", param_hint="PROMPT")
        specs: list[dict[str, Any]] = [{"prompt": p, **common} for p in prompts]
        if quote:
            show_quote(farm.quote(specs, priority=priority_of(priority or "standard"), budget=budget), json)
            return
        job = farm.submit(
            specs[0] if len(specs) == 1 else specs,
            priority=priority_of(priority or "standard"),
            name=name,
            quote=quoted,
            budget=budget,
            reuse=reuse,
            after=[find(farm, first) for first in after or []],
            after_ok=[find(farm, first) for first in after_ok or []],
            start_after=None if start_after is None else moment(start_after, "--start-after"),
            deadline=None if deadline is None else moment(deadline, "--deadline"),
            on_late=on_late,
            max_parallel=max_parallel,
            proof=proof,
            webhook=webhook,
            idempotency_key=idempotency_key,
        )
        if not (watch or save):
            show.as_json(job) if json else show.say(f"{job.id} accepted: {_summary(job)}")
            return
        show.complain(f"{job.id} accepted: {_summary(job)}")
        _follow(farm, job.id, json=json, save=save)


def _summary(job: Job) -> str:
    images = "1 image" if job.frames == 1 else f"{job.frames} images"
    return f"{images}, at most {job.quoted} {job.currency}"


def _follow(farm: Farm, job_id: str, *, json: bool = False, save: Path | None = None) -> None:
    """Watch a job to its end and say what became of each image. Exits with 1 if one failed."""
    try:
        job = _progress(farm, job_id)
    except KeyboardInterrupt:
        show.complain(f"{job_id} goes on without you; watch it again: farm watch {job_id}")
        raise typer.Exit(INTERRUPTED) from None
    except FarmError:
        show.complain(f"lost sight of {job_id}, which goes on; watch it again: farm watch {job_id}")
        raise
    if json:
        show.as_json(job)
    else:
        _outcome(farm, job)
        if job.status == "staged":
            show.say(f"that was the proof; the other {job.counts.staged} wait: farm approve {job.id}")
    if save:
        save_images(farm, job.id, save)
    if job.counts.failed:
        raise typer.Exit(1)


def _progress(farm: Farm, job_id: str) -> Job:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[images]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=show.err) as bar:
        line = bar.add_task("queued", total=1.0, images="")
        for job in farm.watch(job_id):
            images = f"{job.counts.done}/{job.frames} images" + pace_of(job)
            bar.update(line, completed=job.progress, description=job.status, images=images)
    return job


def pace_of(job: Job) -> str:
    """How fast a job comes along, and when it is done then."""
    if job.rate is None:
        return ""
    return f", {job.rate:g}/s" + (f", done {job.eta:%Y-%m-%d %H:%M:%S} UTC" if job.eta else "")


def _outcome(farm: Farm, job: Job) -> None:
    frames = list(farm.frames(job.id, limit=LISTED))
    _frames_table(frames)
    if job.frames > LISTED:
        show.complain(f"… and {job.frames - LISTED} more: farm frames {job.id}")
    counts = job.counts
    bad = "".join(
        f", {n} {what}"
        for what, n in (("reused", counts.reused), ("failed", counts.failed), ("cancelled", counts.cancelled))
        if n
    )
    show.say(f"{job.id} {job.status}: {counts.done} of {job.frames} done{bad}; {job.charged} {job.currency}")


@app.command()
def jobs(limit: Annotated[int, typer.Option(help="the newest so many")] = 20, json: Json = False) -> None:
    """List the account's jobs, newest first."""
    with as_account() as farm:
        listed = farm.jobs(limit=limit)
    if json:
        show.as_json(listed)
        return
    show.table(
        ("job", "name", "status", ">priority", ">done", ">of", ">cost", "", "created (UTC)"),
        [
            (
                j.id,
                j.name or "",
                j.status,
                j.priority,
                j.counts.done,
                j.frames,
                j.charged,
                j.currency,
                j.created_at,
            )
            for j in listed
        ],
        empty='no jobs yet: farm submit "a red circle on a blue background"',
    )


@app.command()
def job(job: JobId, json: Json = False) -> None:
    """Show one job."""
    with on_job(job) as (farm, job_id):
        show_job(farm.job(job_id), json)


def show_job(job: Job, json: bool) -> None:
    if json:
        show.as_json(job)
        return
    counts = job.counts
    facts: list[tuple[str, Any]] = [
        ("job", job.id),
        ("name", job.name),
        ("status", job.status),
        ("priority", job.priority),
        ("images", f"{counts.done} of {job.frames} done, {counts.running} running, {counts.queued} queued, "
                   f"{counts.failed} failed, {counts.cancelled} cancelled"),
        ("reuse", f"{counts.reused} of those done were reused, {counts.waiting} of those queued wait for an equal one"),
        ("cost", f"{job.charged} {job.currency} so far, at most {job.quoted}"),
        ("created", job.created_at),
        ("ended", job.ended_at),
    ]  # fmt: skip
    if job.proof:
        facts.append(("proof", f"{job.proof} images; {job.counts.staged} wait for `farm approve`"))
    facts += [(name, value) for name, value in _timing(job) if value]
    show.table(("", ""), facts, empty="")


def _timing(job: Job) -> list[tuple[str, Any]]:
    late = f", and was late at {job.late_at:%Y-%m-%d %H:%M:%S}" if job.late_at else ""
    soon = ", late at this rate" if job.on_time is False else ""
    deadline = f"{job.deadline:%Y-%m-%d %H:%M:%S}, else {job.on_late}{late}{soon}" if job.deadline else None
    return [
        ("pace", pace_of(job).removeprefix(", ")),
        ("after", ", ".join(job.after)),
        ("after, all done", ", ".join(job.after_ok)),
        ("start after", job.start_after),
        ("deadline", deadline),
        ("at once", job.max_parallel and f"{job.max_parallel} at most"),
    ]


@app.command()
def frames(
    job: JobId,
    first: Annotated[int, typer.Option(help="from this index on")] = 0,
    limit: Annotated[int | None, typer.Option(help="so many at most")] = None,
    status: Annotated[
        str | None, typer.Option(help="only those: queued, claimed, done, failed, cancelled")
    ] = None,
    json: Json = False,
) -> None:
    """List a job's frames: one image and one seed each."""
    with on_job(job) as (farm, job_id):
        listed = list(farm.frames(job_id, first=first, limit=limit, status=status))
    show.as_json(listed) if json else _frames_table(listed)


def _frames_table(listed: list[Frame]) -> None:
    show.table(
        (">#", "status", "prompt", "size", ">steps", ">seed", ">cost", "why"),
        [
            (f.index, f.status, _short(f.spec["prompt"]), f"{f.spec['width']}x{f.spec['height']}",
             f.spec["steps"], f.seed, f.cost, f.reason or "")
            for f in listed
        ],
        empty="no frames",
    )  # fmt: skip


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"


def save_images(farm: Farm, job_id: str, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    done = [f for f in farm.frames(job_id, status="done") if f.image]
    with ThreadPoolExecutor(DOWNLOADS) as downloads:
        paths = list(downloads.map(lambda f: _save_one(farm, f, folder), done))
    show.complain(f"{len(paths)} images saved in {folder}" if paths else "no image is done yet")
    return paths


def _save_one(farm: Farm, frame: Frame, folder: Path) -> Path:
    extension = EXTENSIONS.get(frame.image.content_type if frame.image else "", "bin")
    path = folder / f"{frame.job}-{frame.index:05}.{extension}"
    write(path, farm.image(frame.job, frame.index))
    return path


def write(path: Path, content: bytes) -> None:
    """Write a file in one step: half an image is never there."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(content)
    new.replace(path)


@app.command()
def cancel(job: JobId, json: Json = False) -> None:
    """Stop a job: what was not done is not billed."""
    with on_job(job) as (farm, job_id):
        show_job(farm.cancel(job_id), json)


@app.command()
def approve(job: JobId, json: Json = False) -> None:
    """Have the rest of a job rendered, once its proof has shown what it will look like; `farm cancel` drops it."""
    with on_job(job) as (farm, job_id):
        show_job(farm.approve(job_id), json)


@app.command()
def pause(job: JobId, json: Json = False) -> None:
    """Hand out no further frame of a job."""
    with on_job(job) as (farm, job_id):
        show_job(farm.pause(job_id), json)


@app.command()
def resume(job: JobId, json: Json = False) -> None:
    """Hand out frames of a paused job again."""
    with on_job(job) as (farm, job_id):
        show_job(farm.resume(job_id), json)


@app.command()
def priority(
    job: JobId,
    to: Annotated[str, typer.Argument(metavar="PRIORITY", help="urgent, standard, bulk, or 0 to 9")],
    json: Json = False,
) -> None:
    """Move a job to another priority: its next frame is handed out as such."""
    with on_job(job) as (farm, job_id):
        show_job(farm.reprioritise(job_id, priority_of(to)), json)


@app.command()
def watch(
    job: JobId,
    save: Annotated[Path | None, typer.Option(help="folder for the images", file_okay=False)] = None,
    json: Json = False,
) -> None:
    """Show a job's progress until it has ended."""
    with on_job(job) as (farm, job_id):
        _follow(farm, job_id, json=json, save=save)


@app.command()
def sheet(
    job: JobId,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="the file; JOB.png if left out")] = None,
) -> None:
    """Save a job's contact sheet: every image with its prompt, a PNG."""
    with on_job(job) as (farm, job_id):
        path = out or Path(f"{job_id}.png")
        write(path, farm.sheet(job_id))
    show.say(str(path))
