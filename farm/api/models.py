"""The models the farm serves."""

from collections import defaultdict

from fastapi import APIRouter
from sqlalchemy import select
from sqlalchemy.orm import Session

from farm import answers, catalog, pricing
from farm.accounts import Caller
from farm.api.auth import Reader
from farm.api.problems import documented
from farm.db import transaction
from farm.errors import Invalid
from farm.tables import Measurement

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", responses=documented())
def list_models(caller: Reader) -> answers.Models:
    """What may be asked of each model, and what it costs this account."""
    models = catalog.catalog()
    with transaction() as db:
        measured = _measured(db)
        return answers.Models(
            models=[_model(m, _price(db, caller, m), measured[_identity(m)]) for m in models.values()],
            data=[answers.ModelListed(id=name) for name in models],
        )


def _identity(model: catalog.Model) -> tuple[str, str, str]:
    return model.name, model.revision, model.precision


def _measured(db: Session) -> dict[tuple[str, str, str], list[Measurement]]:
    """What was measured, by model, revision and precision: what it was before an update does not count."""
    found: dict[tuple[str, str, str], list[Measurement]] = defaultdict(list)
    for m in db.scalars(
        select(Measurement).order_by(Measurement.device, Measurement.width, Measurement.height)
    ):
        found[m.model, m.revision, m.precision].append(m)
    return found


def _price(db: Session, caller: Caller, model: catalog.Model) -> answers.Price | None:
    try:
        rates = pricing.current(
            db,
            account_id=caller.account_id,
            currency=caller.currency,
            models={model.name: model.price.method},
        )
    except Invalid:  # not for sale in this currency
        return None
    rate = rates[model.name]
    return answers.Price(method=rate.method, rate=pricing.shown(rate.rate), currency=rate.currency)


def _model(model: catalog.Model, price: answers.Price | None, measured: list[Measurement]) -> answers.Model:
    return answers.Model(
        name=model.name,
        title=model.title,
        licence=model.licence,
        pool=model.pool,
        side=answers.SideLimit(**model.side.model_dump()),
        steps=answers.StepsLimit(**model.steps.model_dump()),
        guidance=answers.GuidanceLimit(**model.guidance.model_dump()),
        negative_prompt=model.negative_prompt,
        samplers=list(model.samplers),
        sampler=model.sampler,
        price=price,
        family=model.family,
        revision=model.revision,
        pools=list(model.served_by),
        sizes=[answers.ModelSize(width=s.width, height=s.height) for s in model.sizes],
        loras=list(model.loras),
        controls=list(model.controls),
        takes=list(model.takes),
        measured=[
            answers.Measured(
                device=m.device,
                width=m.width,
                height=m.height,
                steps=m.steps,
                seconds=m.seconds,
                peak_bytes=m.peak_bytes,
                measured_at=m.measured_at,
            )
            for m in measured
        ],
    )
