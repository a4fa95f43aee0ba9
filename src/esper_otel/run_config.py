"""The config of a run: its hyper-parameters, flat, bounded and without secrets.

They come from the arguments of the script and from :meth:`esper_otel.Run.config`, and go into
the stream as an event (``esper.run.config``) with an attribute for each.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from numbers import Real
from typing import Any

from esper_otel.leyline.decisions import Severity
from esper_otel.leyline.events import CONFIG_ATTRIBUTE, CONFIGURED, Attribute, Event

log = logging.getLogger("esper_otel")

MOST = 256
"""Hyper-parameters of a run."""
LONGEST_NAME = 128
LONGEST_VALUE = 256
"""Characters of each; a longer value is cut."""
DEEPEST = 6
"""How far mappings may be nested."""

WITHHELD = "(not recorded)"
"""Stands for a value that is, or may be, a secret."""

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_NEVER = re.compile(
    r"pass(word|wd|phrase|code)?s?|pwd|secrets?|credentials?|auth|authorization|bearer|cookies?"
)
_RARELY = re.compile(r"\w*(tokens?|keys?|passwords?|passwd|secrets?)")
_LARGEST_PLAIN = 1e6
"""A number below it, as `max_tokens=512`, is no key or token itself."""
_SECRET_FORMS = re.compile(
    r"(hf_|sk-|ghp_|gho_|ghs_|github_pat_|glpat-|xox[abpr]-|AKIA|ASIA|AIza|eyJ)[\w\-.]{8,}"
    r"|-----BEGIN "
)
_USER_INFO = re.compile(r"(?<=://)[^/\s@]+@")

_OPTION = re.compile(r"--?[A-Za-z_][\w.\-/]*")
_ASSIGNED = re.compile(r"[+~]*[A-Za-z_][\w.\-/@]*")


class RunConfig:
    """What is known of a run's hyper-parameters so far."""

    def __init__(self) -> None:
        self.values: dict[str, Attribute] = {}
        self.is_new = False
        """Whether nobody has been told of all of it."""
        self.is_explicit = False
        """Whether the script has told any of it: then it is sent, and not only recorded. A
        receiver that takes no logs would refuse it of every run otherwise."""
        self._told = False

    def add(self, values: Mapping[str, Attribute], *, explicit: bool = False) -> None:
        """Take in what :func:`flattened` or :func:`arguments_of` made; never raises."""
        self.is_explicit = self.is_explicit or explicit
        room = MOST - len(self.values)
        for name, value in values.items():
            if name not in self.values:
                if room <= 0:
                    self._tell_of_more()
                    continue
                room -= 1
            self.values[name] = value
            self.is_new = True

    def _tell_of_more(self) -> None:
        if not self._told:
            self._told = True
            log.warning("run.config: a run can have %d values; further ones are omitted", MOST)

    def take_event(self, time_unix_nano: int) -> Event:
        """The event that tells all of it."""
        self.is_new = False
        values = dict(self.values)
        attributes = {f"{CONFIG_ATTRIBUTE}{name}": value for name, value in values.items()}
        text = f"{len(values)} hyper-parameters"
        return Event(CONFIGURED, time_unix_nano, Severity.NORMAL, text, attributes)


def arguments_of(argv: Sequence[str]) -> dict[str, Attribute]:
    """The arguments of a script (``sys.argv``) by name.

    ``--lr 3e-4`` and ``--lr=3e-4`` are ``--lr``, a flag alone is true, ``optim.lr=3`` is
    ``optim.lr``, and what has no name is ``argument 1`` and so on.
    """
    found: dict[str, Attribute] = {}
    rest = list(argv[1:])
    others = 0
    while rest and len(found) < MOST:
        word = rest.pop(0)
        name, separator, value = word.partition("=")
        if _OPTION.fullmatch(name):
            if separator:
                found[name] = _plain(name, _number(value))
            elif rest and not _OPTION.match(rest[0]):
                found[name] = _plain(name, _number(rest.pop(0)))
            else:
                found[name] = True
        elif separator and _ASSIGNED.fullmatch(name):
            found[name] = _plain(name, _number(value))
        elif word != "--":
            others += 1
            found[f"argument {others}"] = _plain("", _number(word))
    return found


def flattened(values: Any) -> dict[str, Attribute]:
    """Names with dots and plain values of what a script calls its configuration.

    ``values`` is a mapping, a namespace, a dataclass or None. Raises ``TypeError`` for what has
    no names; whatever is within is taken as far as it goes.
    """
    fields = {} if values is None else _fields(values)
    if fields is None:
        raise TypeError(
            f"config({type(values).__name__}): expected a mapping, a namespace or a dataclass"
        )
    found: dict[str, Attribute] = {}
    for name, value in _leaves(fields, "", DEEPEST):
        if len(found) > MOST:
            break
        found[name[:LONGEST_NAME]] = value
    return found


def _leaves(
    fields: Mapping[Any, Any], above: str, left: int
) -> Iterator[tuple[str, Attribute]]:
    for key, value in fields.items():
        name = f"{above}{key}"
        name = "".join(sign if sign.isprintable() else "_" for sign in name)
        try:
            inner = None if isinstance(value, type) else _fields(value)
            if inner and left > 1 and not _is_never(name):
                yield from _leaves(inner, f"{name}.", left - 1)
            else:
                yield name, _plain(name, value)
        except Exception as error:  # of a property, or a str() of somebody else's
            log.warning("run.config: %s is omitted: %r", name, error)


def _fields(value: Any) -> Mapping[Any, Any] | None:
    """What ``value`` has by name; None for what has no names."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    if type(value).__name__ in ("Namespace", "SimpleNamespace"):
        found: Mapping[str, Any] = vars(value)
        return found
    return None


def _plain(name: str, value: Any) -> Attribute:
    """``value`` as it is recorded: what it is, as text where it is neither number nor truth."""
    if isinstance(value, bool):
        return WITHHELD if _is_never(name) else value
    if value is None:
        return "None"
    if isinstance(value, Real):
        if _is_secret_number(name, float(value)):
            return WITHHELD
        if isinstance(value, int) and abs(value) < 1 << 63:
            return int(value)
        return float(value) if isfinite(value) else str(float(value))
    text = _text(value)
    if _is_never(name) or _is_rarely(name) or _SECRET_FORMS.search(text):
        return WITHHELD
    text = _USER_INFO.sub("", text)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 1]}…"


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | set | frozenset):
        some = [_text(each) for each in list(value)[:LONGEST_VALUE]]
        return f"[{', '.join(some)}]"
    if isinstance(value, Mapping):
        return f"{{{len(value)} values}}"
    kind = type(value)
    if all(getattr(kind, name) is getattr(object, name) for name in ("__str__", "__repr__")):
        return kind.__name__  # its place in memory would tell every two runs apart
    return str(getattr(value, "__name__", value) if callable(value) else value)


def _number(text: str) -> Attribute:
    """What an argument says: a number where it is one, else its text."""
    for kind in (int, float):
        try:
            return kind(text) if text.isascii() and "_" not in text else text
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _is_secret_number(name: str, number: float) -> bool:
    return _is_never(name) or (_is_rarely(name) and abs(number) >= _LARGEST_PLAIN)


def _is_never(name: str) -> bool:
    """Whether something of this name is a secret whatever it is."""
    return any(_NEVER.fullmatch(word) for word in _words(name))


def _is_rarely(name: str) -> bool:
    """Whether a text of this name is most likely a secret."""
    return any(_RARELY.fullmatch(word) for word in _words(name))


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(name)]
