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
    default_model: str = Field("", description="of requests of other APIs that name none; empty: the first")

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

    # prompt help by a text model; without a URL prompts are helped by a template
    enhancer_url: str = Field("", description="an OpenAI-compatible API's base, as http://127.0.0.1:8080/v1")
    enhancer_key: SecretStr = SecretStr("")
    enhancer_model: str = ""
    enhancer_s: float = Field(5.0, gt=0, description="after this the template helps instead")

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
    sync_wait_s: float = Field(300.0, gt=0, description="how long a synchronous call waits for its images")
    quote_s: float = Field(900.0, gt=0, description="a quote is good for this long")
    orphan_grace_s: float = Field(3600.0, gt=0, description="an image without a row is removed after this")
    url_s: int = Field(600, ge=1, le=604_800, description="how long a link to an image works; 7 days at most")

    # what accounts send
    input_bytes: int = Field(25 << 20, ge=1, description="the largest input image's file")
    input_days: float = Field(30.0, gt=0, description="an input no open job uses is removed after this")
    fetch_s: float = Field(10.0, gt=0, description="how long an https input may take to arrive")
    allowed_private_hosts: str = Field(
        "",
        description="private hosts that inputs may be fetched from and webhooks sent to: a.example,10.0.0.7",
    )

    file_bytes: int = Field(64 << 20, ge=1, description="the largest file sent to /v1/files")
    file_days: float = Field(30.0, gt=0, description="a file sent to /v1/files is removed after this")
    max_files: int = Field(10_000, ge=1, description="files that an account may keep")
    max_files_bytes: int = Field(5 << 30, ge=1, description="and what they may take")

    # what accounts may do at most; each account and key may have limits of its own
    reads_per_s: float = Field(500.0, gt=0, description="requests that only look, of an account or a key")
    writes_per_s: float = Field(500.0, gt=0, description="all other requests, of an account or a key")
    submissions_per_s: float = Field(500.0, gt=0, description="of those, what makes jobs")
    rate_burst_s: float = Field(10.0, ge=1, description="what was not used for so long may be used at once")
    wrong_keys_per_min: float = Field(30.0, gt=0, description="wrong API keys from one address")
    api_processes: int = Field(1, ge=1, description="API processes that share these rates between them")
    max_open_frames: int = Field(10_000_000, ge=1, description="frames of an account that have not ended")
    max_farm_frames: int = Field(50_000_000, ge=1, description="frames of all accounts that have not ended")
    max_inputs: int = Field(100_000, ge=1, description="input images that an account may keep")
    max_inputs_bytes: int = Field(50 << 30, ge=1, description="and what they may take")

    # sizes
    pool_size: int = Field(10, ge=1, description="database connections a process may hold")
    max_count: int = Field(10_000, ge=1, description="frames of one submission over HTTP")
    max_bulk: int = Field(5_000_000, ge=1, le=16_000_000, description="lines of one bulk upload")
    bulk_s: float = Field(86_400.0, gt=0, description="an upload nobody goes on with is discarded then")
    max_attempts: int = Field(3, ge=1, description="packs a frame may take down alone before it fails")
    settle_frames: int = Field(16, ge=1, description="frames that settling waits for")
    settle_ms: int = Field(200, ge=0, description="but no longer than this")
    settle_at_once: int = Field(64, ge=1, description="frames settled at once if so many are there already")
    checkpoint_bytes: int = Field(8 << 20, ge=0, description="a frame whose state is larger is not saved")
    checkpoints_bytes: int = Field(64 << 20, ge=0, description="what one worker may have saved in Redis")

    log_format: Literal["text", "json"] = "text"


@cache
def settings() -> Settings:
    """Read the environment once a process."""
    return Settings()
