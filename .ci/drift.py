"""Check on an empty Postgres that the migrations say what tables.py says, and lead back and forth."""

import shutil
import tempfile
from pathlib import Path

from alembic import command

from farm.embedded.postgres import Postgres
from migrations import config, downgrade, upgrade

folder = Path(tempfile.mkdtemp(prefix="farm-drift-"))
folder.chmod(0o755)  # as root Postgres runs as nobody
server = Postgres(folder)
try:
    server.start()
    url = server.create_database("drift")
    upgrade(url)
    command.check(config(url))
    downgrade(url, "base")
    upgrade(url)
    command.check(config(url))
finally:
    server.stop("immediate")
    shutil.rmtree(folder)
print("the migrations and tables.py agree, and lead back and forth")
