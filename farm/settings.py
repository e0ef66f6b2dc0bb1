"""Every environment variable the farm reads, FARM_*, in one frozen class."""

from functools import cache
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

SECRETS_DIR = Path("/run/secrets")  # where Compose and Kubernetes mount them: /run/secrets/farm_secret


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="FARM_",
        frozen=True,
        extra="ignore",
        secrets_dir=SECRETS_DIR if SECRETS_DIR.is_dir() else None,
    )

    # services; an empty one is embedded by `farm up` and an error everywhere else
    database_url: SecretStr = SecretStr("")
    broker_url: SecretStr = SecretStr("")
    storage_url: SecretStr = SecretStr("")
    secret: SecretStr = Field(SecretStr(""), description="root of every API key's secret; ≥ 32 characters")
    catalog: Path | None = Field(None, description="a catalog.toml that replaces the built-in one")
    models_dir: Path | None = Field(None, description="folder of checkpoints, one subfolder a model name")

    # clients
    url: str = "http://127.0.0.1:8000"
    api_key: SecretStr = SecretStr("")

    # addresses
    api_host: str = "127.0.0.1"
    api_port: int = 8000
    flower_host: str = "127.0.0.1"
    flower_port: int = 5555
    flower_user: str = "admin"
    flower_password: SecretStr = SecretStr("")
    public_url: str = Field("", description="how clients reach the API; empty: the Host header's address")

    # times
    lease_s: float = Field(
        60.0, gt=0, description="a pack is somebody else's when its lease was not extended"
    )
    sweep_s: float = Field(1.0, gt=0, description="pause between two rounds of repair")
    burst_s: float = Field(600.0, gt=0, description="a burst stops claiming after this")
    grace_s: float = Field(30.0, ge=0, description="how long a draining worker may finish what it has")
    frame_limit_s: float = Field(600.0, gt=0, description="the longest a pack may take on the device")
    stall_s: float = Field(120.0, gt=0, description="a pack without progress for this long loses its lease")
    look_s: float = Field(0.03, gt=0, description="step by step: how often to look for what may join")
    checkpoint_s: float = Field(5.0, gt=0, description="frames in flight are saved this often")
    parked_s: float = Field(30.0, gt=0, description="a frame more urgent ones held up so long is given back")
    suspect_s: float = Field(5.0, ge=0, description="how long a frame that must run alone may be passed over")
    ageing_s: float = Field(60.0, gt=0, description="a lane unserved for this long gets the next pack")
    worker_lost_s: float = Field(30.0, gt=0, description="a worker not heard of for this long is not counted")
    quote_s: float = Field(900.0, gt=0, description="a quote is good for this long")
    orphan_grace_s: float = Field(3600.0, gt=0, description="an image without a row is removed after this")
    url_s: int = Field(600, ge=1, le=604_800, description="how long a link to an image works; 7 days at most")

    # what accounts send
    input_bytes: int = Field(25 << 20, ge=1, description="the largest input image's file")
    input_days: float = Field(30.0, gt=0, description="an input no open job uses is removed after this")
    fetch_s: float = Field(10.0, gt=0, description="how long an https input may take to arrive")
    allowed_private_hosts: str = Field(
        "", description="hosts with private addresses that inputs may be fetched from, as a.example,10.0.0.7"
    )

    # sizes
    pool_size: int = Field(10, ge=1, description="database connections a process may hold")
    max_count: int = Field(10_000, ge=1, description="frames of one submission over HTTP")
    max_attempts: int = Field(3, ge=1, description="packs a frame may take down alone before it fails")
    settle_frames: int = Field(16, ge=1)
    settle_ms: int = Field(200, ge=0)
    checkpoint_bytes: int = Field(8 << 20, ge=0, description="a frame whose state is larger is not saved")
    checkpoints_bytes: int = Field(64 << 20, ge=0, description="what one worker may have saved in Redis")

    log_format: Literal["text", "json"] = "text"


@cache
def settings() -> Settings:
    """Read the environment once a process."""
    return Settings()
