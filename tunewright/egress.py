"""The one client for addresses that callers name. Nothing else in the server dials them.

Three steps, always together: the text of the URL is checked (`check_url`), the name is resolved once and every address it has
must be public, and then one of exactly those addresses is dialled, with the name kept for the Host header and the
certificate. Each redirect goes through all three again. No cookies, no proxies, no keep-alive, and one deadline for the whole.
"""

import hashlib
import ipaddress
import re
import socket
import ssl
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast
from urllib.parse import quote as percent_encode
from urllib.parse import urljoin

import msgspec

from tunewright.clock import mono_s
from tunewright.errors import InvalidRequest, TooLarge, TunewrightError, Unavailable
from tunewright.i18n import mark

if TYPE_CHECKING:
    import httpcore

MAX_URL_LENGTH = 2048
MAX_BYTES = 20 * 2**20
TIMEOUT_S = 10.0
MAX_REDIRECTS = 3
PORTS = (80, 443)
_DIALLED_ADDRESSES = 3
_CONNECT_S = 5.0
_PIECE_BYTES = 1 << 16

_URL = re.compile(r"(?i:(https?)://)([^/?#]*)([^#]*)(?:#.*)?")
_PORT = re.compile(r"[0-9]{1,5}")
_NAME = re.compile(
    r"(?=.{1,253}$)[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?(?:\.[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?)*"
)
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_KEPT_IN_TARGET = "".join(chr(c) for c in range(0x21, 0x7F))

# What `ipaddress` calls global and is none of a stranger's business all the same.
_REFUSED_V4 = tuple(map(ipaddress.IPv4Network, ("192.0.0.0/24", "192.88.99.0/24", "100.64.0.0/10", "168.63.129.16/32")))
_UNICAST_V6 = ipaddress.IPv6Network(
    "2000::/3"
)  # outside of it: NAT64, IPv4 inside IPv6, link-local, unique local, multicast
_REFUSED_V6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))

Resolve = Callable[[str, int], list[str]]
Connect = Callable[[str, int, float], socket.socket]


class Address(NamedTuple):
    """A URL taken apart. `host` is lower-case ASCII, an IPv6 address without brackets; `target` is path and query."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def url(self) -> str:
        """The same as one text."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _default_port(self.scheme) else f":{self.port}"
        return f"{self.scheme}://{host}{port}{self.target}"


class Fetched(msgspec.Struct, frozen=True):
    """What came: how much, its hash (hex), and what the sender says it is."""

    size_bytes: int
    sha256: str
    content_type: str


def check_url(url: str) -> Address:
    """The parts of a URL that may be fetched as far as its text says. Nothing is resolved or dialled.

    Raises InvalidRequest: `invalid_url` (not one plain http or https URL), `url_not_allowed` (a port other than 80 and 443,
    a numeric address that is not public, a name without a dot).
    """
    if len(url) > MAX_URL_LENGTH:
        raise InvalidRequest(
            "invalid_url", mark("The address is longer than {limit} characters"), reason="length", limit=MAX_URL_LENGTH
        )
    found = _URL.fullmatch(url)
    if found is None or any(c <= " " or c == "\\" or unicodedata.category(c)[0] in "CZ" for c in url):
        raise _invalid_url("syntax")
    scheme, authority, rest = found[1].lower(), found[2], found[3]
    if "@" in authority:
        raise _invalid_url("userinfo")
    if authority.startswith("["):
        text, bracket, after = authority[1:].partition("]")
        if not bracket or not (after == "" or after.startswith(":")):
            raise _invalid_url("host")
        host, number, has_port = _literal_v6(text), after[1:], after != ""
    else:
        name, colon, number = authority.partition(":")
        host, has_port = _name(name), bool(colon)
    if has_port and not _PORT.fullmatch(number):
        raise _invalid_url("port")
    port = int(number) if has_port else _default_port(scheme)
    if port not in PORTS:
        raise _not_allowed("port")
    target = percent_encode(rest, safe=_KEPT_IN_TARGET)
    return Address(scheme, host, port, target if target.startswith("/") else f"/{target}")


