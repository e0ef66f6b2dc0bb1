"""What Prometheus reads. It needs no key, so it names no account; keep it inside, as /health."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from farm.db import sql, transaction
from farm.errors import Away
from farm.settings import settings

log = logging.getLogger(__name__)

router = APIRouter(tags=["health"])

KEPT_S = 2.0
PART = 20  # a reading is kept 20 times as long as it took: metrics cost the database 5 % of a core at most
PATIENCE_S = 8  # Prometheus itself gives up after 10


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"description": "Prometheus text", "content": {"text/plain": {}}}},
)
def show_metrics(request: Request) -> Response:
    """Queue depth, waits, packs, workers and requests, for Prometheus."""
    registry: CollectorRegistry = request.app.state.registry
    return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


# ------------------------------------------------------------------------------------------------ readings


def queue_depth(db: Session) -> list[Metric]:
    frames = GaugeMetricFamily(
        "farm_queue_frames", "Frames waiting to be handed out", labels=("model", "priority")
    )
    oldest = GaugeMetricFamily(
        "farm_queue_oldest_wait_seconds",
        "Age of the oldest job with waiting frames",
        labels=("model", "priority"),
    )
    for row in db.execute(sql("queue_depth")):
        labels = (row.model, str(row.priority))
        frames.add_metric(labels, float(row.frames))
        oldest.add_metric(labels, max(0.0, float(row.oldest_s)))
    return [frames, oldest]


def packs(db: Session) -> list[Metric]:
    held = db.scalar(text("SELECT count(*) FROM packs WHERE closed_at IS NULL")) or 0
    recent = GaugeMetricFamily(
        "farm_packs", "Packs claimed in the last ten minutes, by how they ended", labels=("outcome",)
    )
    rows = db.execute(
        text(
            "SELECT coalesce(outcome, 'open') AS outcome, count(*) AS packs"
            " FROM packs"  # ids rise with time: what is older is not read
            " WHERE id > ((extract(epoch FROM now() - interval '10 minutes') * 1000000)::bigint << 12)"
            " GROUP BY 1 ORDER BY 1"
        )
    )
    for row in rows:
        recent.add_metric((row.outcome,), row.packs)
    return [GaugeMetricFamily("farm_packs_open", "Packs on a device or being stored", value=held), recent]


def images(db: Session) -> list[Metric]:
    made = CounterMetricFamily("farm_images", "Images delivered and billed", labels=("model",))
    for row in db.execute(
        text("SELECT model, images FROM delivered ORDER BY model")
    ):  # the sweep counts them
        made.add_metric((row.model,), row.images)
    return [made]


def failures(db: Session) -> list[Metric]:
    failed = db.scalar(text("SELECT coalesce(sum(failed), 0) FROM counts")) or 0
    return [CounterMetricFamily("farm_frames_failed", "Frames that failed for good", value=failed)]


def workers(db: Session) -> list[Metric]:
    known = GaugeMetricFamily("farm_workers", "Workers by pool and state", labels=("pool", "state"))
    rows = db.execute(
        text(
            "SELECT pool, CASE WHEN seen_at < clock_timestamp() - make_interval(secs => :lost_s) THEN 'gone'"
            " WHEN state = 'up' AND EXISTS (SELECT FROM ailments AS a WHERE a.worker = w.id AND a.model = ''"
            " AND a.until > clock_timestamp()) THEN 'sick'"
            " ELSE state END AS state, count(*) AS n FROM workers AS w GROUP BY 1, 2 ORDER BY 1, 2"
        ),
        {"lost_s": settings().worker_lost_s},
    )
    for row in rows:
        known.add_metric((row.pool, row.state), row.n)
    aside = GaugeMetricFamily(
        "farm_models_set_aside",
        "Workers that do not claim a model for a while, as it failed there",
        labels=("model",),
    )
    for row in db.execute(
        text(
            "SELECT model, count(*) AS n FROM ailments WHERE model <> '' AND until > clock_timestamp()"
            " GROUP BY 1 ORDER BY 1"
        )
    ):
        aside.add_metric((row.model,), row.n)
    return [known, aside]


READINGS = (queue_depth, packs, images, failures, workers)


@dataclass(slots=True)
class _Kept:
    until: float
    metrics: list[Metric]


class FarmCollector(Collector):
    """Reads the database for each scrape, but not more often than it can bear."""

    def __init__(self) -> None:
        self._kept: dict[str, _Kept] = {}
        self._lock = threading.Lock()

    def describe(self) -> list[Metric]:
        return []  # to register it reads nothing

    def collect(self) -> Iterator[Metric]:
        up = True
        with self._lock:
            found: list[Metric] = []
            for read in READINGS:
                try:
                    found += self._read(read) if up else []
                except Away:
                    up = False
                except OperationalError as e:  # it took too long
                    log.warning("no %s in the metrics: %s", read.__name__, e.orig)
        yield GaugeMetricFamily("farm_database_up", "Whether the job database answers", value=float(up))
        yield from found

    def _read(self, read: Callable[[Session], list[Metric]]) -> list[Metric]:
        kept, began = self._kept.get(read.__name__), time.monotonic()
        if kept is not None and began < kept.until:
            return kept.metrics
        with transaction() as db:
            db.execute(text(f"SET LOCAL statement_timeout = '{PATIENCE_S}s'"))
            metrics = read(db)
        ended = time.monotonic()
        self._kept[read.__name__] = _Kept(ended + max(KEPT_S, PART * (ended - began)), metrics)
        return metrics
