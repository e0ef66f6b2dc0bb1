"""A node that is told to stop: it finishes within the grace, or gives back; and it always ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from farm import accounts, db, ledger, pricing, queue, submissions, tokens
from farm.accounts import Caller, Role
from farm.catalog import catalog
from farm.db import transaction
from farm.embedded.postgres import Postgres
from farm.settings import settings

ROOT = Path(__file__).parent.parent
PACK = catalog()["starter"].pack.frames
FRAMES = 3 * PACK
PATIENCE_S = 60.0  # for what takes a second or two on a machine that has nothing else to do

pytestmark = pytest.mark.timeout(240)


@contextmanager
def node(tmp_path: Path, *, step_s: float) -> Iterator[subprocess.Popen]:
    """A real node with a fake engine, at work on the first of its packs."""
    submit()
    with (tmp_path / "node.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.node", str(step_s), "--pool", "starter"],
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            await_that(lambda: ask("SELECT count(*) FROM workers WHERE state = 'up'") == 1)
            tokens.send("starter", priority=5)
            await_that(lambda: ask("SELECT count(*) FROM frames WHERE status = 'claimed'") > 0)
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def submit() -> None:
    with transaction() as session:
        pricing.sync(session, catalog())
    with transaction() as session:
        account = accounts.create(session, "acme")
        key, _ = accounts.issue_key(session, account)
        caller = Caller(account.id, account.name, account.currency, key.id, Role.SUBMIT)
        spec = {"prompt": "noise", "count": FRAMES, "steps": 100, "seed": 1}
        submissions.submit(session, caller, submissions.Submission(spec=spec))


def ask(statement: str) -> int:
    with transaction() as session:
        return session.scalar(text(statement))


def await_that(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def frames() -> dict[str, int]:
    with transaction() as session:
        return dict(
            session.execute(text("SELECT status, count(*) FROM frames GROUP BY status")).tuples().all()
        )


def blamed() -> int:
    return ask("SELECT count(*) FROM frames WHERE suspect OR attempts > 0")


def audit() -> list[ledger.Violation]:
    with transaction() as session:
        return ledger.audit(session)


def test_a_node_told_to_stop_finishes_its_pack_and_claims_no_more(database, tmp_path):
    with node(tmp_path, step_s=0.03) as process:  # a pack takes 3 s
        process.send_signal(signal.SIGTERM)

        assert process.wait(PATIENCE_S) == 0

    assert frames() == {"done": PACK, "queued": FRAMES - PACK}
    assert blamed() == 0
    assert ask("SELECT count(*) FROM packs WHERE closed_at IS NULL") == 0
    assert audit() == []


def test_a_pack_that_outlasts_the_grace_is_given_back_without_blame(database, tmp_path, monkeypatch):
    monkeypatch.setenv("FARM_GRACE_S", "0.5")
    with node(tmp_path, step_s=1) as process:  # a pack takes 100 s
        process.send_signal(signal.SIGTERM)

        assert process.wait(PATIENCE_S) == 0

    assert frames() == {"queued": FRAMES}
    assert blamed() == 0
    assert audit() == []


def test_a_second_sigterm_gives_everything_back_at_once(database, tmp_path, monkeypatch):
    monkeypatch.setenv("FARM_GRACE_S", "600")
    with node(tmp_path, step_s=1) as process:
        process.send_signal(signal.SIGTERM)
        await_line(tmp_path, "Warm shutdown")
        process.send_signal(signal.SIGTERM)

        assert process.wait(PATIENCE_S) == 0

    assert frames() == {"queued": FRAMES}
    assert blamed() == 0


@pytest.mark.parametrize("terms", [1, 2])
def test_a_node_ends_also_while_postgres_is_away(database, postgres: Postgres, tmp_path, monkeypatch, terms):
    monkeypatch.setenv("FARM_GRACE_S", "1" if terms == 1 else "600")
    monkeypatch.setenv("FARM_LEASE_S", "1")
    with node(tmp_path, step_s=1) as process:
        postgres.stop("immediate")
        try:
            process.send_signal(signal.SIGTERM)
            if terms == 2:
                await_line(tmp_path, "Warm shutdown")
                process.send_signal(signal.SIGTERM)

            assert process.wait(PATIENCE_S) == 0
        finally:
            postgres.start()
            db.engine().dispose()

    await_that(reclaimed)
    assert frames() == {"queued": FRAMES}
    assert audit() == []


def test_a_child_that_replaces_another_leaves_an_admins_draining_alone(database, tmp_path):
    started = "SELECT extract(epoch FROM started_at) FROM workers"
    with node(tmp_path, step_s=0.03) as process:
        before = ask(started)
        with transaction() as session:
            session.execute(text("UPDATE workers SET state = 'draining'"))

        os.kill(youngest_child(process.pid), signal.SIGKILL)

        await_that(lambda: ask(started) > before)
        assert ask("SELECT count(*) FROM workers WHERE state = 'draining'") == 1


def test_what_a_killed_child_had_in_hand_comes_back_before_its_lease_ends(database, tmp_path):
    with node(tmp_path, step_s=0.03) as process:
        os.kill(youngest_child(process.pid), signal.SIGKILL)

        await_that(lambda: ask("SELECT count(*) FROM packs WHERE lease_until < clock_timestamp()") > 0)
        with transaction() as session:
            assert queue.reclaim(session) == 1
        assert frames() == {"queued": FRAMES}
        took = ask("SELECT extract(epoch FROM closed_at - claimed_at) FROM packs WHERE outcome = 'lost'")
        assert took < settings().lease_s


def test_a_drained_worker_claims_nothing_until_it_is_resumed(database, tmp_path):
    with node(tmp_path, step_s=0.03) as process:
        # when drained, and a token lay there
        with transaction() as session:
            session.execute(text("UPDATE workers SET state = 'draining'"))
        await_line(tmp_path, "'outcome': 'drained'")
        tokens.send("starter", priority=5)
        await_that(lambda: (tmp_path / "node.log").read_text().count("'outcome': 'drained'") > 1)

        # then
        assert ask("SELECT count(*) FROM packs WHERE closed_at IS NULL") == 0
        left = frames()["queued"]
        assert left > 0

        # when resumed: the next token finds its old process drained, the one after that a new one
        with transaction() as session:
            session.execute(text("UPDATE workers SET state = 'up'"))
        before = youngest_child(process.pid)
        tokens.send("starter", priority=5)
        await_that(lambda: youngest_child(process.pid) not in (before, process.pid))
        tokens.send("starter", priority=5)

        await_that(lambda: frames().get("done") == FRAMES)
    assert audit() == []


def youngest_child(pid: int) -> int:
    """The process that holds the device: the last in a row of only children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return youngest_child(int(children[-1])) if children else pid


def reclaimed() -> bool:
    """What could not be given back returns when its lease has run out."""
    with transaction() as session:
        queue.reclaim(session)
        return session.scalar(text("SELECT count(*) FROM packs WHERE closed_at IS NULL")) == 0


def await_line(tmp_path: Path, words: str) -> None:
    await_that(lambda: words in (tmp_path / "node.log").read_text())
