"""Ray Serve as its guide shows it: a replica with the stock pipeline, and @serve.batch in front of it.

One replica, one thread, batches of up to WINDOW requests; those of a batch that share a call go into one. It opens
ports on every interface, so it wants a network of its own: benchmarks/peers.py runs it in one. Reads a JSON object a
line: {"calls": [...], "urgent": call or null, "every_s": seconds}; answers a line each: when it was sent and when each
call was answered, and the same of an urgent one every so many seconds meanwhile.
"""

import asyncio
import io
import json
import os
import sys
import threading
import time
from collections import defaultdict
from typing import Any

import ray
from ray import serve

from benchmarks.plain.loop import ANSWER, Call, load, render

WINDOW = 64
WAIT_S = 0.05
IN_A_CALL = 16  # as many as the farm's engine takes


@serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 1})
class Replica:
    """The pipeline, with what the farm's worker saves as well: PNG."""

    def __init__(self, model: str) -> None:
        self._pipeline = load(model)
        self._config = self._pipeline.scheduler.config

    async def __call__(self, call: dict[str, Any]) -> int:
        return int(await self.batched(call))

    @serve.batch(max_batch_size=WINDOW, batch_wait_timeout_s=WAIT_S)
    async def batched(self, calls: list[dict[str, Any]]) -> list[int]:
        return await asyncio.to_thread(self._render, calls)  # requests go on coming in meanwhile

    def _render(self, calls: list[dict[str, Any]]) -> list[int]:
        alike = defaultdict(list)
        for k, call in enumerate(calls):
            guided = call["guidance"] if call["guidance"] > 1 else 0.0
            alike[call["steps"], guided, call["sampler"]].append(k)
        sizes = [0] * len(calls)
        for ks in alike.values():
            for first in range(0, len(ks), IN_A_CALL):
                some = ks[first : first + IN_A_CALL]
                for k, image in zip(some, self._images([calls[k] for k in some]), strict=True):
                    file = io.BytesIO()
                    image.save(file, "PNG")
                    sizes[k] = len(file.getvalue())
        return sizes

    def _images(self, calls: list[dict[str, Any]]) -> list[Any]:
        one = Call(**calls[0])
        prompts = [prompt for call in calls for prompt in call["prompts"]]
        seeds = [seed for call in calls for seed in call["seeds"]]
        call = Call(prompts, seeds, one.width, one.height, one.steps, one.guidance, one.sampler)
        return render(self._pipeline, self._config, call)


def main() -> None:
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=200 << 20,
        logging_level="ERROR",
        runtime_env={"env_vars": {name: os.environ[name] for name in ("FARM_CATALOG", "OMP_NUM_THREADS")}},
    )
    serve.start(proxy_location="Disabled")
    handle = serve.run(Replica.bind(sys.argv[1]), name="peer", route_prefix=None)
    print(f"{ANSWER}ready", flush=True)
    for line in sys.stdin:
        print(ANSWER + json.dumps(answer(handle, **json.loads(line))), flush=True)
    serve.shutdown()
    ray.shutdown()


def answer(handle: Any, *, calls: list[dict[str, Any]], urgent: Any, every_s: float) -> dict[str, Any]:
    """Send all calls at once, and urgent ones meanwhile."""
    over = threading.Event()
    urgents: list[tuple[float, float]] = []
    waiting: list[threading.Thread] = []

    def one_urgent() -> None:
        sent = time.time()
        handle.remote(urgent).result()
        urgents.append((sent, time.time()))

    def send_urgents() -> None:
        while not over.wait(every_s):
            waiting.append(threading.Thread(target=one_urgent))
            waiting[-1].start()

    sender = threading.Thread(target=send_urgents)
    sent = time.time()
    responses = [handle.remote(call) for call in calls]
    if urgent is not None:
        sender.start()
    done = []
    for response in responses:
        response.result()
        done.append(time.time())
    over.set()
    if urgent is not None:
        sender.join()
    for thread in waiting:
        thread.join()
    return {"seconds": max(done) - sent, "urgent_s": [end - start for start, end in urgents]}


if __name__ == "__main__":
    main()
