"""Everything is killed while the farm renders; nothing is lost, billed twice or stored wrong.

    pytest tests/test_chaos.py        under a minute
    make chaos FRAMES=10000           as long as it takes
    FARM_CHAOS_STORE=s3 make chaos    with an S3 store behind a proxy that is hostile
    FARM_CHAOS_ENGINE=step make chaos    with frames that go step by step, and on from their checkpoints

docs/reliability.md says what is promised and what was measured.
"""

import os
import random
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from redis import Redis as RedisClient
from sqlalchemy import text

from farm import db, queue
from farm.db import transaction
from farm.embedded.postgres import Postgres
from farm.embedded.redis import Redis
from farm.settings import settings
from migrations import upgrade
from tests.chaos.engine import BAD, POISON
from tests.chaos.faults import POINTS, RESUMED, STORE_FAULTS, Chance, Plan
from tests.chaos.house import Crew, Fault, House, Verbs, take_guards
from tests.chaos.variants import BETWEEN, GUARDS
from tests.factories import account, ask, must_claim, settle, statuses, submit, until_blocked
from tests.hostile import STORM, Proxy, s3_server

ENGINE = os.environ.get("FARM_CHAOS_ENGINE", "pipe")  # or step
FRAMES = int(os.environ.get("FRAMES", "150"))
STORE = os.environ.get("FARM_CHAOS_STORE", "folder")  # or s3: behind the hostile proxy
LONG = FRAMES >= 2000
HITS = 20 if LONG else 1
KILLS = FRAMES // 5 if LONG else 0  # in all, wherever
JOB = 25 if FRAMES <= 500 else 250
WORKERS, NODES = 4, 1
DEADLINE_S = 120 + FRAMES * 0.8  # most of it needed only where others take the CPU

# with FRAMES set this is a run of `make chaos`, which takes what is marked slow
pytestmark = [
    pytest.mark.timeout(DEADLINE_S + 60),
    *([pytest.mark.slow] if "FRAMES" in os.environ else []),
]

FAILS_AS = {
    "result, then bill": "unbilled",
    "bill without UNIQUE, then result": "billed twice",
    "key without the hash, prompt reclaim": "image ≠ hash",
}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="farm-chaos-"))
    path.chmod(0o755)  # as root Postgres runs as nobody
    yield path
    if "KEEP" not in os.environ:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="module")
def crew(folder: Path) -> Iterator[Crew]:
    crew = Crew(folder / "crew")
    yield crew
    crew.stop()


@pytest.fixture(scope="module")
def servers(folder: Path, crew: Crew) -> Iterator[tuple[Postgres, Redis]]:
    """A Postgres and a Redis that nobody else uses: they are killed here."""
    postgres, redis = Postgres(folder), Redis(folder)
    postgres.start()
    redis.start()
    upgrade(postgres.create_database("migrated"))
    crew.wait()
    yield postgres, redis
    postgres.stop("immediate")
    redis.stop()


@pytest.fixture(scope="module")
def s3(folder: Path) -> Iterator[int]:
    (folder / "s3").mkdir()
    with s3_server(folder / "s3") as port:
        yield port


@pytest.fixture
def proxy(request: pytest.FixtureRequest) -> Iterator[Proxy | None]:
    """What the farm reaches S3 through, in a storm; None where images live in a folder."""
    if STORE != "s3":
        yield None
        return
    with Proxy(request.getfixturevalue("s3")).running() as running:
        running.weather = STORM
        yield running


def build(
    folder: Path,
    servers: tuple[Postgres, Redis],
    name: str,
    *,
    proxy: Proxy | None = None,
    stepwise: bool = False,
    **plan: object,
) -> House:
    postgres, redis = servers
    images = folder / f"{name}-images"
    images.mkdir()
    url = postgres.create_database(name, "migrated")
    attempts = 20 if LONG else 5  # killed alone so often and innocent: hardly ever
    plan = Plan(tally=str(folder / f"{name}-tally"), **plan)
    return House(name, url, redis.url, images, plan, attempts, proxy, stepwise)


# ------------------------------------------------------------------------------------------ the product


