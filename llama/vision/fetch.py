"""Images from http and https addresses, without a request to a machine that isn't public."""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from typing import Any, Callable, List, Tuple
from urllib.parse import quote, urljoin, urlsplit

from PIL import Image

from llama.vision.images import DEFAULTS, Limits, open_image

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_REDIRECTS = (301, 302, 303, 307, 308)
_HEADERS = {
    "Accept": "image/*",
    "Connection": "close",
    "User-Agent": "llama-reference",  # without one, Wikimedia answers 403
}


class Fetcher:
    """Fetches files. Proxies of the environment aren't used: they would resolve names themselves.

    Args:
        timeout: seconds for all of a file, redirects included, after its name has been resolved.
        redirects: how many are followed, each checked like the first address.
        allowed: which IP addresses may be asked; by default public ones. If more are, whoever can
            name addresses to this program can reach machines of your network through it.
        resolve: `socket.getaddrinfo`, or what stands for it.
    """

    def __init__(
        self,
        *,
        timeout: float = 10.0,
        redirects: int = 3,
        allowed: Callable[[str], bool] | None = None,
        resolve: Callable[..., Any] = socket.getaddrinfo,
    ):
        self.timeout, self.redirects = timeout, redirects
        self._allowed, self._resolve = allowed or is_public, resolve

    def fetch(self, url: str, max_bytes: int) -> bytes:
        """The file at an address.

        Raises:
            ValueError: an address that isn't http or https or not public, too many bytes or
                redirects, too slow an answer, or any but 200.
        """
        deadline = time.monotonic() + self.timeout
        for _ in range(self.redirects + 1):
            try:
                status, found = self._get(url, max_bytes, deadline)
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                said = f"took longer than {self.timeout} s"
                if time.monotonic() < deadline:
                    said = f"can't be fetched: {error or type(error).__name__}"
                raise ValueError(f"the image {url[:200]} {said}") from None
            if status == 200:
                return found
            url = urljoin(url, found.decode("utf-8", "replace"))
        raise ValueError(f"the image {url[:200]} comes after more than {self.redirects} redirects")

    def _get(self, url: str, max_bytes: int, deadline: float) -> Tuple[int, bytes]:
        """200 and the file, or a redirect's status and where it leads."""
        host, port, path = _parts(url)
        addresses = [
            (family, address)
            for family, _, _, _, address in self._resolve(host, port, type=socket.SOCK_STREAM)
        ]
        if not all(self._allowed(address[0]) for _, address in addresses):
            raise ValueError(
                f"the image {url[:200]} isn't fetched: its address isn't public; pass the file "
                "itself"
            )
        # The connection goes to an address that was checked: resolved again it might be another.
        with _connected(addresses, deadline) as plain:
            left = max(deadline - time.monotonic(), 0.001)
            # However slowly bytes come, one by one for example: at the deadline reading ends.
            timer = threading.Timer(left, lambda: _end(plain))
            timer.start()
            try:
                return _request(plain, url, host, port, path, max_bytes, deadline)
            finally:
                timer.cancel()


def is_address(source: Any) -> bool:
    """Whether it is to be fetched."""
    return isinstance(source, str) and source[:8].lower().startswith(("http://", "https://"))


def load(source: Any, limits: Limits = DEFAULTS, fetcher: Fetcher | None = None) -> Image.Image:
    """`open_image` of what may be an http or https address as well.

    Raises:
        FileNotFoundError, ValueError: what `open_image` and `Fetcher.fetch` raise.
    """
    if is_address(source):
        source = (fetcher or Fetcher()).fetch(source, limits.max_bytes)
    return open_image(source, limits)


def _parts(url: str) -> Tuple[str, int, str]:
    """Host, port, and path with query; urlsplit alone drops some control characters silently."""
    if any(ord(c) <= 32 or ord(c) == 127 for c in url) or "\\" in url:
        raise ValueError(f"the image's address has spaces or control characters: {url[:200]!r}")
    host, port = None, None
    with contextlib.suppress(ValueError):  # of a port that is no number, or brackets left open
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    if not host or parts.scheme not in ("http", "https") or "@" in parts.netloc:
        raise ValueError(f"the image's address isn't http://... or https://...: {url[:200]!r}")
    host = host if ":" in host else host.encode("idna").decode()
    port = port or (443 if parts.scheme == "https" else 80)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return host, port, quote(path, "/?%=&:;,+!~@$'()*[]")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's, also as IPv6 writes IPv4's."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        nat64 = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in _NAT64 else None
        ip = ip.ipv4_mapped or ip.sixtofour or nat64 or ip
        if ip.version == 6 and ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def _connected(addresses: List[Tuple[int, Any]], deadline: float) -> socket.socket:
    """A connection to the first of the addresses that accepts one."""
    failure: OSError = OSError("its name has no address")
    for family, address in addresses:
        connection = socket.socket(family, socket.SOCK_STREAM)
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


def _end(connection: socket.socket) -> None:
    """What is read from it ends, in whichever thread."""
    with contextlib.suppress(OSError):  # it may have ended
        connection.shutdown(socket.SHUT_RDWR)


def _request(
    plain: socket.socket,
    url: str,
    host: str,
    port: int,
    path: str,
    max_bytes: int,
    deadline: float,
) -> Tuple[int, bytes]:
    used = plain.dup()  # so that the timer's own descriptor keeps its meaning
    connection = http.client.HTTPConnection(host, port)
    if url[:6].lower() == "https:":
        context = ssl.create_default_context()
        used = context.wrap_socket(used, server_hostname=host)
        connection = http.client.HTTPSConnection(host, port, context=context)
    connection.sock = used
    try:
        connection.request("GET", path, headers=_HEADERS)
        answer = connection.getresponse()
        if answer.status in _REDIRECTS and answer.headers.get("Location"):
            return answer.status, answer.headers["Location"].encode("latin-1")
        if answer.status != 200:
            raise ValueError(f"the image {url[:200]} can't be fetched: HTTP {answer.status}")
        data = answer.read(max_bytes + 1)
        if time.monotonic() >= deadline:
            raise TimeoutError
        if len(data) > max_bytes:
            raise ValueError(f"the image {url[:200]} has more bytes than the limit, {max_bytes}")
        if answer.length:  # what it said that follows
            raise http.client.IncompleteRead(data)
        return 200, data
    finally:
        connection.close()
