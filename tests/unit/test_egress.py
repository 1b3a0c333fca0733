"""The egress client against a small internet of its own: which addresses it takes, and that it dials nothing else."""

import hashlib
import io
import ipaddress
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evil_hosts import PUBLIC, REDIRECTS, SmallInternet
from tunewright import egress
from tunewright.egress import Address, Egress, check_url, is_public
from tunewright.errors import InvalidRequest, TooLarge, TunewrightError, Unavailable

GOOD = {
    "https://good.example": "https://good.example/",
    "http://good.example/a/b.png?x=1&y=%20": "http://good.example/a/b.png?x=1&y=%20",
    "HTTPS://Good.Example/A": "https://good.example/A",
    "https://good.example:443/x": "https://good.example/x",
    "http://good.example:80/x#part": "http://good.example/x",
    "https://good.example.:443/": "https://good.example/",
    "http://good.example?x=1": "http://good.example/?x=1",
    "https://bücher.example/": "https://xn--bcher-kva.example/",
    "https://ＧＯＯＤ。example/": "https://good.example/",
    "https://good.example/圖.png": "https://good.example/%E5%9C%96.png",
    "http://93.184.215.14/x": "http://93.184.215.14/x",
    "http://[2606:2800:21f:cb07:6820:80da:af6b:8b2c]/x": "http://[2606:2800:21f:cb07:6820:80da:af6b:8b2c]/x",
    "https://good.example:80/": "https://good.example:80/",
    "https://a_b.good.example/x@y:z": "https://a_b.good.example/x@y:z",
}
INVALID = [
    "", " ", "x", "good.example/x", "//good.example/x", "http:good.example", "http:/good.example", "http://", "https:///x",
    "ftp://good.example/", "file:///etc/passwd", "gopher://good.example/", "jar:http://good.example!/", "javascript:1",
    "data:image/png;base64,AAAA", "ws://good.example/", "http+unix://%2Fvar/x", "httpx://good.example/",
    "http://user@good.example/", "http://user:word@good.example/", "http://@good.example/", "http://good.example@127.0.0.1/",
    "http://good.example\\@127.0.0.1/", "http:\\\\good.example\\", "http://good.example/\\..\\x", "http://good.example/ x",
    " http://good.example/", "http://good.example/\n", "http://good.example/\r\nHost: x", "http://good.example/\x00",
    "http://good.example/\x7f", "http://good.example/\u2028", "http://good.example/\ud800", "http://go\tod.example/",
    "http://good.example:/", "http://good.example:x/", "http://good.example:-1/", "http://good.example:+80/",
    "http://good.example:８０/", "http://good.example:80:80/", "http://good.example:999999/",
    "http://.good.example/", "http://good..example/", "http://-good.example/", "http://good-.example/", "http://*.example/",
    "http://good.example%2f@127.0.0.1/", "http://%31%32%37.0.0.1/", "http://a" + "b" * 63 + ".example/", "http://[]/", "http://[x]/",
    "http://[::1/", "http://[2606:4700::1111/", "http://[2606:4700::1111]80/", "http://[fe80::1%25eth0]/", "http://[::1]x/", "http://[127.0.0.1]/",
    "http://\u200bgood.example/",
    "http://2130706433/", "http://0x7f000001/", "http://0x7f.0.0.1/", "http://0177.0.0.1/", "http://127.1/", "http://0/", "http://127.0.1/",
    "http://017700000001/", "http://1.1.1.1.1/", "http://256.1.1.1/", "http://1.1.1.0x1/", "http://127.0.0.08/", "http://0x/",
    "http://good.example/" + "x" * 5000,
]  # fmt: skip
NOT_ALLOWED = [
    "http://127.0.0.1/", "http://127.0.0.1:80/x", "http://127.8.8.8/", "http://127.0.0.1./", "http://0.0.0.0/", "http://10.0.0.1/",
    "http://172.16.0.1/", "http://192.168.1.1/", "http://169.254.169.254/latest/", "http://100.64.0.1/", "http://100.100.100.200/",
    "http://168.63.129.16/", "http://192.0.0.8/", "http://192.0.0.192/", "http://192.0.2.1/", "http://198.18.0.1/", "http://198.51.100.1/",
    "http://203.0.113.1/", "http://224.0.0.1/", "http://240.0.0.1/", "http://255.255.255.255/", "http://192.88.99.1/",
    "http://１２７.0.0.1/", "http://①②⑦.0.0.1/", "http://127。0。0。1/", "http://[::]/", "http://[::1]/", "http://[::127.0.0.1]/",
    "http://[::ffff:127.0.0.1]/", "http://[::ffff:7f00:1]/", "http://[::ffff:169.254.169.254]/", "http://[::ffff:0:127.0.0.1]/",
    "http://[64:ff9b::a9fe:a9fe]/", "http://[64:ff9b::7f00:1]/", "http://[64:ff9b:1::a00:1]/", "http://[2002:7f00:1::]/",
    "http://[2002:a9fe:a9fe::1]/", "http://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/", "http://[2001:db8::1]/", "http://[3fff::1]/",
    "http://[fc00::1]/", "http://[fd00:ec2::254]/", "http://[fe80::1]/", "http://[ff02::1]/", "http://[fec0::1]/", "http://[100::1]/",
    "http://[5f00::1]/", "http://[2001:20::1]/", "http://[0:0:0:0:0:ffff:10.0.0.1]/", "http://localhost/", "http://LOCALHOST/",
    "http://localhost./", "http://metadata/", "http://router/", "http://good.example:22/", "http://good.example:8000/",
    "https://good.example:8443/", "http://good.example:0/", "http://good.example:65535/", "http://93.184.215.14:6379/",
]  # fmt: skip