def _default_port(scheme: str) -> int:
    return 443 if scheme == "https" else 80


def _literal_v6(text: str) -> str:
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        raise _invalid_url("host") from None
    if address.scope_id is not None:
        raise _invalid_url("host")
    if not is_public(str(address)):
        raise _not_allowed("address")
    return str(address)


def _name(text: str) -> str:
    """A host name in ASCII, or an IPv4 address in its one plain form."""
    if not text.isascii():
        import idna

        try:
            text = idna.encode(text, uts46=True, std3_rules=True).decode("ascii")
        except (idna.IDNAError, UnicodeError):
            raise _invalid_url("host") from None
    text = text.lower().removesuffix(".")
    if not _NAME.fullmatch(text):
        raise _invalid_url("host")
    if _NUMBER.fullmatch(text.rsplit(".", 1)[-1]):  # to a resolver this is a number: 127.1, 0x7f000001, 2130706433
        try:
            public = is_public(str(ipaddress.IPv4Address(text)))
        except ValueError:
            raise _invalid_url("host") from None
        if not public:
            raise _not_allowed("address")
    elif "." not in text:
        raise _not_allowed("host")
    return text


def is_public(address: str) -> bool:
    """Whether a numeric address belongs to the public internet, seen by whoever dials it. False for what is no address."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.scope_id is not None or ip not in _UNICAST_V6 or any(ip in network for network in _REFUSED_V6):
            return False
    elif any(ip in network for network in _REFUSED_V4):
        return False
    return ip.is_global and not (
        ip.is_multicast or ip.is_reserved or ip.is_loopback or ip.is_link_local or ip.is_private
    )


class Egress:
    """Fetches from public addresses. Blocks; safe to use from several threads.

    `hosts` are the only ones allowed, if any are named: `images.example.com`, or `*.example.com` for all below it.
    `resolve` (name, port -> numeric addresses), `connect` (address, port, seconds -> socket) and `trust` are there for tests:
    whatever they do, only addresses that passed the check are handed to `connect`.
    """

    def __init__(
        self,
        hosts: Sequence[str] = (),
        *,
        resolve: Resolve | None = None,
        connect: Connect | None = None,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        self._hosts = tuple(host.lower() for host in hosts)
        self._resolve = resolve or _resolve
        self._connect = connect or _connect
        self._trust = trust
        self._trust_lock = threading.Lock()

    def fetch(
        self,
        url: str,
        target: BinaryIO,
        *,
        max_bytes: int = MAX_BYTES,
        timeout_s: float = TIMEOUT_S,
        max_redirects: int = MAX_REDIRECTS,
        accept: str = "*/*",
    ) -> Fetched:
        """Write the body behind `url` to `target`, at most `max_bytes` of it, all within `timeout_s`.

        After an error `target` may hold a part. Raises InvalidRequest (`invalid_url`, `url_not_allowed`, `fetch_failed` with
        `reason` and for a bad answer `status`), TooLarge(`fetch_too_large`), Unavailable(`fetch_failed`) for what may work
        later. No text holds an address.
        """
        deadline_s = mono_s() + timeout_s
        for _ in range(max_redirects + 1):
            address = self._allowed(url)
            with self._answer(address, deadline_s, accept) as answer:
                location = _location(answer)
                if location is None:
                    return _copy(answer, target, max_bytes)
            url = _joined(address, location)
        raise _failed("redirects")

    def post(self, url: str, body: bytes, headers: Mapping[str, str], *, timeout_s: float = TIMEOUT_S) -> int:
        """Send `body` and return the status of the answer, any status: redirects are not followed, and what the answer
        says beyond its head is not read.

        Raises as `fetch` does, but for what the status says.
        """
        deadline_s = mono_s() + timeout_s
        address = self._allowed(url)
        lines = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers.items()]
        lines.append((b"Content-Length", str(len(body)).encode("ascii")))
        with self._answer(address, deadline_s, "*/*", b"POST", lines, body) as answer:
            return answer.status

    def check(self, url: str) -> Address:
        """As `check_url`, and the host must be one of those allowed."""
        return self._allowed(url)

    def _allowed(self, url: str) -> Address:
        address = check_url(url)
        if self._hosts and not any(_matches(address.host, host) for host in self._hosts):
            raise _not_allowed("host")
        return address

    def _answer(
        self,
        address: Address,
        deadline_s: float,
        accept: str,
        method: bytes = b"GET",
        headers: Sequence[tuple[bytes, bytes]] = (),
        body: bytes = b"",
    ) -> "_Answer":
        import httpcore

        stream = _Stream(self._dial(address, deadline_s), deadline_s)
        try:
            if address.scheme == "https":
                stream.start_tls(self._context(), address.host)
            host = address.url.split("/", 3)[2].encode("ascii")
            request = httpcore.Request(
                method,
                httpcore.URL(
                    scheme=address.scheme.encode(),
                    host=address.host.encode(),
                    port=address.port,
                    target=address.target.encode("ascii"),
                ),
                headers=[
                    (b"Host", host),
                    (b"User-Agent", b"tunewright"),
                    (b"Accept", accept.encode("ascii")),
                    (b"Accept-Encoding", b"identity"),
                    (b"Connection", b"close"),
                    *headers,
                ],
                content=body,
            )
            connection = httpcore.HTTP11Connection(request.url.origin, cast(Any, stream))
            return _Answer(connection.handle_request(request), stream)
        except BaseException as error:
            stream.close()
            if isinstance(error, httpcore.ProtocolError):
                raise _failed("protocol") from None
            raise

    def _dial(self, address: Address, deadline_s: float) -> socket.socket:
        numbers = _within(deadline_s, lambda: self._resolve(address.host, address.port))
        if not numbers:
            raise _failed("dns", later=True)
        if not all(is_public(number) for number in numbers):  # one bad one is enough: nobody mixes them by accident
            raise _not_allowed("address")
        for number in numbers[:_DIALLED_ADDRESSES]:
            try:
                return self._connect(number, address.port, min(_left(deadline_s), _CONNECT_S))
            except OSError:
                continue
        raise _failed("connect", later=True)

    def _context(self) -> ssl.SSLContext:
        with self._trust_lock:
            if self._trust is None:
                import certifi

                self._trust = ssl.create_default_context()  # with what the operator's system trusts
                self._trust.load_verify_locations(certifi.where())
            return self._trust


def _matches(host: str, allowed: str) -> bool:
    return host.endswith(allowed[1:]) if allowed.startswith("*.") else host == allowed


def _resolve(host: str, port: int) -> list[str]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def _connect(address: str, port: int, timeout_s: float) -> socket.socket:
    return socket.create_connection((address, port), timeout_s)


def _within(deadline_s: float, call: Callable[[], list[str]]) -> list[str]:
    """The resolver's answer, empty if it has none. It takes no timeout, so a thread waits for it: at the deadline it is left."""
    answer: list[str] = []

    def ask() -> None:
        try:
            answer.extend(call())
        except (OSError, UnicodeError):
            answer.clear()

    asking = threading.Thread(target=ask, name="resolver", daemon=True)
    asking.start()
    asking.join(_left(deadline_s))
    if asking.is_alive():
        raise _failed("timeout", later=True)
    return answer


