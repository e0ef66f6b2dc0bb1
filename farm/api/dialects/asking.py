"""From a dialect's fields to a Submission, with its faults by the dialect's names."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from farm.api.dialects.served import as_called
from farm.errors import Fault, Invalid
from farm.faults import faults_in
from farm.submissions import Submission
from farm.webhooks import ShapedCallback

# above 0, which says any in some dialects, and with room for a job's others: vendors have seeds of 32 bits, and
# JavaScript loses digits of numbers beyond 2⁵³
SEEDS = 2**32 - 1000


class VendorInput(BaseModel):
    """What a vendor's model takes. null is as good as left out; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    ignored: ClassVar[frozenset[str]] = frozenset()  # what only tunes the vendor's own hosting

    @model_validator(mode="before")
    @classmethod
    def _without_ignored(cls, sent: Any) -> Any:
        if not isinstance(sent, dict):
            return sent
        return {k: v for k, v in sent.items() if k not in cls.ignored and v is not None}


def submission(*specs: Mapping[str, Any], names: Mapping[str, str], **job: Any) -> Submission:
    """A job of these specs; what is None is left open. names: what the dialect calls the spec's fields.

    A seed that is left open is drawn here, so that every client can read it in an answer and send it again.
    Raises Invalid.
    """
    asked = [{name: value for name, value in spec.items() if value is not None} for spec in specs]
    for one in asked:
        one.setdefault("seed", secrets.randbelow(SEEDS) + 1)
    said = {name: value for name, value in job.items() if value is not None}
    try:
        if len(asked) == 1:
            return Submission.model_validate({"spec": asked[0], **said})
        return Submission.model_validate({"specs": asked, **said})
    except ValidationError as e:
        faults = faults_in(e, Submission)
        # of several specs it has to be said which
        raise Invalid(as_called(faults, names) if len(asked) == 1 else faults) from None


def callback(url: str, kinds: Sequence[str], *, shape: str, base: str, field: str) -> ShapedCallback:
    """Where to tell of a job, in the dialect's own shape; base: how the caller reached the farm, for links.

    Raises Invalid naming the dialect's field; whether it may be told is looked at when the job is submitted.
    """
    try:
        return ShapedCallback(url=url, kinds=list(dict.fromkeys(kinds)), shape=shape, base=base)
    except ValidationError:
        raise Invalid([Fault(field, url, "it must be an https:// URL of up to 4096 characters")]) from None
