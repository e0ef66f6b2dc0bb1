"""Waiting for the end of a job, and listening to what happens, over real connections."""

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from farm import accounts, events, jobs, sweep
from farm.accounts import Caller
from farm.api import feed as feeding
from farm.api.feed import Feed, Listener, Told
from farm.api.progress import Progress
from farm.budgets import Action
from farm.db import engine, transaction
from farm.ids import public
from tests.factories import account, ask, claim, must_claim, one, settle, submit


def relayed() -> None:
    with transaction() as db:
        events.relay(db)


def finished(caller: Caller, count: int = 1) -> UUID:
    job = submit(caller, count)
    while pack := claim():
        settle(pack)
    return job


@asynccontextmanager
async def following(progress: Progress | None = None) -> AsyncIterator[Feed]:
    feed = Feed(progress or Progress(""))
    task = asyncio.create_task(feed.follow())
    await until(lambda: feed.state == "up")
    try:
        yield feed
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(reached: Callable[[], Any], limit_s: float = 20.0) -> None:
    async with asyncio.timeout(limit_s):
        while not reached():
            await asyncio.sleep(0.01)


async def off(work: Callable[..., Any], *facts: Any) -> Any:
    return await asyncio.to_thread(work, *facts)


async def first(listener: Listener, count: int, limit_s: float = 20.0) -> list[Told]:
    told: list[Told] = []
    async with asyncio.timeout(limit_s):
        while len(told) < count:
            some = await listener.some(1)
            assert some is not None, f"closed after {told}"
            told += some
    return told


async def rest(listener: Listener, limit_s: float = 20.0) -> list[Told]:
    async with asyncio.timeout(limit_s):
        return [told async for told in listener]


# ------------------------------------------------------------------------------------------------ waiting


def test_a_wait_ends_with_the_job(books: str) -> None:
    caller = account()

    async def run() -> None:
        job = submit(caller)
        async with following() as feed:
            waiting = asyncio.create_task(feed.ended(caller.account_id, job, 20))
            await until(lambda: feed.waiters == 1)
            await asyncio.sleep(0.1)
            assert not waiting.done()

            await off(settle, must_claim())
            await off(relayed)

            assert await asyncio.wait_for(waiting, feeding.LOOK_EVERY_S)
            assert feed.waiters == 0

    asyncio.run(run())


def test_a_job_that_has_ended_is_not_waited_for(books: str) -> None:
    caller = account()
    done, stopped = finished(caller), submit(caller)
    with transaction() as db:
        jobs.cancel(db, caller.account_id, stopped)

    async def run() -> list[bool]:
        async with following() as feed:
            return [await feed.ended(caller.account_id, job, 5) for job in (done, stopped)]

    assert asyncio.run(run()) == [True, True]


def test_a_wait_that_runs_out_says_so_and_leaves_nothing_behind(books: str) -> None:
    caller = account()

    async def run() -> None:
        async with following() as feed:
            assert not await feed.ended(caller.account_id, submit(caller), 0.2)
            assert feed.waiters == 0

    asyncio.run(run())


def test_another_accounts_job_is_waited_for_in_vain(books: str) -> None:
    acme, umbrella = account(), account("umbrella")
    job = finished(acme)

    async def run() -> list[bool]:
        async with following() as feed:
            return [await feed.ended(a.account_id, job, 0.5) for a in (acme, umbrella)]

    assert asyncio.run(run()) == [True, False]


def test_three_hundred_waits_take_two_connections_and_no_thread(books: str) -> None:
    caller = account()
    made = [submit(caller) for _ in range(30)]

    async def run() -> None:
        async with following() as feed:
            before = threading.active_count()
            waits = [
                asyncio.create_task(feed.ended(caller.account_id, job, 30)) for job in made for _ in range(10)
            ]
            await until(lambda: feed.waiters == 300)
            assert threading.active_count() == before
            assert one("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()") <= 2

            def work() -> None:
                while pack := claim():
                    settle(pack)
                relayed()

            await off(work)
            assert all(await asyncio.gather(*waits))

    asyncio.run(run())


def test_a_wait_outlives_its_connection(books: str) -> None:
    caller = account()
    job = submit(caller)

    async def run() -> None:
        async with following() as feed:
            waiting = asyncio.create_task(feed.ended(caller.account_id, job, 20))
            await until(lambda: feed.waiters == 1)
            await off(cut_off)
            await off(settle, must_claim())
            await off(relayed)
            assert await waiting

    asyncio.run(run())


