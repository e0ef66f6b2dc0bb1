"""Flower, the admins' window on Celery: who works, and what each render task did."""

from pathlib import Path

from farm import tokens
from farm.errors import Misconfigured
from farm.settings import settings

CONFIG = Path(__file__).with_name("flowerconfig.py")


def run() -> None:
    """Serve Flower until SIGTERM. Its password comes from FARM_FLOWER_PASSWORD, never from the command line.

    Raises Misconfigured without a password: everybody could revoke tasks.
    """
    if not settings().flower_password.get_secret_value():
        raise Misconfigured("FARM_FLOWER_PASSWORD is not set", setting="FARM_FLOWER_PASSWORD")
    tokens.app().start(["flower", f"--conf={CONFIG}"])