@pytest.fixture
def internet() -> Iterator[SmallInternet]:
    made = SmallInternet()
    yield made
    made.close()


def client(internet: SmallInternet, hosts: tuple[str, ...] = (), trust: ssl.SSLContext | None = None) -> Egress:
    return Egress(hosts, resolve=internet.resolve, connect=internet.connect, trust=trust)


def fetched(internet: SmallInternet, url: str, **options: object) -> bytes:
    target = io.BytesIO()
    client(internet).fetch(url, target, **options)  # type: ignore[arg-type]
    return target.getvalue()


def refused(internet: SmallInternet, url: str, **options: object) -> TunewrightError:
    with pytest.raises(TunewrightError) as caught:
        fetched(internet, url, **options)
    text = caught.value.text() + caught.value.text("zh")
    assert not any(part in text for part in ("127.", "169.254", PUBLIC, "0x", "10.0")), "no address in a text"
    return caught.value


def test_the_table_is_long_enough() -> None:
    assert len({*GOOD, *INVALID, *NOT_ALLOWED}) >= 80 + len(GOOD)


@pytest.mark.parametrize("url", GOOD)
def test_plain_addresses_are_taken_apart(url: str) -> None:
    assert check_url(url).url == GOOD[url]


@pytest.mark.parametrize("url", INVALID)
def test_odd_addresses_are_refused_and_nothing_is_dialled(internet: SmallInternet, url: str) -> None:
    assert refused(internet, url).code == "invalid_url"
    assert (internet.hits, internet.asked, internet.dialled) == (0, [], [])


@pytest.mark.parametrize("url", NOT_ALLOWED)
def test_addresses_inside_are_refused_and_nothing_is_dialled(internet: SmallInternet, url: str) -> None:
    assert refused(internet, url).code == "url_not_allowed"
    assert (internet.hits, internet.asked, internet.dialled) == (0, [], [])


@given(st.text(max_size=60))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    for url in (text, f"http://{text}/", f"https://good.example/{text}", f"http://good.example:{text}"):
        try:
            address = check_url(url)
        except InvalidRequest as error:
            assert error.code in ("invalid_url", "url_not_allowed")
        else:
            assert address.port in (80, 443) and address.url.isascii() and address.target.startswith("/")
            assert check_url(address.url) == address


@given(st.ip_addresses())
def test_no_address_inside_counts_as_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    if is_public(str(ip)):
        assert ip.is_global and not ip.is_multicast
        assert ip.version == 4 or ip in ipaddress.IPv6Network("2000::/3")


def test_a_body_arrives_with_its_hash(internet: SmallInternet) -> None:
    target = io.BytesIO()
    got = client(internet).fetch("http://good.example/image", target, accept="image/*")
    assert target.getvalue() == b"image"
    assert got == egress.Fetched(5, hashlib.sha256(b"image").hexdigest(), "image/png")
    assert internet.dialled == [(PUBLIC, 80)]
    head = internet.requests[0].lower()
    assert b"host: good.example\r\n" in head and b"accept-encoding: identity" in head and b"accept: image/*" in head
    assert b"cookie" not in head and b"authorization" not in head


