"""Tokens: hints to workers, through a real Redis that may be away, frozen or flushed."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import kombu
import pytest
from redis import Redis as RedisClient

from farm import queue, tokens
from farm.db import transaction
from farm.embedded.process import free_port
from farm.embedded.redis import Redis
from farm.errors import BrokerAway, Misconfigured
from farm.settings import settings
from tests.factories import account, add_worker, ask, must_claim, retire, statuses, submit


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Connections of this test alone: the broker's address may be another."""
    settings.cache_clear()
    tokens.app.cache_clear()
    tokens._sender.cache_clear()
    yield
    tokens._forget() if settings().broker_url.get_secret_value() else None
    tokens.app.cache_clear()
    settings.cache_clear()


@pytest.fixture
def away(books: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker that nobody listens for."""
    monkeypatch.setenv("FARM_BROKER_URL", f"redis://127.0.0.1:{free_port()}/0")
    settings.cache_clear()


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when the background has tried to top up, whatever came of it."""
    tried, top_up = threading.Event(), tokens.top_up

    def top_up_and_tell(*args: object) -> int:
        try:
            return top_up(*args)  # type: ignore[arg-type]
        finally:
            tried.set()

    monkeypatch.setattr(tokens, "top_up", top_up_and_tell)
    return tried


@pytest.fixture
def frozen(redis: Redis) -> Iterator[None]:
    """Redis is stopped: it takes connections and answers none."""
    assert redis.pid is not None
    os.kill(redis.pid, signal.SIGSTOP)
    yield
    os.kill(redis.pid, signal.SIGCONT)


def top_up() -> int:
    with transaction() as db:
        return tokens.top_up(db)


def lying(model: str = "alpha") -> int:
    return tokens.waiting([model])[model]


def read(queues: list[str], count: int) -> list[tuple[str, int]]:
    """Messages as a worker of these queues gets them: model, and priority as the broker counts."""
    options = dict(tokens.app().conf.broker_transport_options)
    got: list[tuple[str, int]] = []
    with kombu.Connection(settings().broker_url.get_secret_value(), transport_options=options) as connection:
        channel = connection.channel()

        def take(body: list[list[str]], message: kombu.Message) -> None:
            got.append((body[0][0], message.properties["priority"]))
            message.ack()

        bound = [kombu.Queue(q, channel=channel) for q in queues]
        with kombu.Consumer(channel, bound, callbacks=[take], prefetch_count=1, accept=["json"]):
            while len(got) < count:
                connection.drain_events(timeout=20)
    return got


# ------------------------------------------------------------------------------------------------ priority


@pytest.mark.parametrize(("ours", "theirs"), [(9, 0), (5, 4), (1, 8), (0, 9)])
def test_redis_counts_priorities_the_other_way_round(database: str, ours: int, theirs: int) -> None:
    assert tokens.broker_priority(ours) == theirs


def test_another_broker_counts_as_we_do(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_BROKER_URL", "amqp://127.0.0.1//")
    settings.cache_clear()

    assert [tokens.broker_priority(p) for p in range(10)] == list(range(10))
    monkeypatch.setenv("FARM_BROKER_URL", "")


def test_the_most_urgent_token_is_read_first_on_whichever_queue_it_lies(database: str) -> None:
    # given
    for model, priority in (("alpha", 1), ("beta", 5), ("alpha", 0), ("beta", 1), ("alpha", 9), ("beta", 6)):
        tokens.send(model, priority=priority)

    # when
    got = read(["model.alpha", "model.beta"], 6)

    # then
    assert [priority for _, priority in got] == [0, 3, 4, 8, 8, 9]
    assert [model for model, _ in got[:3]] == ["alpha", "beta", "beta"]
    assert got[-1] == ("alpha", 9)


def test_every_one_of_the_ten_priorities_has_a_place_of_its_own(database: str) -> None:
    for priority in (4, 9, 0, 7, 2, 5, 8, 1, 6, 3):
        tokens.send("alpha", priority=priority)

    assert [p for _, p in read(["model.alpha"], 10)] == list(range(10))


def test_a_token_carries_the_model_and_nothing_else(database: str) -> None:
    tokens.send("alpha", priority=5)

    assert read(["model.alpha"], 1) == [("alpha", 4)]


# ------------------------------------------------------------------------------------------------ top up


def test_there_are_as_many_tokens_as_idle_workers_and_no_more(books: str) -> None:
    # given
    submit(account(), 40)
    for n in range(3):
        add_worker(f"w{n}", "alpha")
    add_worker("other", "beta")
    add_worker("draining", "alpha", state="draining")
    add_worker("gone", "alpha", state="gone")

    # when
    sent = [top_up() for _ in range(5)]

    # then
    assert sent == [3, 0, 0, 0, 0]
    assert lying() == 3


def test_a_million_frames_cost_a_handful_of_messages(books: str) -> None:
    # given as many frames as the books say, without storing them
    submit(account(), 1000)
    add_worker("a", "alpha")
    add_worker("b", "alpha")

    # when
    for _ in range(50):
        top_up()

    # then
    assert lying() == 2


def test_a_busy_worker_gets_no_token_and_a_lost_one_none_either(books: str) -> None:
    # given one renders, one was not heard of, one is idle
    submit(account(), 40)
    for name in ("busy", "silent", "idle"):
        add_worker(name, "alpha")
    must_claim("busy")
    ask("UPDATE workers SET seen_at = now() - interval '1 day' WHERE id = 'silent'")

    # then
    assert top_up() == 1


def test_a_worker_whose_lease_ran_out_counts_as_idle(books: str) -> None:
    submit(account(), 40)
    add_worker("a", "alpha")
    must_claim("a")
    assert top_up() == 0

    ask("UPDATE packs SET lease_until = clock_timestamp() - interval '1 s'")

    assert top_up() == 1


def test_a_worker_that_was_started_again_counts_as_idle(books: str) -> None:
    # given its process died with a pack in hand
    submit(account(), 40)
    add_worker("a", "alpha")
    must_claim("a")

    ask("UPDATE workers SET started_at = clock_timestamp()")

    assert top_up() == 1


def test_a_worker_whose_pack_is_off_the_device_counts_as_idle(books: str) -> None:
    # given what it rendered waits until it may be stored
    submit(account(), 40)
    add_worker("a", "alpha")
    pack = must_claim("a")

    with transaction() as db:
        queue.off_device(db, {pack.id: 12})

    assert top_up() == 1


def test_without_work_there_are_no_tokens(books: str) -> None:
    add_worker("a", "alpha")
    assert top_up() == 0

    submit(account())
    must_claim("a")
    retire()
    add_worker("b", "alpha")

    assert top_up() == 0


def test_an_urgent_class_may_exceed_the_workers_by_one(books: str) -> None:
    # given a token of bulk work lies there
    caller = account()
    add_worker("a", "alpha")
    submit(caller, priority="bulk")
    assert top_up() == 1

    # when
    submit(caller, priority="urgent", steps=5)
    sent = [top_up() for _ in range(4)]

    # then it overtakes
    assert sent == [1, 0, 0, 0]
    assert [p for _, p in read(["model.alpha"], 2)] == [0, 8]


def test_only_the_models_that_are_named_are_topped_up(books: str) -> None:
    submit(account("one"), model="alpha")
    submit(account("other"), model="beta")
    add_worker("a", "alpha", "beta")

    with transaction() as db:
        assert tokens.top_up(db, ["beta"]) == 1

    assert (lying("alpha"), lying("beta")) == (0, 1)


def test_tokens_that_a_flush_lost_are_sent_again(books: str, broker: str) -> None:
    # given
    submit(account(), 40)
    add_worker("a", "alpha")
    assert top_up() == 1

    # when
    with RedisClient.from_url(broker) as client:
        client.flushall()

    # then
    assert top_up() == 1
    assert read(["model.alpha"], 1) == [("alpha", 4)]


# ------------------------------------------------------------------------------------------------ wake


def test_waking_sends_a_token_in_the_background(books: str, woken: threading.Event) -> None:
    # given
    submit(account(), 5)
    add_worker("a", "alpha")

    # when
    tokens.wake(["alpha"])

    # then
    assert woken.wait(30)
    assert lying() == 1


def test_waking_many_times_sends_no_more_than_there_are_workers(books: str, woken: threading.Event) -> None:
    submit(account(), 5)
    add_worker("a", "alpha")

    for _ in range(500):
        tokens.wake(["alpha"])

    assert woken.wait(30)
    assert lying() == 1


def test_waking_without_a_broker_returns_at_once_and_raises_nothing(
    away: None, woken: threading.Event
) -> None:
    # given
    submit(account(), 5)
    add_worker("a", "alpha")

    # when
    began = time.monotonic()
    tokens.wake(["alpha"])
    spent = time.monotonic() - began

    # then
    assert spent < 0.05
    assert woken.wait(60)


def test_what_lies_in_a_broker_that_is_away_is_an_error_within_seconds(away: None) -> None:
    began = time.monotonic()

    with pytest.raises(BrokerAway):
        lying()
    with pytest.raises(BrokerAway):
        tokens.send("alpha", priority=5)

    assert time.monotonic() - began < 20


def test_a_frozen_broker_blocks_neither_a_wake_nor_a_submission(
    books: str, woken: threading.Event, frozen: None
) -> None:
    # given
    caller = account()
    add_worker("a", "alpha")

    # when
    began = time.monotonic()
    tokens.wake(["alpha"])
    spent = time.monotonic() - began
    job = submit(caller, 2)

    # then
    assert spent < 0.05
    assert statuses(job) == ["queued", "queued"]


def test_a_frozen_broker_is_given_up_within_seconds_and_used_again_when_it_answers(
    books: str, redis: Redis
) -> None:
    # given
    submit(account(), 2)
    add_worker("a", "alpha")
    assert lying() == 0
    assert redis.pid is not None

    # when
    os.kill(redis.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(BrokerAway):
            top_up()
        spent = time.monotonic() - began
    finally:
        os.kill(redis.pid, signal.SIGCONT)

    # then
    assert spent < 20
    assert top_up() == 1


def test_a_farm_without_a_broker_says_which_setting_is_missing(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_BROKER_URL", "")
    settings.cache_clear()

    with pytest.raises(Misconfigured, match="FARM_BROKER_URL"):
        tokens.app()


def test_a_token_outlives_the_longest_task(database: str) -> None:
    conf = tokens.app().conf

    assert conf.broker_transport_options["visibility_timeout"] > conf.task_time_limit
    assert conf.task_time_limit > settings().burst_s + settings().frame_limit_s
