"""Prompt help by a text model: any OpenAI-compatible API that FARM_ENHANCER_URL names.

Asked before a job is submitted, holding neither a thread nor a connection of the database. What it does not answer in
time, or not sensibly, the template of farm/prompting.py does instead, and the spec says so by enhanced_by.
"""

import asyncio
import json
import logging
from collections import OrderedDict
from typing import Any

import httpx

from farm.prompting import TEMPLATE
from farm.settings import settings
from farm.spec import MAX_PROMPT, Asked, Helped
from farm.submissions import Submission

log = logging.getLogger(__name__)

FELL_BACK = f"{TEMPLATE}: the text model did not answer"
TOO_MANY = f"{TEMPLATE}: too many prompts for the text model"
MOST = 64  # prompts of one submission
AT_ONCE = 8
MAX_ANSWER = 64 << 10  # bytes
KEPT = 1000  # prompts whose answer is remembered: a repeat asks for the same picture
ORDER = (
    "You improve prompts for an image generator. Keep every thing, number, colour and place the prompt names. Add what"
    " it lacks: light, material, composition. Answer with the prompt alone, in the prompt's language, as plain text of"
    " at most 80 words."
)

_known: OrderedDict[tuple[str, str], str] = OrderedDict()


async def helped(submission: Submission) -> Submission:
    """The submission with the prompts that ask for help helped by the text model, where the farm has one."""
    wanted = {a.prompt for _, a in submission.asked() if a.prompt_enhancement and not isinstance(a, Helped)}
    if not settings().enhancer_url or not wanted:
        return submission
    answers: dict[str, str | None] = dict.fromkeys(wanted)
    if len(wanted) <= MOST:
        room = asyncio.Semaphore(AT_ONCE)
        async with httpx.AsyncClient(trust_env=False, timeout=settings().enhancer_s) as client:
            found = await asyncio.gather(*(_ask(client, room, prompt) for prompt in wanted))
        answers = dict(zip(wanted, found, strict=True))
    why = FELL_BACK if len(wanted) <= MOST else TOO_MANY

    def with_help(asked: Asked) -> Asked:
        if not asked.prompt_enhancement or isinstance(asked, Helped):
            return asked
        answer = answers[asked.prompt]
        said = {name: getattr(asked, name) for name in asked.model_fields_set}
        by = why if answer is None else settings().enhancer_model or "text model"
        return Helped.model_construct(asked.model_fields_set, **said, helped_prompt=answer, helped_by=by)

    if submission.spec is not None:
        return submission.model_copy(update={"spec": with_help(submission.spec)})
    return submission.model_copy(update={"specs": [with_help(a) for a in submission.specs or []]})


async def _ask(client: httpx.AsyncClient, room: asyncio.Semaphore, prompt: str) -> str | None:
    """What the text model makes of a prompt; None if that is nothing to render."""
    key = (settings().enhancer_model, prompt)
    if key in _known:
        _known.move_to_end(key)
        return _known[key]
    try:
        async with room, asyncio.timeout(settings().enhancer_s):
            answer = _text_in(await _post(client, prompt))
    except (httpx.HTTPError, TimeoutError, ValueError, LookupError, TypeError) as e:
        log.warning("the text model helped no prompt: %s", type(e).__name__)
        return None
    _known[key] = answer
    if len(_known) > KEPT:
        _known.popitem(last=False)
    return answer


async def _post(client: httpx.AsyncClient, prompt: str) -> Any:
    key = settings().enhancer_key.get_secret_value()
    body = {
        "model": settings().enhancer_model,
        "messages": [{"role": "system", "content": ORDER}, {"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 300,
    }
    sent = client.stream(
        "POST",
        f"{settings().enhancer_url.rstrip('/')}/chat/completions",
        json=body,
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )
    async with sent as answer:
        if answer.status_code != 200:  # a redirect too: the key goes nowhere else
            raise ValueError(f"it answers {answer.status_code}")
        data = bytearray()
        async for part in answer.aiter_bytes():
            data += part
            if len(data) > MAX_ANSWER:
                raise ValueError("it answers at length")
    return json.loads(data)


def _text_in(answer: Any) -> str:
    """Raises ValueError, LookupError or TypeError where there is none to be used."""
    said = answer["choices"][0]["message"]["content"]
    if not isinstance(said, str):
        raise TypeError("no text")
    text = said.replace("\0", "").strip().strip('"').strip()
    text = text.encode("utf-8", "ignore").decode()
    if not 0 < len(text) <= MAX_PROMPT:
        raise ValueError("no prompt of a prompt's length")
    return text