def test_nothing_is_lost_or_billed_twice_whatever_is_killed(folder, servers, crew, proxy, capsys):
    each = Chance(first=0.06 if LONG else 0.2, until=HITS, then=0.04 if LONG else 0)
    # who thaws too late may be told so before it settles, or be killed: another one freezes then
    frozen = Chance(first=0.1, until=1, then=0.005 if LONG else 0, aim="refused by the fence")
    house = build(
        folder,
        servers,
        "farm",
        kills=dict.fromkeys(POINTS, each),
        freezes={"rendered": frozen, "stored": frozen},
        store_faults=dict.fromkeys(STORE_FAULTS, each),
        proxy=proxy,
        stepwise=ENGINE == "step",
    )
    with house.entered():
        started = time.monotonic()
        fill(house)
        house.staff(crew, workers=WORKERS, nodes=NODES)
        torment(house, servers, crew)
        crew.drop(house.name)
        took_s = time.monotonic() - started
        wrongs = house.wrongs()
        shown = report(house, crew, took_s)
    with capsys.disabled():
        print(shown)  # noqa: T201

    assert wrongs == {}
    assert too_seldom(house) == []
    assert crew.logs("a burst failed") == []


def fill(house: House) -> None:
    """Jobs of several accounts, classes and keys; the same picture twice; frames that cannot be drawn."""
    house.open_accounts(3)
    same = 7
    left = FRAMES
    while left > 0:
        caller = random.choice(house.callers)
        count = min(left, JOB)
        house.submit(
            caller, count, priority=random.choice((1, 5, 5, 9)), steps=random.choice((3, 4)), seed=same
        )
        left -= count
        same += random.choice((0, JOB))
    house.submit(house.callers[0], 3, prompt=BAD)
    house.submit(house.callers[1], 1, prompt=POISON)


def wanted() -> dict[str, int]:
    """How often each thing has to happen at least."""
    return {
        **dict.fromkeys(POINTS, HITS),
        **dict.fromkeys(STORE_FAULTS, HITS),
        "killed at random": HITS,
        "refused by the fence": 1,
        "Redis flushed": 1,
        "Redis killed": 1,
        "Postgres stopped immediate": 1,
        "sweep killed": 1,
        **(dict.fromkeys(STORM, HITS) if STORE == "s3" else {}),
        **({RESUMED: HITS} if ENGINE == "step" else {}),
    }


def too_seldom(house: House) -> list[str]:
    """What has not yet happened as often as it has to."""
    missing = [name for name, least in wanted().items() if house.count(name) < least]
    return [*missing, *(["kills"] if kills(house) < KILLS else [])]


def kills(house: House) -> int:
    """How many workers were killed in the middle of something."""
    return sum(house.count(point) for point in (*POINTS, "killed at random"))


def torment(house: House, servers: tuple[Postgres, Redis], crew: Crew) -> None:
    """Let faults befall the farm until every frame has ended and every fault has happened often enough."""
    postgres, redis = servers
    verbs = Verbs(house, cancel=0.003 if LONG else 0.03)  # or hardly anything is left to render

    def crash_postgres() -> None:
        postgres.stop("immediate")
        time.sleep(random.uniform(0, 0.5))
        postgres.start()
        db.engine().dispose()  # our own connections are dead as well

    def crash_redis() -> None:
        redis.kill()
        time.sleep(random.uniform(0, 0.5))
        redis.start()

    def flush_redis() -> None:
        with RedisClient.from_url(redis.url) as client:
            client.flushall()

    slower = 3 if LONG else 1
    faults = [
        Fault("Redis flushed", 4 * slower, flush_redis),
        Fault("Redis killed", 10 * slower, crash_redis),
        Fault("Postgres stopped immediate", 10 * slower, crash_postgres),
        Fault("sweep killed", 4 * slower, lambda: crew.kill(f"{house.name}-sweep")),
        Fault("a verb on a job", 0.5 * slower, verbs.say),
        Fault("tried to kill at random", 1 * slower, lambda: house.kill_a_busy_worker(crew)),
    ]
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        time.sleep(0.1)
        house.thaw(crew)
        missing = too_seldom(house)
        if missing or LONG:
            for fault in faults:
                fault.befall(house.tally)
        else:
            verbs.relent()
        if missing and house.open_frames() < 20:
            house.submit(random.choice(house.callers), 16, seed=random.randrange(1 << 40))
        elif not missing and house.at_rest():
            return
    left = house.ask("SELECT status, count(*) FROM frames WHERE ended_at IS NULL GROUP BY status")
    pytest.fail(f"after {DEADLINE_S:.0f} s frames are {left}, and there was too little of {missing}")


