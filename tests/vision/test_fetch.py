"""Images over HTTP: from loopback servers only, and under any name only from public addresses."""

import contextlib
import datetime
import io
import socket
import ssl
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from PIL import Image

from llama.vision.fetch import Fetcher, is_public, load
from llama.vision.images import Limits

PNG = io.BytesIO()
Image.new("RGB", (3, 2), "red").save(PNG, "PNG")
LOOPBACK = "127.0.0.1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.headers["Host"], self.path))
        self.server.agents.add(self.headers["User-Agent"])
        name = self.path.partition("?")[0].strip("/")
        if name.startswith("to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
        elif name == "utf-8":
            self.wfile.write("HTTP/1.1 302 Found\r\nLocation: /é\r\n\r\n".encode())
        elif name == "none":
            self.send_error(404)
        elif name == "nowhere":
            self.send_response(302)
            self.end_headers()
        elif name in ("slow", "slow-head"):
            with contextlib.suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"\r\n" * (name == "slow"))
                while not self.server.stopped.wait(0.05):
                    self.wfile.write(b"x")
        elif name == "cut":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc")
        elif name == "noise":
            self.wfile.write(b"no HTTP at all\r\n\r\n")
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PNG.getvalue())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
    server.asked, server.agents, server.stopped = [], set(), threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.stopped.set()
    server.shutdown()
    server.server_close()
    thread.join()


NAMES = {
    "public.example": [LOOPBACK],  # which the fetcher under test takes for a public address
    "local.example": ["127.0.0.2"],
    "intranet.example": ["10.1.2.3"],
    "metadata.example": ["169.254.169.254"],
    "both.example": [LOOPBACK, "192.168.0.1"],
    "six.example": ["::1"],
    "mapped.example": ["::ffff:10.0.0.1"],
    "nat.example": ["64:ff9b::7f00:1"],
}


class Resolver:
    """Names of the table, then what the system makes of an address as it is written."""

    def __init__(self, names):
        self.names, self.asked = {k: list(v) for k, v in names.items()}, []

    def __call__(self, host, port, **options):
        self.asked.append(host)
        if host in self.names:
            families = [
                (socket.AF_INET6 if ":" in address else socket.AF_INET, address)
                for address in self.names[host]
            ]
            return [(family, 1, 6, "", (address, port)) for family, address in families]
        return socket.getaddrinfo(host, port, flags=socket.AI_NUMERICHOST, **options)


def fetcher(names=NAMES, **options) -> Fetcher:
    def allowed(address: str) -> bool:
        return address == LOOPBACK or is_public(address)

    return Fetcher(resolve=Resolver(names), **{"allowed": allowed, **options})


def at(server, path: str, host: str = "public.example") -> str:
    return f"http://{host}:{server.server_port}/{path}"


def test_an_image_is_fetched(server):
    image = load(at(server, "a b?size=3&x=é#part".replace(" ", "%20")), fetcher=fetcher())
    assert image.size == (3, 2) and image.getpixel((0, 0)) == (255, 0, 0)
    host, path = server.asked[-1]
    assert host == f"public.example:{server.server_port}" and path == "/a%20b?size=3&x=%C3%A9"
    idn = fetcher({"xn--bcher-kva.example": [LOOPBACK]})
    assert load(at(server, "x", "bücher.example"), fetcher=idn).size == (3, 2)
    assert server.asked[-1][0] == f"xn--bcher-kva.example:{server.server_port}"
    assert load(at(server, "x").replace("http", "HTTP"), fetcher=fetcher()).size == (3, 2)
    assert load(PNG.getvalue(), fetcher=fetcher()).size == (3, 2)
    assert server.agents == {"llama-reference"}  # Wikimedia refuses requests without


def test_redirects_are_followed_as_far_as_allowed(server):
    once, twice = at(server, "to//x"), at(server, "to//to//to//to//x")
    assert fetcher().fetch(once, 1000) == PNG.getvalue()
    assert fetcher(redirects=4).fetch(twice, 1000) == PNG.getvalue()
    assert fetcher().fetch(at(server, "utf-8"), 1000) == PNG.getvalue()
    assert server.asked[-1][1] == "/%C3%A9"
    with pytest.raises(ValueError, match="more than 3 redirects"):
        fetcher().fetch(twice, 1000)


# Addresses as people and attackers write them; none may be asked, directly or by a redirect.
PRIVATE = [
    "127.0.0.2", "127.1.2.3", "127.2", "2130706434", "0x7f000002", "0x7f.2", "017700000002",
    "0177.0.0.2", "0.0.0.0", "0", "10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255",
    "192.168.1.1", "3232235777", "169.254.169.254", "0xa9fea9fe", "100.64.0.1", "198.18.0.1",
    "192.0.2.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255", "[::1]", "[::]",
    "[::ffff:127.0.0.2]", "[::ffff:7f00:2]", "[::ffff:10.0.0.1]", "[::127.0.0.2]",
    "[64:ff9b::10.0.0.1]", "[64:ff9b::a9fe:a9fe]", "[64:ff9b:1::1]", "[2002:7f00:2::]",
    "[2002:c0a8:101::1]", "[2001::1]", "[fe80::1]", "[fec0::1]", "[fc00::1]", "[fd00:ec2::254]",
    "[ff02::1]", "[2001:db8::1]", "local.example", "intranet.example", "metadata.example",
    "both.example", "six.example", "mapped.example", "nat.example",
]  # fmt: skip


