# syntax=docker/dockerfile:1
# Two images: `control` (farm …, no torch) and `worker` (python -m workers). No secret enters either: they come
# at run time as files in /run/secrets.
#   docker build --target control -t farm-control:0.1.0 .
#   docker build --target worker -t farm-worker:0.1.0 .

FROM python:3.11-slim AS base
# tini reaps orphans and passes SIGTERM to its own child alone: Celery loses the message of a task whose parent
# and child are signalled together (so never `tini -g`).
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin farm
ENV PATH=/opt/farm/bin:$PATH \
    HOME=/tmp \
    PYTHONUNBUFFERED=1
WORKDIR /tmp
ENTRYPOINT ["tini", "--"]

# What is installed changes rarely, the code often: empty packages stand in for the code while pip fetches the rest.
FROM base AS build
RUN python -m venv /opt/farm
WORKDIR /src
COPY pyproject.toml constraints.txt README.md ./
RUN mkdir farm workers migrations && touch farm/__init__.py workers/__init__.py migrations/__init__.py

FROM build AS build-control
RUN --mount=type=cache,target=/tmp/.cache/pip pip install -c constraints.txt .
COPY farm farm
COPY workers workers
COPY migrations migrations
RUN --mount=type=cache,target=/tmp/.cache/pip pip install --no-deps --force-reinstall .

FROM build AS build-worker
# Empty: torch with CUDA, from PyPI. An index of CPU builds saves the gigabytes of CUDA.
ARG PIP_EXTRA_INDEX_URL=""
RUN --mount=type=cache,target=/tmp/.cache/pip pip install -c constraints.txt ".[worker]"
COPY farm farm
COPY workers workers
COPY migrations migrations
RUN --mount=type=cache,target=/tmp/.cache/pip pip install --no-deps --force-reinstall .

FROM base AS worker
COPY --from=build-worker /opt/farm /opt/farm
USER 10001:10001
HEALTHCHECK --interval=30s --timeout=15s --start-period=120s --retries=3 CMD ["farm", "healthcheck", "worker"]
CMD ["python", "-m", "workers", "--help"]

# Last, so that a plain `docker build .` makes it. Each of its commands has a health of its own (compose.yaml, k8s).
FROM base AS control
COPY --from=build-control /opt/farm /opt/farm
USER 10001:10001
EXPOSE 8000 5555
CMD ["farm", "api"]