@pytest.mark.parametrize("host", ["inside.example", "mixed.example", "late.example"])
def test_a_name_with_an_address_inside_is_not_dialled(internet: SmallInternet, host: str) -> None:
    assert refused(internet, f"http://{host}/image").code == "url_not_allowed"
    assert (internet.hits, internet.dialled) == (0, [])


@pytest.mark.parametrize(
    "answer",
    [
        "127.0.0.1",
        "::1",
        "fe80::1%eth0",
        "64:ff9b::7f00:1",
        "::ffff:93.184.215.14",
        "168.63.129.16",
        "not an address",
        "",
    ],
)
def test_whatever_the_resolver_says_only_public_addresses_are_dialled(internet: SmallInternet, answer: str) -> None:
    internet.names["odd.example"] = [[answer]]
    assert refused(internet, "http://odd.example/").code == "url_not_allowed"
    assert (internet.hits, internet.dialled) == (0, [])


def test_a_name_is_resolved_once_for_each_fetch(internet: SmallInternet) -> None:
    """Rebinding: between the look and the dial there is no second question."""
    assert fetched(internet, "http://rebinding.example/image") == b"image"
    assert (internet.asked, internet.dialled, internet.hits) == (["rebinding.example"], [(PUBLIC, 80)], 0)
    assert refused(internet, "http://rebinding.example/image").code == "url_not_allowed"
    assert internet.hits == 0


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/to-loopback", "url_not_allowed"),
        ("/to-metadata", "url_not_allowed"),
        ("/to-mapped", "url_not_allowed"),
        ("/to-private-name", "url_not_allowed"),
        ("/to-port", "url_not_allowed"),
        ("/to-scheme-relative", "url_not_allowed"),
        ("/chain-to-loopback", "url_not_allowed"),
        ("/to-file", "invalid_url"),
        ("/to-gopher", "invalid_url"),
        ("/to-userinfo", "invalid_url"),
        ("/to-backslash", "invalid_url"),
        ("/to-number", "invalid_url"),
        ("/to-nothing", "invalid_url"),
        ("/to-long", "invalid_url"),
        ("/four-times", "fetch_failed"),
        ("/for-ever", "fetch_failed"),
    ],
)
def test_every_hop_is_looked_at_again(internet: SmallInternet, path: str, code: str) -> None:
    assert path in REDIRECTS
    assert refused(internet, f"http://good.example{path}").code == code
    assert internet.hits == 0 and {address for address, _ in internet.dialled} == {PUBLIC}


@pytest.mark.parametrize("path", ["/to-good", "/to-relative", "/twice", "/thrice"])
def test_three_redirects_are_followed_without_cookies(internet: SmallInternet, path: str) -> None:
    if path == "/thrice":  # itself, /twice, /to-good: three hops
        assert fetched(internet, f"http://good.example{path}", max_redirects=3) == b"image"
        assert refused(internet, f"http://good.example{path}", max_redirects=2).values["reason"] == "redirects"
    else:
        assert fetched(internet, f"http://good.example{path}") == b"image"
    assert not any(b"cookie" in head.lower() for head in internet.requests)


def test_who_wants_no_redirects_gets_none(internet: SmallInternet) -> None:
    assert refused(internet, "http://good.example/to-good", max_redirects=0).values["reason"] == "redirects"
    assert len(internet.requests) == 1


@pytest.mark.parametrize(
    ("path", "reason", "later"),
    [
        ("/slow", "timeout", True),
        ("/silent", "timeout", True),
        ("/rubbish", "protocol", False),
        ("/endless-head", "protocol", False),
        ("/short", "protocol", False),
        ("/gzip", "encoding", False),
        ("/te-gzip", "protocol", False),
    ],
)
def test_bad_answers_end_the_fetch(internet: SmallInternet, path: str, reason: str, later: bool) -> None:
    error = refused(internet, f"http://good.example{path}", timeout_s=0.5 if reason == "timeout" else 60.0)
    assert (error.code, error.values["reason"], error.retryable) == ("fetch_failed", reason, later)


@pytest.mark.parametrize("path", ["/endless", "/announced"])
def test_no_more_than_the_limit_is_taken(internet: SmallInternet, path: str) -> None:
    target = io.BytesIO()
    with pytest.raises(TooLarge) as caught:
        client(internet).fetch(f"http://good.example{path}", target, max_bytes=1 << 20)
    assert caught.value.code == "fetch_too_large" and len(target.getvalue()) <= 1 << 20


