"""`python -m workers --pool NAME`: choose devices, one process each, and start Celery in it.

With one device this process is the node; with several it starts a node for each, hands signals on, and starts
those that die again.
"""

import argparse
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import FrameType

from farm.catalog import catalog
from farm.errors import FarmError, Misconfigured
from farm.settings import settings
from farm.storage.check import at_start

log = logging.getLogger("workers")

RESTART_S = (1, 2, 5, 10, 30)
LIFELINE = (sys.executable, "-m", "farm.lifeline")
STORE_S = 30  # what a drained node may still need to store what it rendered


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(processName)s %(name)s: %(message)s"
    )
    try:
        each = max(model.devices for model in catalog().pool(options.pool))
        devices = _groups(options.gpus, each) or [f"cpu{k}" for k in range(options.cpus)]
        if options.device:
            devices = [options.device]
        if len(devices) > 1:
            return Supervisor(options.pool, devices).run()
        return _run_node(options.pool, devices[0])
    except FarmError as e:
        sys.stderr.write(f"workers: {e}\n")
        return 2


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workers", description=__doc__)
    parser.add_argument("--pool", required=True, help="whose models to serve; `farm models` lists pools")
    devices = parser.add_mutually_exclusive_group()
    devices.add_argument(
        "--gpus", type=_numbers, default=[], metavar="0,1", help="one process on each of these GPUs"
    )
    devices.add_argument(
        "--cpus", type=int, default=1, metavar="N", help="N processes without a GPU, one thread each"
    )
    devices.add_argument("--device", help=argparse.SUPPRESS)  # what the supervisor starts: gpu3, cpu0
    options = parser.parse_args(arguments)
    if options.cpus < 1:
        parser.error("--cpus: allowed are 1 and more")
    return options


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: allowed are numbers with commas, as 0,1,2,3") from None
    if len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: each GPU once")
    return numbers


def _groups(gpus: list[int], each: int) -> list[str]:
    """Devices of this many GPUs: gpu0, or gpu0+1 where a model needs two to hold it.

    Raises Misconfigured if the GPUs cannot be shared out so.
    """
    if len(gpus) % each:
        raise Misconfigured(
            f"--gpus names {len(gpus)}: a model of this pool takes {each}, allowed are multiples of that"
        )
    return ["gpu" + "+".join(map(str, gpus[k : k + each])) for k in range(0, len(gpus), each)]


def _visible(device: str) -> str:
    """What CUDA_VISIBLE_DEVICES says for a device: nothing for a CPU."""
    return device.removeprefix("gpu").replace("+", ",") if device.startswith("gpu") else ""


def _run_node(pool: str, device: str) -> int:
    # before torch is imported anywhere below
    os.environ["CUDA_VISIBLE_DEVICES"] = _visible(device)
    os.environ["OMP_NUM_THREADS"] = "1"
    at_start(settings().storage_url.get_secret_value())  # one that changes bytes gets none of ours
    from workers.node import Node

    return Node(pool=pool, name=f"{pool}-{device}@{socket.gethostname()}").run()


class Supervisor:
    """A node for each device. Signals go on to all of them; one that dies is started again."""

    def __init__(self, pool: str, devices: list[str]) -> None:
        self._pool = pool
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._devices = devices
        self._stopping = threading.Event()

    def run(self) -> int:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hand_on)
        keepers = [threading.Thread(target=self._keep, args=(d,), name=d) for d in self._devices]
        for keeper in keepers:
            keeper.start()
        for keeper in keepers:
            keeper.join()
        return 0

    def _keep(self, device: str) -> None:
        deaths = 0
        while not self._stopping.is_set():
            started = time.monotonic()
            node = subprocess.Popen(
                [*LIFELINE, str(settings().grace_s + STORE_S), *self._node(device)],
                stdin=subprocess.PIPE,  # closes with this process, however that ends: the node drains then
                start_new_session=True,
            )
            self._nodes[device] = node
            code = node.wait()
            if self._stopping.is_set():
                return
            deaths = 0 if time.monotonic() - started > 60 else deaths + 1
            pause = RESTART_S[min(deaths, len(RESTART_S) - 1)]
            log.error("node %s ended with %d, starting it again in %d s", device, code, pause)
            self._stopping.wait(pause)

    def _node(self, device: str) -> list[str]:
        return ["workers", "--pool", self._pool, "--device", device]

    def _hand_on(self, number: int, _frame: FrameType | None) -> None:
        self._stopping.set()
        for node in self._nodes.values():
            node.send_signal(signal.SIGTERM if number == signal.SIGINT else number)


if __name__ == "__main__":
    sys.exit(main())