def report(house: House, crew: Crew, took_s: float) -> str:
    """What happened, a line each."""
    counts = house.tally.all()
    lost = house.ask("SELECT count(*) FROM packs WHERE outcome = 'lost'")[0][0]
    ended = house.ask("SELECT status, reason, count(*) AS n FROM frames GROUP BY 1, 2 ORDER BY 1, 2")
    if house.proxy:
        counts |= house.proxy.happened
    rows = [("killed when " + point, counts.pop(point, 0)) for point in POINTS]
    rows += [*counts.items(), ("kills in all", kills(house)), ("packs reclaimed", lost)]
    rows += [(f"frames {r.status}{': ' + r.reason if r.reason else ''}", r.n) for r in ended]
    rows += [("seconds", round(took_s, 1)), ("frames/s", round(sum(r.n for r in ended) / took_s, 1))]
    errors = Counter(
        re.sub(r"[0-9a-f-]{36}|\d+", "#", line.split(" ERROR ")[1]) for line in crew.logs(" ERROR ")
    )
    rows += [(f"ERROR {line[:90]}", n) for line, n in errors.most_common(20)]
    return "\n" + "\n".join(f"{name:<100} {value:>8}" for name, value in rows)


@pytest.mark.skipif(STORE == "s3", reason="the long run has this store already")
def test_nothing_is_lost_behind_a_store_in_a_storm(folder, servers, crew, s3, capsys):
    # given S3 like B2's, that refuses, cuts, damages and is slow, and workers that die between storing and booking
    once = Chance(first=0.3, until=1)
    with Proxy(s3).running() as proxy:
        house = build(folder, servers, "storm", proxy=proxy, kills={"stored": once, "before commit": once})
        proxy.weather = dict.fromkeys(STORM, 0.06)
        with house.entered():
            house.open_accounts(1)

            # when
            for k in range(4):
                house.submit(house.callers[0], 12, seed=100 * k)
            house.staff(crew, workers=3)
            until_at_rest(house)
            crew.drop(house.name)

            # then
            wrongs = house.wrongs()
    with capsys.disabled():
        print(f"\nstorm: {dict(proxy.happened)}", end="")  # noqa: T201
    assert wrongs == {}
    assert sum(proxy.happened.values()) > 5


@pytest.mark.skipif(ENGINE == "step", reason="the long run goes step by step already")
def test_nothing_is_lost_of_frames_that_go_step_by_step(folder, servers, crew):
    # given workers that die with frames at different steps in hand
    once = Chance(first=0.3, until=1)
    points = ("claimed", "rendered", "stored", "before commit", "in the transaction", "after commit")
    house = build(folder, servers, "steps", stepwise=True, step_s=0.03, kills=dict.fromkeys(points, once))
    with house.entered():
        house.open_accounts(2)

        # when
        for k in range(6):
            house.submit(house.callers[k % 2], 8, seed=100 * k, steps=10 + 5 * k, priority=1 + k % 2)
        house.staff(crew, workers=3)
        await_that(lambda: "killed at random" in house.tally.all(), lambda: house.kill_a_busy_worker(crew))
        until_at_rest(house)
        crew.drop(house.name)

        # then
        assert house.wrongs() == {}
        assert house.ask("SELECT DISTINCT status FROM frames") == [("done",)]
        assert house.count(RESUMED) > 0
        assert kills(house) > 1


def await_that(holds, do) -> None:
    """Do it until it holds."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        do()
        time.sleep(0.1)


def until_at_rest(house: House) -> None:
    deadline = time.monotonic() + 90
    while not house.at_rest():
        assert time.monotonic() < deadline, "frames are left"
        time.sleep(0.1)


# ------------------------------------------------------------------------------------------ clocks

DAY_S = 86400.0
# everything that says when: all of it by the database's clock
TIMES = """
    SELECT 'job' AS of, created_at AS at FROM jobs UNION ALL SELECT 'job', ended_at FROM jobs
    UNION ALL SELECT 'job id', to_timestamp(('x' || left(replace(id::text, '-', ''), 12))::bit(48)::bigint / 1000.0)
    FROM jobs
    UNION ALL SELECT 'frame', ended_at FROM frames
    UNION ALL SELECT 'pack', claimed_at FROM packs UNION ALL SELECT 'pack', closed_at FROM packs
    UNION ALL SELECT 'lease', lease_until FROM packs
    UNION ALL SELECT 'usage', at FROM usage
    UNION ALL SELECT 'price', lower(p.valid) FROM prices AS p WHERE p.id IN (SELECT price_id FROM usage)
    UNION ALL SELECT 'image', created_at FROM images
    UNION ALL SELECT 'event', at FROM events