def test_a_body_of_exactly_the_limit_is_taken(internet: SmallInternet) -> None:
    internet.body = bytes(1 << 20)
    assert fetched(internet, "http://good.example/image", max_bytes=1 << 20) == internet.body


@pytest.mark.parametrize(
    ("status", "later"), [(404, False), (403, False), (500, True), (503, True), (429, True), (204, False)]
)
def test_statuses_are_named_and_known_to_be_worth_a_retry(internet: SmallInternet, status: int, later: bool) -> None:
    internet.status["/bad"] = status
    error = refused(internet, "http://good.example/bad")
    assert (error.values["reason"], error.values["status"], error.retryable) == ("status", status, later)


def test_a_name_that_nobody_knows_and_a_host_that_is_down(internet: SmallInternet) -> None:
    assert refused(internet, "http://unknown.example/").values["reason"] == "dns"

    def down(address: str, port: int, timeout_s: float) -> object:
        raise ConnectionRefusedError(111, f"connect to {address}")

    dead = Egress(resolve=internet.resolve, connect=down)  # type: ignore[arg-type]
    with pytest.raises(Unavailable) as caught:
        dead.fetch("http://good.example/", io.BytesIO())
    assert caught.value.values["reason"] == "connect"


def test_a_resolver_that_hangs_is_left(internet: SmallInternet) -> None:
    slow = Egress(resolve=lambda host, port: [str(internet.closed.wait(5))], connect=internet.connect)
    with pytest.raises(Unavailable) as caught:
        slow.fetch("http://good.example/", io.BytesIO(), timeout_s=0.2)
    assert caught.value.values["reason"] == "timeout"


def test_the_next_address_is_tried_if_one_is_down(internet: SmallInternet) -> None:
    def half(address: str, port: int, timeout_s: float) -> object:
        if address == PUBLIC:
            raise TimeoutError
        return internet.connect(address, port, timeout_s)

    target = io.BytesIO()
    Egress(resolve=internet.resolve, connect=half).fetch("http://two.example/image", target)  # type: ignore[arg-type]
    assert target.getvalue() == b"image"


def test_only_hosts_on_the_list(internet: SmallInternet) -> None:
    narrow = client(internet, ("good.example", "*.allowed.example"))
    assert narrow.check("https://GOOD.example/x").host == "good.example"
    assert narrow.check("https://a.b.allowed.example/").host == "a.b.allowed.example"
    for url in (
        "http://two.example/",
        "http://evilgood.example/",
        "http://allowed.example/",
        "http://good.example.evil.example/",
    ):
        with pytest.raises(InvalidRequest, match="url_not_allowed"):
            narrow.check(url)
    elsewhere = client(internet, ("two.example",))
    with pytest.raises(InvalidRequest, match="url_not_allowed"):
        elsewhere.fetch("http://two.example/to-good", io.BytesIO())


def test_a_full_disk_is_not_the_hosts_fault(internet: SmallInternet) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        client(internet).fetch("http://good.example/image", Full())


def test_proxies_of_the_environment_are_not_used(internet: SmallInternet, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetched(internet, "http://good.example/image") == b"image"


# --- TLS


def certificate(folder: Path, name: str) -> Path:
    """A self-signed certificate for `name` with its key."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}.pem"
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.mark.parametrize(("host", "reason"), [("good.example", None), ("two.example", "tls")])
def test_the_certificate_must_be_for_the_name_not_the_address(tmp_path: Path, host: str, reason: str | None) -> None:
    path = certificate(tmp_path, "good.example")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    names: list[str | None] = []
    server.sni_callback = lambda _socket, name, _context: names.append(name)
    internet = SmallInternet(trust=server)
    try:
        trusting = client(internet, trust=ssl.create_default_context(cafile=str(path)))
        target = io.BytesIO()
        if reason is None:
            trusting.fetch(f"https://{host}/image", target)
            assert target.getvalue() == b"image"
        else:
            with pytest.raises(InvalidRequest) as caught:
                trusting.fetch(f"https://{host}/image", target)
            assert caught.value.values["reason"] == reason
        assert names == [host] and internet.dialled[0] == (PUBLIC, 443)
        with pytest.raises(InvalidRequest) as stranger:  # nobody but the test trusts this certificate
            client(internet).fetch("https://good.example/image", io.BytesIO())
        assert stranger.value.values["reason"] == "tls"
    finally:
        internet.close()


def test_an_address_is_shown_as_one_text() -> None:
    assert Address("https", "2606:4700::1111", 80, "/x").url == "https://[2606:4700::1111]:80/x"
