"""`farm webhooks …`: who is told of what happens, and what came of it."""

from typing import Annotated, Any

import typer

from farm.answers import Delivery, NewSecret, NewWebhook, Webhook
from farm.cli import show
from farm.cli.session import Json, as_account, find

group = typer.Typer(no_args_is_help=True, help="Who is told of what happens, and what came of it.")
app = typer.Typer()
app.add_typer(group, name="webhooks")

Hook = Annotated[str, typer.Argument(metavar="WEBHOOK", help="its id, as `farm webhooks list` shows it")]
DeliveryNo = Annotated[int, typer.Argument(metavar="DELIVERY", help="as `farm webhooks deliveries` shows it")]
KINDS = typer.Option(help="kinds of events, with commas", metavar="job.*,frame.failed")


def _kinds(text: str | None) -> list[str]:
    return [k.strip() for k in text.split(",")] if text else []


@group.command()
def add(
    url: Annotated[str, typer.Argument(metavar="URL", help="an https URL on the public Internet")],
    kinds: Annotated[str | None, KINDS] = None,
    description: Annotated[str | None, typer.Option(help="what it is for")] = None,
    json: Json = False,
) -> None:
    """Tell a URL of the account's events from now on: of job.* if no kinds are named."""
    with as_account() as farm:
        _show_secret(farm.add_webhook(url, kinds=_kinds(kinds), description=description), json)


@group.command(name="list")
def list_(
    job: Annotated[str | None, typer.Option(help="that job's own callbacks instead", metavar="JOB")] = None,
    json: Json = False,
) -> None:
    """List the account's webhooks."""
    with as_account() as farm:
        listed = farm.webhooks(job=None if job is None else find(farm, job))
    if json:
        show.as_json(listed)
        return
    show.table(
        ("webhook", "url", "kinds", "state", "for"),
        [(w.id, w.url, ",".join(w.kinds), _state(w), w.description or "") for w in listed],
        empty="no webhooks yet: farm webhooks add URL",
    )


def _state(webhook: Webhook) -> str:
    if webhook.disabled:
        return f"disabled: {webhook.disabled}"
    if webhook.failing_since:
        return f"failing since {webhook.failing_since:%Y-%m-%d %H:%M}"
    return "behind" if webhook.behind else "up"


@group.command(name="show")
def show_(webhook: Hook, json: Json = False) -> None:
    """Show one webhook."""
    with as_account() as farm:
        _show(farm.webhook(webhook), json)


def _show(webhook: Webhook, json: bool) -> None:
    if json:
        show.as_json(webhook)
        return
    facts: list[tuple[str, Any]] = [
        ("webhook", webhook.id),
        ("url", webhook.url),
        ("kinds", ", ".join(webhook.kinds)),
        ("job", webhook.job),
        ("state", _state(webhook)),
        ("for", webhook.description),
        ("secret", f"version {webhook.version}"),
        ("made", webhook.created_at),
    ]
    show.table(("", ""), facts, empty="")


def _show_secret(made: NewWebhook | NewSecret, json: bool) -> None:
    if json:
        show.as_json(made)
        return
    if isinstance(made, NewWebhook):
        show.say(f"{made.id}: {made.url} is told of {', '.join(made.kinds)}")
    show.say(made.secret)
    show.complain("keep the secret: it is not shown again")


@group.command()
def change(
    webhook: Hook,
    url: Annotated[str | None, typer.Option(help="where to")] = None,
    kinds: Annotated[str | None, KINDS] = None,
    description: Annotated[str | None, typer.Option(help="what it is for")] = None,
    enable: Annotated[
        bool | None, typer.Option("--enable/--disable", help="whether it is told of anything")
    ] = None,
    json: Json = False,
) -> None:
    """Change a webhook."""
    asked = {
        "url": url,
        "kinds": _kinds(kinds) or None,
        "description": description,
        "disabled": None if enable is None else not enable,
    }
    with as_account() as farm:
        _show(farm.change_webhook(webhook, {k: v for k, v in asked.items() if v is not None}), json)


@group.command()
def rotate(
    webhook: Annotated[
        str, typer.Argument(metavar="WEBHOOK", help="its id; callbacks: what signs the jobs' own ones")
    ],
    json: Json = False,
) -> None:
    """Make the next secret; the one before signs too for a day."""
    with as_account() as farm:
        _show_secret(
            farm.rotate_callbacks() if webhook == "callbacks" else farm.rotate_webhook(webhook), json
        )


@group.command()
def deliveries(
    webhook: Hook,
    status: Annotated[str | None, typer.Option(help="only those: pending, delivered, failed")] = None,
    limit: Annotated[int, typer.Option(help="the newest so many")] = 20,
    json: Json = False,
) -> None:
    """List what a webhook was sent, newest first."""
    with as_account() as farm:
        listed = farm.deliveries(webhook, status=status, limit=limit)
    if json:
        show.as_json(listed)
        return
    show.table(
        (">delivery", ">event", "what", "status", ">tries", "last answer", "next try (UTC)"),
        [(d.id, d.event, d.kind, d.status, d.tries, _last(d), d.next_at) for d in listed],
        empty="it was sent nothing yet",
    )


def _last(delivery: Delivery) -> str:
    if not delivery.log:
        return ""
    last = delivery.log[-1]
    said = last.error or f"{last.status} {last.answer[:40]}".strip()
    return f"{said}, {last.ms} ms"


@group.command()
def redeliver(webhook: Hook, delivery: DeliveryNo, json: Json = False) -> None:
    """Send a delivery once more, now."""
    with as_account() as farm:
        again = farm.redeliver(webhook, delivery)
    show.as_json(again) if json else show.say(f"delivery {again.id} is sent again")


@group.command(name="test")
def try_out(webhook: Hook, json: Json = False) -> None:
    """Send a webhook an event of kind webhook.test."""
    with as_account() as farm:
        sent = farm.test_webhook(webhook)
    show.as_json(sent) if json else show.say(
        f"delivery {sent.id} is on its way: farm webhooks deliveries {webhook}"
    )


@group.command()
def remove(webhook: Hook) -> None:
    """Take a webhook away, with its log."""
    with as_account() as farm:
        farm.remove_webhook(webhook)
    show.say(f"{webhook} is removed")