def cut_off() -> None:
    """End every connection but our own, as a restart of the database does."""
    ask(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    engine().dispose()  # those of our own pool


def test_who_waits_is_let_go_when_the_process_ends(books: str) -> None:
    caller = account()

    async def run() -> None:
        async with following() as feed, feed.listen(caller.account_id, None) as listener:
            waiting = asyncio.create_task(feed.ended(caller.account_id, submit(caller), 60))
            await until(lambda: feed.waiters == 1)
            feed.stop()
            assert await asyncio.wait_for(waiting, 2) is False
            assert await rest(listener, 2) == []
            assert listener.closed == "stopped"

    asyncio.run(run())


# ------------------------------------------------------------------------------------------------ listening


def test_a_jobs_listener_hears_all_of_it_once_and_in_order(books: str) -> None:
    caller = account()
    job = submit(caller, 6)
    relayed()  # accepted: from before

    async def run() -> list[Told]:
        async with following() as feed, feed.listen(caller.account_id, job) as listener:
            heard = await first(listener, 1)
            for _ in range(2):
                await off(settle, await off(lambda: must_claim(frames=3)))
                await off(relayed)
            return heard + await rest(listener)

    told = asyncio.run(run())

    assert [t.kind for t in told] == ["job.accepted", *["frame.done"] * 6, "job.finished"]
    assert [t.number for t in told] == list(range(1, 9))


def test_what_happens_while_the_connection_is_away_is_heard_when_it_is_back(books: str) -> None:
    caller = account()
    job = submit(caller, 4)
    relayed()

    async def run() -> list[Told]:
        async with following() as feed, feed.listen(caller.account_id, job) as listener:
            heard = await first(listener, 1)
            await off(cut_off)
            await off(settle, await off(must_claim))
            await off(relayed)
            return heard + await rest(listener)

    assert [t.number for t in asyncio.run(run())] == [1, 2, 3, 4, 5, 6]


def test_a_listener_goes_on_after_any_number(books: str) -> None:
    caller = account()
    job = finished(caller, 3)
    relayed()

    async def run() -> list[list[int | None]]:
        heard = []
        async with following() as feed:
            for after in range(6):
                async with feed.listen(caller.account_id, job, after=after) as listener:
                    heard.append([t.number for t in await rest(listener)])
        return heard

    assert asyncio.run(run()) == [list(range(after + 1, 6)) for after in range(6)]


def test_one_that_does_not_read_is_bounded_and_misses_nothing(
    books: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "BUFFERED", 5)
    monkeypatch.setattr(feeding, "PAGE", 4)
    caller = account()
    job = submit(caller, 20)
    relayed()

    async def run() -> list[Told]:
        async with (
            following() as feed,
            feed.listen(caller.account_id, job) as slow,
            feed.listen(caller.account_id, job) as quick,
        ):
            heard = await first(slow, 1)
            await first(quick, 1)
            while pack := await off(lambda: claim(frames=1)):
                await off(settle, pack)
                await off(relayed)
                await first(quick, 1)  # it hears each as it happens, whatever the other does
                assert len(slow._live) <= 5
            return heard + await rest(slow)

    assert [t.number for t in asyncio.run(run())] == list(range(1, 23))


def test_a_listener_hears_only_the_kinds_it_asked_for_and_still_of_the_end(books: str) -> None:
    caller = account()
    job = submit(caller, 3)
    relayed()

    async def run() -> list[Told]:
        async with (
            following() as feed,
            feed.listen(caller.account_id, job, kinds=("frame.failed", "job.accepted")) as listener,
        ):
            heard = await first(listener, 1)
            await off(settle, await off(must_claim))
            await off(relayed)
            heard += await rest(listener)
            assert listener.closed == "ended"
            return heard

    assert [t.kind for t in asyncio.run(run())] == ["job.accepted"]


def test_an_account_hears_its_own_jobs_from_now_on_and_nobody_elses(books: str) -> None:
    acme, umbrella = account(), account("umbrella")
    submit(acme)
    relayed()

    async def run() -> list[Told]:
        async with following() as feed, feed.listen(acme.account_id, None) as listener:
            assert await listener.some(0.2) == []
            await off(submit, umbrella)
            mine = await off(submit, acme)
            await off(relayed)
            told = await first(listener, 1)
            assert told[0].job_id == mine
            return told + (await listener.some(0.3) or [])

    assert [t.kind for t in asyncio.run(run())] == ["job.accepted"]


def test_a_listener_is_closed_soon_after_its_key_was_revoked(
    books: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "KEYS_EVERY_S", 0.05)
    caller = account()
    with transaction() as db:
        owner = accounts.find(db, "acme")
        good, bad = (accounts.issue_key(db, owner) for _ in range(2))

    async def run() -> None:
        async with (
            following() as feed,
            feed.listen(caller.account_id, None, key=good[1]) as kept,
            feed.listen(caller.account_id, None, key=bad[1]) as closed,
        ):

            def revoke() -> None:
                with transaction() as db:
                    accounts.revoke_key(db, bad[0].id)

            await off(revoke)
            assert await rest(closed, 5) == []
            assert (closed.closed, kept.closed) == ("revoked", "")

    asyncio.run(run())


# ------------------------------------------------------------------------------------------------ steps


def test_steps_and_previews_reach_who_asked_for_them_and_carry_no_number(books: str) -> None:
    caller, stranger = account(), account("umbrella")
    job = submit(caller)
    relayed()
    progress = Progress("")

    async def run() -> None:
        async with (
            following(progress) as feed,
            feed.listen(caller.account_id, job, previews=True) as asked,
            feed.listen(caller.account_id, job, kinds=("job.*",)) as plain,
            feed.listen(caller.account_id, None, kinds=("progress",)) as whole,
            feed.listen(stranger.account_id, None, kinds=("progress",)) as other,
        ):
            await first(asked, 1)
            await first(plain, 1)
            for listener in (whole, other):
                assert await listener.some(0) == []

            def step() -> None:
                progress.take(f'{{"steps": [["{job.hex}", 0, 1, 3, 4]]}}')

            step()
            progress.take(f'{{"preview": ["{job.hex}", 0, 1, "aGVsbG8="]}}')
            steps, preview = await first(asked, 2)
            assert (steps.kind, steps.number) == ("progress", None)
            assert steps.data == {"frames": [{"index": 0, "progress": 0.75}]}
            assert (preview.kind, preview.data["image"]) == ("preview", "aGVsbG8=")
            assert public("job", job).encode() in steps.sse
            assert b"\nid:" not in steps.sse

            await until(lambda: feed._owners.get(job.hex))  # whose job it is was asked meanwhile
            step()
            assert [t.kind for t in await first(whole, 1)] == ["progress"]
            for listener in (plain, other):
                assert await listener.some(0.3) == []

    asyncio.run(run())


# ------------------------------------------------------------------------------------------------ the relay


@contextmanager
def relaying() -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=sweep.relay, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_the_relay_speaks_soon_after_a_commit_and_survives_the_database(books: str) -> None:
    caller = account()

    async def run() -> None:
        async with following() as feed:
            for round_ in range(2):
                job = await off(submit, caller)
                waiting = asyncio.create_task(feed.ended(caller.account_id, job, 20))
                await off(settle, await off(must_claim))
                began = asyncio.get_running_loop().time()
                assert await waiting
                if round_ == 0:
                    assert asyncio.get_running_loop().time() - began < feeding.LOOK_EVERY_S / 2
                    await off(cut_off)

    with relaying():
        asyncio.run(run())


def test_kinds_are_names_sorts_or_all() -> None:
    some = events.wants(("job.*", "frame.failed"))

    assert [some(k) for k in ("job.finished", "frame.failed", "frame.done", "jobs.x")] == [
        True,
        True,
        False,
        False,
    ]
    assert events.wants(())("anything.else")
    assert events.wants(("*",))("frame.done")
    for bad in (
        "Job.*",
        "job.**",
        "",
        "job.x.y",
        "a" * 99,
        "job.\x00",
        "job.finnished",
        "jobs.*",
        "progress.*",
    ):
        with pytest.raises(Exception, match=r"allowed are kinds of events: \*, job\.\*"):
            events.checked_kinds([bad], field="kinds")


def test_every_kind_that_is_recorded_may_be_asked_for() -> None:
    sources = [*Path(events.__file__).parent.rglob("*.sql"), *Path(events.__file__).parent.rglob("*.py")]
    recorded = {
        kind
        for source in sources
        for kind in re.findall(
            r"""(?:'|record\(\s*db, ")((?:job|frame|usage|webhook)\.[a-z_]+)['"]""", source.read_text()
        )
    }

    assert {"job.accepted", "job.late", "frame.failed", "usage.reversed"} <= recorded
    assert recorded | {f"budget.{action}" for action in Action} <= set(events.KINDS)
    assert set(events.checked_kinds(events.KINDS[:20], field="kinds")) == set(events.KINDS[:20])
