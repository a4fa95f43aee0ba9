"""Authorised senders of OTLP: certificates, the bearer token, and rules for open addresses.

Frames are what decisions follow from, so whoever can send frames can steer a run.
"""

from __future__ import annotations

import hmac
import logging
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from esper_tamiyo.receiving.addresses import Address

log = logging.getLogger("tamiyo")

MIN_TOKEN = 16
"""Fewest characters of a token: less can be guessed."""

MAX_FILE = 1 << 20
LOOK_AGAIN_S = 1.0
"""How often files are looked at for a new token or certificate, at most."""

_BEARER = b"bearer "


class CredentialsError(Exception):
    """Credentials that cannot be used; the text names option, file and what was expected."""


class Credentials(msgspec.Struct, frozen=True):
    """Files that say who we are and who others must be; "" is none."""

    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    token_file: str = ""

    def validate(self) -> None:
        """Raises :class:`CredentialsError` for files that do not belong together or fail."""
        if bool(self.tls_cert) != bool(self.tls_key):
            given, missing = ("--tls-cert", "--tls-key")[:: 1 if self.tls_cert else -1]
            raise CredentialsError(f"{given} needs {missing} beside it")
        if self.tls_client_ca and not self.tls_cert:
            raise CredentialsError("--tls-client-ca needs --tls-cert and --tls-key beside it")
        if self.tls_cert:
            self.ssl_context()
        if self.token_file:
            read_token(self.token_file)

    def ssl_context(self) -> ssl.SSLContext:
        """What an HTTPS server needs; raises :class:`CredentialsError`."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        _read("--tls-cert", self.tls_cert)
        _read("--tls-key", self.tls_key)
        try:
            context.load_cert_chain(self.tls_cert, self.tls_key, _no_passphrase)
        except _PassphraseError:
            raise CredentialsError(
                f"--tls-key {self.tls_key}: asks for a passphrase; expected a key without one"
            ) from None
        except ssl.SSLError as error:
            raise CredentialsError(
                f"--tls-cert {self.tls_cert}, --tls-key {self.tls_key}: "
                f"{_in_words(error)}; expected a PEM certificate chain and its private key"
            ) from None
        if self.tls_client_ca:
            _read("--tls-client-ca", self.tls_client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
            try:
                context.load_verify_locations(self.tls_client_ca)
            except ssl.SSLError as error:
                raise CredentialsError(
                    f"--tls-client-ca {self.tls_client_ca}: {_in_words(error)}; "
                    "expected PEM certificates"
                ) from None
        return context

    def pem(self) -> tuple[bytes, bytes, bytes | None]:
        """Key, certificate chain and the clients' CA, as gRPC takes them."""
        key = _read("--tls-key", self.tls_key)
        chain = _read("--tls-cert", self.tls_cert)
        return (
            key,
            chain,
            _read("--tls-client-ca", self.tls_client_ca) if self.tls_client_ca else None,
        )

    def exposure(
        self,
        address: Address,
        insecure: bool,
        risk: str = "can send frames can steer a run",
        deed: str = "send",
    ) -> str:
        """What a person should be told about this address, "" for nothing.

        Whoever reaches it ``deed``, and by that the ``risk``. Raises
        :class:`CredentialsError` when it is open and nothing protects it.
        """
        if address.is_loopback:
            return ""
        if not (self.tls_cert or self.token_file or insecure):
            raise CredentialsError(
                f"{address.host} is reachable from other machines, and anyone who {risk}; "
                "expected a loopback address such as 127.0.0.1, or "
                "--tls-cert and --tls-key, --token-file, or --insecure"
            )
        if not (self.token_file or self.tls_client_ca):
            return (
                f"anyone who reaches it can {deed}; --token-file or --tls-client-ca prevents "
                "that"
            )
        if not self.tls_cert:
            return "the token travels in the clear; --tls-cert and --tls-key prevent that"
        return ""