"""


def test_a_clock_that_is_wrong_on_a_worker_or_a_sweep_changes_nothing(folder, servers, crew):
    # given workers a day late and a day early, beside one that is right, and a sweep that is a day early
    house = build(folder, servers, "clocks")
    with house.entered():
        house.open_accounts(1)
        began = house.ask("SELECT clock_timestamp()")[0][0]
        for name, role, clock_s in (
            ("late", "worker", -DAY_S),
            ("early", "worker", DAY_S),
            ("sweep", "sweep", DAY_S),
        ):
            crew.keep(f"clocks-{name}", role, house.env(), replace(house.plan, clock_s=clock_s))

        # when
        for seed in range(6):
            house.submit(house.callers[0], 16, seed=100 * seed)
        until_at_rest(house)
        crew.drop(house.name)

        # then all is as it is with right ones, and no lease was thought to have run out
        assert house.wrongs() == {}
        assert house.ask("SELECT DISTINCT outcome FROM packs") == [("settled",)]
        ended = house.ask("SELECT clock_timestamp()")[0][0]
        leased = timedelta(seconds=settings().lease_s)
        times = [(r.of, r.at) for r in house.ask(TIMES)]
        assert len({of for of, _ in times}) == 9
        assert [(of, at) for of, at in times if not began - leased <= at <= ended + leased] == []
        assert house.ask("SELECT count(DISTINCT worker) FROM packs") == [(2,)]

    # and their clocks were wrong
    today = datetime.now(UTC)
    for name, clock_s in (("late", -DAY_S), ("early", DAY_S), ("sweep", DAY_S)):
        logged = (folder / "crew" / f"clocks-{name}.log").read_text()
        assert f"{today + timedelta(seconds=clock_s):%Y-%m-%d}" in logged, name


# ------------------------------------------------------------------------------------------ negative controls


def test_the_same_checks_catch_the_variants_that_lose_money(folder, servers, crew, capsys):
    houses = [build_variant(folder, servers, k, name) for k, name in enumerate(GUARDS)]
    for house in houses:
        with house.entered():
            house.open_accounts(1)
            house.submit(house.callers[0], 12, seed=1)
        house.staff(crew, workers=3)  # the 12 frames are two packs: one worker at least is left alive

    found = {}
    for house in houses:
        with house.entered():
            await_rest(house, crew)
            found[house.plan.variant] = house.wrongs()

    with capsys.disabled():
        for variant, wrongs in found.items():
            print(f"\n{variant}: {dict(wrongs)}", end="")  # noqa: T201
    assert {v: FAILS_AS[v] for v in found if not found[v].get(FAILS_AS[v])} == {}
    assert all(house.tally.count(BETWEEN) for house in houses[:2])


def build_variant(folder: Path, servers: tuple[Postgres, Redis], k: int, name: str) -> House:
    """A farm that works as the variant does, and is hit where it hurts once or twice, then never again."""
    if FAILS_AS[name] == "image ≠ hash":
        where = {"freezes": {"rendered": Chance(first=1, until=1)}}
    else:
        where = {"kills": {BETWEEN: Chance(first=1, until=2)}}
    house = build(folder, servers, f"variant{k}", variant=name, **where)
    take_guards(house.url, GUARDS[name])
    return house


def await_rest(house: House, crew: Crew) -> None:
    """Wait until every frame has ended; then let what was frozen thaw and do its worst, and wait again."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.1)
        if not house.at_rest():
            continue
        if not crew.frozen(house.name):
            return
        refused = house.tally.count("refused by the fence")
        house.thaw(crew)
        while house.tally.count("refused by the fence") == refused and time.monotonic() < deadline:
            time.sleep(0.1)
    pytest.fail(f"{house.plan.variant}: frames are left, or the frozen worker did not wake")


# ------------------------------------------------------------------------------------------ found here, made certain


def test_a_settle_that_waited_for_an_extension_of_its_lease_books_its_frames(books):
    """In one statement with the lock, the close of the pack crashed Postgres 18.4: signal 11."""
    job = submit(account(), 4)
    pack = must_claim()

    with ThreadPoolExecutor(1) as thread:
        with transaction() as session:
            queue.extend(session, worker="a", packs=[pack.id])
            late = thread.submit(settle, pack)
            until_blocked()

        assert len(late.result().done) == 4

    assert statuses(job) == ["done"] * 4


def test_extending_locks_packs_in_the_order_in_which_settling_does(books):
    """In the order of the table it was a deadlock each few thousand frames."""
    submit(account(), 8)
    packs = [must_claim(), must_claim()]
    ask("UPDATE packs SET frames = frames WHERE id = :first", first=packs[0].id)  # now the last of the table

    def extend() -> queue.Extended:
        with transaction() as session:
            session.execute(text("SET LOCAL enable_indexscan = off"))  # as it is planned for a small table
            session.execute(text("SET LOCAL enable_bitmapscan = off"))
            return queue.extend(session, worker="a", packs=[p.id for p in packs])

    with ThreadPoolExecutor(1) as thread:
        with transaction() as session:
            settle(packs[0], db=session)
            late = thread.submit(extend)
            until_blocked()
            settle(packs[1], db=session)  # a deadlock, if the extension had locked this one first

        assert late.result().packs == {}
