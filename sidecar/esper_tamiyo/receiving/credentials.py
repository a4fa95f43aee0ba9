"""Who may send OTLP: certificates, the bearer token, and what an open address needs.

Frames are what decisions follow from, so whoever can send frames can steer a run.
"""

from __future__ import annotations

import hmac
import ssl
import time
from pathlib import Path

import msgspec

from esper_tamiyo.receiving.addresses import Address

MIN_TOKEN = 16
"""Fewest characters of a token: less can be guessed."""

MAX_FILE = 1 << 20
LOOK_AGAIN_S = 1.0
"""How often a token file is looked at for a new token, at most."""

_BEARER = "bearer "


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

    def exposure(self, address: Address, insecure: bool) -> str:
        """What a person should be told about this address, "" for nothing.

        Raises :class:`CredentialsError` when it is open and nothing protects it.
        """
        if address.is_loopback:
            return ""
        if not (self.tls_cert or self.token_file or insecure):
            raise CredentialsError(
                f"{address.host} is reachable from other machines, and whoever can send "
                "frames can steer a run; expected a loopback address such as 127.0.0.1, or "
                "--tls-cert and --tls-key, --token-file, or --insecure"
            )
        if not (self.token_file or self.tls_client_ca):
            return "anybody who reaches it can send; --token-file or --tls-client-ca ends that"
        if not self.tls_cert:
            return "the token travels in the clear; --tls-cert and --tls-key end that"
        return ""


class BearerAuth:
    """Holds the ``Authorization`` of a request against the token file.

    The file is looked at again now and then, so a token can be replaced (a Kubernetes
    secret is) without a restart. When the file becomes unusable the last token holds.
    """

    def __init__(self, token_file: str) -> None:
        self._path = token_file
        self._token = read_token(token_file) if token_file else b""
        self._seen = _signature(token_file)
        self._look_at = time.monotonic() + LOOK_AGAIN_S

    def admits(self, authorization: str | bytes | None) -> bool:
        """Whether a request with that header may come in."""
        if not self._path:
            return True
        self._look()
        given = authorization or ""
        if isinstance(given, bytes):
            given = given.decode("latin-1")
        bearer, token = given[: len(_BEARER)], given[len(_BEARER) :]
        # Compared in constant time: how far a guess was right must not show.
        return hmac.compare_digest(token.strip().encode(), self._token) and (
            bearer.lower() == _BEARER
        )

    def _look(self) -> None:
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + LOOK_AGAIN_S
        seen = _signature(self._path)
        if seen == self._seen:
            return
        try:
            self._token = read_token(self._path)
        except CredentialsError:
            return  # half written, perhaps: it is looked at again
        self._seen = seen


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