class RenewedFiles:
    """When files have changed, and that they cannot be used: told once for each reason."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths
        self._seen = self._signatures()
        self._look_at = time.monotonic() + LOOK_AGAIN_S
        self._told = ""

    def renew(self, take: Callable[[], None]) -> None:
        """Call ``take`` if they have changed; what was taken before holds when it raises
        :class:`CredentialsError`, and it is tried again."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_AGAIN_S
        seen = self._signatures()
        if seen == self._seen:
            return
        try:
            take()
        except CredentialsError as error:  # half written, perhaps
            if str(error) != self._told:
                log.warning("%s; the last good one stays in use", error)
            self._told = str(error)
            return
        if seen == self._signatures():  # else one was exchanged while they were read
            self._seen = seen
            self._told = ""

    def _signatures(self) -> list[tuple[int, int, int] | None]:
        return [_signature(path) for path in self._paths]


class Certificates:
    """What TLS needs, read again about a second after one of its files changed.

    Connections that are open keep what they began with. May be asked from any thread.
    """

    def __init__(self, credentials: Credentials) -> None:
        """Raises :class:`CredentialsError`."""
        self._credentials = credentials
        self._lock = threading.Lock()
        paths = (credentials.tls_cert, credentials.tls_key, credentials.tls_client_ca)
        self._files = RenewedFiles([path for path in paths if path])
        self._context = credentials.ssl_context()
        self._pem = credentials.pem()

    def context(self) -> ssl.SSLContext:
        """For a connection that comes now."""
        with self._lock:
            self._files.renew(self._take)
            return self._context

    def pem(self) -> tuple[bytes, bytes, bytes | None]:
        """Key, certificate chain and the clients' CA; the same object while they are the
        same."""
        with self._lock:
            self._files.renew(self._take)
            return self._pem

    def _take(self) -> None:
        context, pem = self._credentials.ssl_context(), self._credentials.pem()
        self._context, self._pem = context, pem
        log.warning("the certificates have changed and were read again")


class BearerAuth:
    """Holds the ``Authorization`` of a request against the token file.

    The file is looked at again now and then, so a token can be replaced (a Kubernetes
    secret is) without a restart. When the file becomes unusable the last token holds.
    """

    def __init__(self, token_file: str) -> None:
        self._path = token_file
        self._token = read_token(token_file) if token_file else b""
        self._file = RenewedFiles([token_file])

    @property
    def is_needed(self) -> bool:
        """Whether nobody comes in without a token."""
        return bool(self._path)

    def admits(self, authorization: str | bytes | None) -> bool:
        """Whether a request with that header may come in."""
        if not self._path:
            return True
        self._file.renew(self._take)
        given = authorization or b""
        if isinstance(given, str):  # bytes that are no UTF-8 came as surrogates
            given = given.encode("utf-8", "surrogateescape")
        bearer, token = given[: len(_BEARER)], given[len(_BEARER) :]
        # Compared in constant time: how far a guess was right must not show.
        return hmac.compare_digest(token.strip(), self._token) and bearer.lower() == _BEARER

    def _take(self) -> None:
        self._token = read_token(self._path)


def read_token(path: str) -> bytes:
    """The token in a file, without white space around it; raises :class:`CredentialsError`."""
    token = _read("--token-file", path).strip()
    if not token:
        raise CredentialsError(f"--token-file {path}: is empty; expected one token")
    if len(token) < MIN_TOKEN or not all(33 <= byte < 127 for byte in token):
        raise CredentialsError(
            f"--token-file {path}: expected one token of at least {MIN_TOKEN} printable ASCII "
            "characters without spaces, for example from `openssl rand -hex 32`"
        )
    return token


class _PassphraseError(Exception):
    pass


def _no_passphrase() -> str:
    """Instead of asking at the terminal."""
    raise _PassphraseError


def _read(option: str, path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            return file.read(MAX_FILE)
    except OSError as error:
        raise CredentialsError(f"{option} {path}: {error.strerror or error}") from None


def _signature(path: str) -> tuple[int, int, int] | None:
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino)


def _in_words(error: ssl.SSLError) -> str:
    """OpenSSL's reason as a person would say it."""
    reason = error.reason or ""
    if reason == "KEY_VALUES_MISMATCH":
        return "the key is not that of the certificate"
    return reason.replace("_", " ").lower() or "not usable"
