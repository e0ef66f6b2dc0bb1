"""What Alembic runs: one transaction a migration, behind an advisory lock, against the url it was given."""

from alembic import context
from sqlalchemy import create_engine, pool, text

from farm.tables import Base

LOCK = 0x6661726D  # "farm"


def is_ours(thing: object, name: str | None, kind: str, reflected: bool, _other: object) -> bool:
    """Leave out partitions: functions of the database make them."""
    table = name if kind == "table" else getattr(getattr(thing, "table", None), "name", None)
    return not reflected or table is None or table in Base.metadata.tables


def run() -> None:
    engine = create_engine(context.config.attributes["url"], poolclass=pool.NullPool)
    with engine.connect() as connection:
        context.configure(
            connection=connection,
            target_metadata=Base.metadata,
            include_object=is_ours,
            transaction_per_migration=True,
        )
        with connection.begin():
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
            context.run_migrations()


run()