def _left(deadline_s: float) -> float:
    left = deadline_s - mono_s()
    if left <= 0:
        raise _failed("timeout", later=True)
    return left


class _Stream:
    """A socket as httpcore wants it, with one deadline for everything that happens on it, and errors that are ours: the
    system's own texts may hold addresses."""

    def __init__(self, connected: socket.socket, deadline_s: float) -> None:
        self._socket = connected
        self._deadline_s = deadline_s

    def start_tls(self, context: ssl.SSLContext, name: str) -> None:
        with self._timed():
            self._socket = context.wrap_socket(self._socket, server_hostname=name)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        with self._timed():
            return self._socket.recv(max_bytes)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        with self._timed():
            self._socket.sendall(buffer)

    def close(self) -> None:
        self._socket.close()

    def get_extra_info(self, info: str) -> Any:
        return None

    @contextmanager
    def _timed(self) -> Iterator[None]:
        self._socket.settimeout(_left(self._deadline_s))
        try:
            yield
        except TimeoutError:
            raise _failed("timeout", later=True) from None
        except ssl.SSLError:
            raise _failed("tls") from None
        except OSError:
            raise _failed("connect", later=True) from None


class _Answer:
    """The head of an answer and its body to come; closes the connection at the end."""

    def __init__(self, response: "httpcore.Response", stream: _Stream) -> None:
        self.status = response.status
        self._headers = response.headers
        self._response = response
        self._stream = stream

    def __enter__(self) -> "_Answer":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def header(self, name: bytes) -> str:
        """Empty if it is missing."""
        return next((value.decode("latin-1") for key, value in self._headers if key.lower() == name), "")

    def body(self) -> Iterator[bytes]:
        import httpcore

        try:
            yield from self._response.iter_stream()
        except httpcore.ProtocolError:
            raise _failed("protocol") from None