@pytest.mark.parametrize("host", PRIVATE)
def test_addresses_that_are_not_public_are_refused(server, host, monkeypatch):
    connected = []
    real = socket.socket.connect
    monkeypatch.setattr(
        socket.socket, "connect", lambda s, to: (connected.append(to[0]), real(s, to))[1]
    )
    there = f"http://{host}:{server.server_port}/x"
    for url in (there, there.replace("http", "https"), at(server, f"to/{there}")):
        with pytest.raises(ValueError, match="isn't fetched: its address isn't public"):
            fetcher().fetch(url, 1000)
    assert set(connected) == {LOOPBACK}  # the redirect's first hop


def test_public_addresses_are_public():
    public = [
        "8.8.8.8", "1.1.1.1", "93.184.216.34", "172.15.0.1", "172.32.0.1", "2606:4700::1111",
        "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1",
    ]  # fmt: skip
    assert all(map(is_public, public))
    for host in PRIVATE:  # the table itself, where it is written as an address
        with contextlib.suppress(ValueError):
            assert not is_public(str(ip_address(host.strip("[]"))))


def certificate(folder, name: str) -> str:
    """A file with a key and its certificate, signed by itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    day = datetime.timedelta(days=1)
    signed = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 1, now - day, now + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    form = serialization.PrivateFormat.TraditionalOpenSSL
    private = key.private_bytes(Encoding.PEM, form, serialization.NoEncryption())
    path = folder / name
    path.write_bytes(private + signed.public_bytes(Encoding.PEM))
    return str(path)


def test_https_checks_the_certificate_and_its_name(tmp_path, monkeypatch):
    path = certificate(tmp_path, "public.example")
    server = ThreadingHTTPServer((LOOPBACK, 0), Handler)
    server.asked, server.agents, server.stopped = [], set(), threading.Event()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    with contextlib.closing(server.socket), ThreadPoolExecutor(1) as threads:
        threads.submit(server.serve_forever)
        try:
            url = at(server, "x").replace("http:", "https:")
            with pytest.raises(ValueError, match="certificate verify failed"):
                fetcher().fetch(url, 1000)
            monkeypatch.setenv("SSL_CERT_FILE", path)  # trusted from here on
            assert fetcher().fetch(url, 1000) == PNG.getvalue()
            other = fetcher({"other.example": [LOOPBACK]})
            with pytest.raises(ValueError, match="certificate verify failed.*[Hh]ostname"):
                other.fetch(url.replace("public", "other"), 1000)
        finally:
            server.shutdown()


def test_the_default_refuses_loopback(server):
    with pytest.raises(ValueError, match="isn't public"):
        Fetcher().fetch(f"http://{LOOPBACK}:{server.server_port}/x", 1000)
    everything = Fetcher(allowed=lambda address: True)
    assert everything.fetch(f"http://{LOOPBACK}:{server.server_port}/x", 1000) == PNG.getvalue()


def test_a_name_is_resolved_once_so_that_it_cannot_change_after_the_check(server):
    class Rebinding(Resolver):
        def __call__(self, host, port, **options):
            found = super().__call__(host, port, **options)
            self.names[host] = ["127.0.0.2"]  # what every later question is told
            return found

    rebinding = Rebinding({"public.example": [LOOPBACK]})
    one = Fetcher(resolve=rebinding, allowed=lambda address: address == LOOPBACK)
    assert one.fetch(at(server, "x"), 1000) == PNG.getvalue()
    assert rebinding.asked == ["public.example"]
    with pytest.raises(ValueError, match="isn't public"):
        one.fetch(at(server, "x"), 1000)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://public.example/x", "file:///etc/passwd", "gopher://public.example", "//x", "x", "",
        "http://", "http:///x", "http://user:key@public.example/x", "http://public.example\\@x/",
        "http://public.example/a b", "http://public.example/a\r\nHost: x", "http://a\tb/",
        "http://public.example:99999/", "http://public.example:x/", "http://[::1/", "javascript:1",
        "http://" + "a" * 300 + ".example/", "http://./",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(url):
    resolver = Resolver(NAMES)
    with pytest.raises(ValueError):
        Fetcher(resolve=resolver).fetch(url, 1000)


@pytest.mark.parametrize("path", ["none", "nowhere", "cut", "noise"])
def test_answers_that_are_no_file_are_errors(server, path):
    said = {"none": "HTTP 404", "nowhere": "HTTP 302"}.get(path, "can't be fetched")
    with pytest.raises(ValueError, match=said):
        fetcher().fetch(at(server, path), 1000)


def test_bytes_and_pixels_are_limited(server):
    size = len(PNG.getvalue())
    assert fetcher().fetch(at(server, "x"), size) == PNG.getvalue()
    with pytest.raises(ValueError, match=f"more bytes than the limit, {size - 1}"):
        fetcher().fetch(at(server, "x"), size - 1)
    with pytest.raises(ValueError, match="3 x 2 pixels, and the limit is 5"):
        load(at(server, "x"), Limits(max_pixels=5), fetcher())


@pytest.mark.parametrize("path", ["slow", "slow-head"])
def test_bytes_that_come_one_by_one_end_at_the_deadline(server, path):
    """Each comes in time, and there is no end of them."""
    with pytest.raises(ValueError, match=r"took longer than 0\.5 s"):
        fetcher(timeout=0.5).fetch(at(server, path), 10**9)


def test_unknown_names_and_closed_ports_are_errors():
    with socket.socket() as free:
        free.bind((LOOPBACK, 0))
        port = free.getsockname()[1]
    with pytest.raises(ValueError, match="can't be fetched"):
        fetcher().fetch(f"http://public.example:{port}/", 1000)
    with pytest.raises(ValueError, match="can't be fetched"):
        fetcher().fetch("http://unknown.example/", 1000)


def test_a_name_with_several_addresses_is_tried_at_each(server):
    names = {"public.example": ["127.0.0.3", LOOPBACK]}
    one = fetcher(names, allowed=lambda address: True)
    assert one.fetch(at(server, "x"), 1000) == PNG.getvalue()
