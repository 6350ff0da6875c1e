"""Which addresses the page answers to: host names, origins of other pages, headers of a reverse proxy."""

import errno
import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_EVERY_INTERFACE = frozenset({"0.0.0.0", "::", ""})
_PORTS = range(7860, 7960)
_HTTP_PORTS = {"http": 80, "https": 443}


class AddressError(ValueError):
    """An address cannot be used; the message says what was expected."""


class Addresses:
    """The addresses that a browser may use for this server.

    A page of another site could otherwise talk to a server on the visitor's machine: directly, or with a host name of
    its own that it points here (DNS rebinding).

    Args:
        host: address that the server listens on.
        root_path: where a reverse proxy serves the page: a path, or the whole address.
        origins: addresses of other pages that may use this server.

    Raises:
        AddressError: `root_path` or an origin is not an address.
    """

    def __init__(self, host: str, root_path: str = "", origins: Iterable[str] = ()):
        self.every_interface = host in _EVERY_INTERFACE
        self.hosts = {*_LOOPBACK_NAMES, host.strip("[]").lower()} - _EVERY_INTERFACE
        if self.every_interface:
            name = socket.gethostname().lower()
            self.hosts |= {name, name.partition(".")[0], f"{name.partition('.')[0]}.local"}
        self.origins: set[str] = set()
        self.behind_proxy = bool(root_path)
        for address in origins:
            self.allow(address)
        if root_path and not root_path.startswith("/"):
            self.allow(root_path, whole=False)

    def allow(self, address: str, *, whole: bool = True) -> None:
        """Also answer to an address such as https://music.example.

        Args:
            address: scheme, host and perhaps a port.
            whole: whether it must have no path.

        Raises:
            AddressError: it is something else.
        """
        origin = _origin(address)
        if origin is None or (whole and urlsplit(address).path.strip("/")):
            path = "" if whole else "a path such as /music or "
            raise AddressError(f"expected {path}an address such as https://music.example, got {address}")
        self.origins.add(origin)
        self.hosts.add(_name(urlsplit(address).netloc))

    def answers_to(self, host: str) -> bool:
        """Whether a `Host` header, a name or address with or without a port, means this server."""
        name = _name(host)
        # A page can point its own name at any address, but it cannot take the place of an address.
        return name in self.hosts or (self.every_interface and _is_ip(name))

    def may_use(self, origin: str, host: str) -> bool:
        """Whether a page may use this server.

        Args:
            origin: of the page, the `Origin` header.
            host: under which it asked, the `Host` header.
        """
        asked = _origin(origin)
        return asked is not None and (
            asked in self.origins or asked in (_origin(f"http://{host}"), _origin(f"https://{host}"))
        )


def address_in_network() -> str | None:
    """This machine's address in the local network; None if it is in none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation; nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            return None


def free_port(host: str, port: int | None) -> int:
    """The port to listen on: `port`, or the first free one from 7860.

    Raises:
        AddressError: it is taken, or `host` is not an address of this machine.
    """
    for candidate in _PORTS if port is None else [port]:
        try:
            for address in {host.strip("[]") or "0.0.0.0", "127.0.0.1"}:  # Gradio needs both
                _try_to_listen(address, candidate)
        except socket.gaierror as error:
            raise AddressError(f"cannot listen on {host}: there is no such address") from error
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise AddressError(f"cannot listen on {host}: it is not an address of this machine") from error
            if error.errno == errno.EACCES:
                raise AddressError(f"cannot listen on port {candidate}: choose one above 1023 with --port") from error
        else:
            return candidate
    if port is None:
        raise AddressError(f"the ports {_PORTS[0]} to {_PORTS[-1]} are taken: choose another with --port")
    raise AddressError(f"port {port} is taken, perhaps by another music-ar web: choose another with --port")


def _try_to_listen(address: str, port: int) -> None:
    family, kind, *_, name = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(name)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen on."""
    name = _name(host)
    return name in _LOOPBACK_NAMES or (_is_ip(name) and ipaddress.ip_address(name).is_loopback)


def _origin(address: str) -> str | None:
    """Scheme, host and port of an address, with the port written out; None if it is not one."""
    try:
        parts = urlsplit(address)
        port = parts.port or _HTTP_PORTS.get(parts.scheme)
    except ValueError:
        return None
    if port is None or not parts.hostname or parts.username is not None:
        return None
    return f"{parts.scheme}://{parts.hostname}:{port}"


def _name(host: str) -> str:
    """The name in a `Host` header, without its port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