def _location(answer: _Answer) -> str | None:
    """Where the answer sends us; None if it is the answer itself."""
    if answer.status in (301, 302, 303, 307, 308):
        return answer.header(b"location")
    if answer.status != 200:
        later = answer.status >= 500 or answer.status in (408, 425, 429)
        raise _failed("status", later=later, status=answer.status)
    return None


def _joined(address: Address, location: str) -> str:
    """`location` may be relative. What urljoin would silently drop or turn must not get to it."""
    if not location or len(location) > MAX_URL_LENGTH or any(c <= " " or c == "\\" or c >= "\x7f" for c in location):
        raise _invalid_url("redirect")
    try:
        return urljoin(address.url, location)
    except ValueError:
        raise _invalid_url("redirect") from None


def _copy(answer: _Answer, target: BinaryIO, max_bytes: int) -> Fetched:
    if answer.header(b"content-encoding").strip().lower() not in ("", "identity"):
        raise _failed("encoding")
    length = answer.header(b"content-length")
    if length.isascii() and length.isdigit() and int(length[:20]) > max_bytes:
        raise _too_large(max_bytes)
    size, digest = 0, hashlib.sha256()
    for piece in answer.body():
        size += len(piece)
        if size > max_bytes:
            raise _too_large(max_bytes)
        digest.update(piece)
        target.write(piece)
    return Fetched(size, digest.hexdigest(), answer.header(b"content-type")[:100])


def _invalid_url(reason: str) -> InvalidRequest:
    return InvalidRequest(
        "invalid_url", mark("The address must be one plain http or https URL without a user name"), reason=reason
    )


def _not_allowed(reason: str) -> InvalidRequest:
    return InvalidRequest(
        "url_not_allowed",
        mark("The address may not be fetched: only public hosts on the ports 80 and 443 may"),
        reason=reason,
    )


def _too_large(limit: int) -> TooLarge:
    return TooLarge("fetch_too_large", mark("The address sends more than {limit_mib} MiB"), limit_mib=limit >> 20)


def _failed(reason: str, *, later: bool = False, status: int | None = None) -> TunewrightError:
    sentence = mark("The address could not be fetched ({reason})")
    if later:
        return Unavailable("fetch_failed", sentence, reason=reason, status=status)
    return InvalidRequest("fetch_failed", sentence, reason=reason, status=status)
