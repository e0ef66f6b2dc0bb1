"""A Postgres and a Redis of our own for each test process; a database of its own for each test."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path

import psycopg
import pytest
from redis import Redis as RedisClient

from farm import db
from farm.embedded.postgres import Postgres
from farm.embedded.redis import Redis
from farm.errors import Misconfigured
from farm.settings import settings
from tests.factories import books  # noqa: F401 - a fixture

SECRET = "a secret of the tests, 32 characters or more"
TEMPLATE = "migrated"

_numbers = count()


@pytest.fixture(scope="session")
def _data() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="farm-tests-"))
    folder.chmod(0o755)  # tmp_path is 0700, and as root Postgres runs as nobody
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def postgres(_data: Path) -> Iterator[Postgres]:
    server = Postgres(_data)
    server.start()
    yield server
    server.stop("immediate")


@pytest.fixture(scope="session")
def redis(_data: Path) -> Iterator[Redis]:
    server = Redis(_data)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def _template(postgres: Postgres) -> str:
    from migrations import upgrade

    upgrade(postgres.create_database(TEMPLATE))
    with psycopg.connect(postgres.url, autocommit=True) as maintenance:  # a template in use cannot be copied
        maintenance.execute(f"ALTER DATABASE {TEMPLATE} ALLOW_CONNECTIONS false")
    return TEMPLATE


@pytest.fixture
def broker(redis: Redis) -> str:
    """The URL of an empty Redis."""
    with RedisClient.from_url(redis.url) as client:
        client.flushall()
    return redis.url


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """The URL of an empty folder for images."""
    folder = tmp_path / "images"
    folder.mkdir()
    return folder.as_uri()


@pytest.fixture
def database(
    postgres: Postgres, _template: str, broker: str, store_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The URL of an empty, migrated database; FARM_* names it, the broker and the store."""
    name = f"test_{next(_numbers)}"
    url = postgres.create_database(name, _template)
    monkeypatch.setenv("FARM_DATABASE_URL", url)
    monkeypatch.setenv("FARM_BROKER_URL", broker)
    monkeypatch.setenv("FARM_STORAGE_URL", store_url)
    monkeypatch.setenv("FARM_SECRET", SECRET)
    settings.cache_clear()
    yield url
    with suppress(Misconfigured):  # the test took the setting away
        db.engine().dispose()
    settings.cache_clear()
    postgres.drop_database(name)
