"""The models the farm serves."""

from fastapi import APIRouter
from sqlalchemy.orm import Session

from farm import answers, catalog, pricing
from farm.accounts import Caller
from farm.api.auth import Reader
from farm.api.problems import documented
from farm.db import transaction
from farm.errors import Invalid

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", responses=documented())
def list_models(caller: Reader) -> answers.Models:
    """What may be asked of each model, and what it costs this account."""
    with transaction() as db:
        return answers.Models(models=[_model(m, _price(db, caller, m)) for m in catalog.catalog().values()])


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


def _model(model: catalog.Model, price: answers.Price | None) -> answers.Model:
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
    )
