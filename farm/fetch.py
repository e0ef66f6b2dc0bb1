"""Fetch what a URL from outside names, from public addresses only.

A name is resolved here, each of its addresses is checked, and the connection goes to the address that was checked:
a name that answers differently the second time gains nothing. Redirects are taken the same way. Private, loopback,
link-local and metadata addresses are refused however they are written, unless FARM_ALLOWED_PRIVATE_HOSTS names the
host.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from urllib.parse import urljoin

import httpx

from farm.settings import settings

MAX_REDIRECTS = 3
MAX_URL = 4096
PART = 64 << 10  # bytes read at a time
REDIRECTS = (301, 302, 303, 307, 308)
# no outsider's business, though Python takes them for public: protocol assignments with Oracle's metadata among
# them, Azure's wire server
ALSO_PRIVATE = tuple(
    map(ipaddress.ip_network, ("192.0.0.0/24", "168.63.129.16/32", "64:ff9b:1::/48", "fec0::/10"))
)
NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True, slots=True)
class Received:
    """What a server answered to what it was sent: its status, and the beginning of its body."""

    status: int
    text: str


class NotFetched(Exception):
    """The farm does not fetch this, or could not: the text is for whoever sent the URL."""


class _UnknownHost(NotFetched):
    """Nobody knows the host by that name, now."""


def is_public(address: str) -> bool:
    """Whether anybody on the Internet may be asked at this address; one inside another counts as what it stands for."""
    found = ipaddress.ip_address(address.partition("%")[0])
    return all(_is_public(a) for a in (found, *_embedded(found)))


def _is_public(address: Address) -> bool:
    if not address.is_global or address.is_multicast:
        return False
    return not any(address in network for network in ALSO_PRIVATE)


def _embedded(address: Address) -> list[Address]:
    if isinstance(address, ipaddress.IPv4Address):
        return []
    found: list[Address] = [a for a in (address.ipv4_mapped, address.sixtofour) if a is not None]
    found += address.teredo or ()
    if address in NAT64 or int(address) >> 32 == 0:  # the last are IPv4-compatible, long deprecated
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return found


def _allowed_private(host: str) -> bool:
    names = (n.strip().lower() for n in settings().allowed_private_hosts.split(","))
    return bool(host) and host.lower().rstrip(".") in names


async def fetch(url: str, *, max_bytes: int, within_s: float) -> tuple[bytes, str]:
    """The body behind an https URL, and the content type it came with.

    Raises NotFetched.
    """
    try:
        async with asyncio.timeout(within_s):
            for _ in range(MAX_REDIRECTS + 1):
                body, content_type, location = await _get(url, max_bytes)
                if location is None:
                    return body, content_type
                url = urljoin(url, location)
    except TimeoutError:
        raise NotFetched(f"it did not arrive within {within_s:g} s") from None
    except httpx.HTTPError as e:
        raise NotFetched(f"it could not be fetched: {type(e).__name__}") from None
    raise NotFetched(f"it redirects more than {MAX_REDIRECTS} times")


async def _get(url: str, max_bytes: int) -> tuple[bytes, str, str | None]:
    """One answer: body, content type, and where it redirects to."""
    host, port = _parts(url)
    address = await _resolve(host, port)
    target = httpx.URL(url).copy_with(host=address, fragment=None)
    headers = {
        "Host": httpx.URL(url).netloc.decode(),
        "Accept": "image/png, image/jpeg, image/webp",
        "Accept-Encoding": "identity",
        "User-Agent": "image-farm",
    }
    # no proxy of the environment: it would look up the name again
    async with (
        httpx.AsyncClient(trust_env=False, timeout=settings().fetch_s) as client,
        client.stream("GET", target, headers=headers, extensions={"sni_hostname": host}) as answer,
    ):
        if answer.status_code in REDIRECTS and "location" in answer.headers:
            return b"", "", answer.headers["location"]
        if answer.status_code != 200:
            raise NotFetched(f"its server answers {answer.status_code}")
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            raise NotFetched("its server sends it compressed, unasked")
        body = bytearray()
        async for part in answer.aiter_raw(PART):
            body += part
            if len(body) > max_bytes:
                raise NotFetched(f"it is too large; allowed are {max_bytes} bytes")
        return bytes(body), answer.headers.get("content-type", ""), None


async def post(
    url: str, body: bytes, *, headers: Mapping[str, str], within_s: float, most_bytes: int
) -> Received:
    """Send a body to a URL, and read no more than the beginning of the answer. Redirects are not followed.

    Raises NotFetched if it could not be sent, or nothing was answered in time.
    """
    try:
        async with asyncio.timeout(within_s):
            return await _post(url, body, headers, within_s, most_bytes)
    except TimeoutError:
        raise NotFetched(f"nothing was answered within {within_s:g} s") from None
    except httpx.HTTPError as e:
        raise NotFetched(f"it could not be sent: {type(e).__name__}") from None


async def _post(
    url: str, body: bytes, headers: Mapping[str, str], within_s: float, most_bytes: int
) -> Received:
    host, port = _parts(url)
    address = await _resolve(host, port)
    target = httpx.URL(url).copy_with(host=address, fragment=None)
    sent = {**headers, "Host": httpx.URL(url).netloc.decode(), "Accept-Encoding": "identity"}
    async with (
        httpx.AsyncClient(trust_env=False, timeout=within_s, verify=_certificates()) as client,
        client.stream(
            "POST", target, content=body, headers=sent, extensions={"sni_hostname": host}
        ) as answer,
    ):
        text = bytearray()
        async for part in answer.aiter_raw(most_bytes):
            text += part
            if len(text) >= most_bytes:
                break
        return Received(answer.status_code, bytes(text[:most_bytes]).decode(errors="replace"))


@cache
def _certificates() -> ssl.SSLContext:
    """Whom this process trusts; read once, it takes tens of milliseconds."""
    return httpx.create_ssl_context(trust_env=False)


async def check(url: str, *, within_s: float, known: bool = False) -> None:
    """Look whether something may be sent to a URL. Unless it has to be known, a host may become so later.

    Raises NotFetched.
    """
    host, port = refuse_inside(url)
    try:
        async with asyncio.timeout(within_s):
            await _resolve(host, port)
    except (TimeoutError, _UnknownHost):
        if known:
            raise _UnknownHost("its host is unknown") from None


def refuse_inside(url: str) -> tuple[str, int]:
    """Host and port of a URL, without asking what a name stands for.

    Raises NotFetched for what is no plain https URL, and for an address inside, however it is written.
    """
    host, port = _parts(url)
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):  # it is a name
        return host, port
    if not _allowed_private(host) and not all(is_public(str(info[4][0])) for info in found):
        raise NotFetched("its host is not on the public Internet")
    return host, port


def _parts(url: str) -> tuple[str, int]:
    """Host and port. Raises NotFetched for what is no plain https URL."""
    if len(url) > MAX_URL or any(ord(c) <= 32 or ord(c) == 127 or c == "\\" for c in url):
        raise NotFetched(f"allowed are URLs of up to {MAX_URL} characters without spaces")
    try:
        same = httpx.URL(url)  # read as the one that is asked for
        host, port = same.raw_host.decode("ascii"), same.port
    except (ValueError, httpx.InvalidURL, UnicodeError):
        raise NotFetched("it is no URL") from None
    if same.scheme != "https" and not (same.scheme == "http" and _allowed_private(same.host)):
        raise NotFetched("allowed are https:// URLs")
    if same.userinfo:
        raise NotFetched("a URL with a user name is not fetched")
    if not host:
        raise NotFetched("it names no host")
    return host, port or (443 if same.scheme == "https" else 80)


async def _resolve(host: str, port: int) -> str:
    """An address of the host that may be connected to.

    Raises NotFetched if one of its addresses is not public: a name that has both is up to something.
    """
    try:
        found: Sequence[tuple[object, ...]] = await asyncio.get_running_loop().getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )
    except (OSError, UnicodeError):
        raise _UnknownHost("its host is unknown") from None
    addresses = [str(info[4][0]) for info in found]  # type: ignore[index]
    if not addresses:
        raise _UnknownHost("its host is unknown")
    if not _allowed_private(host) and not all(is_public(a) for a in addresses):
        raise NotFetched("its host is not on the public Internet")
    return addresses[0]
