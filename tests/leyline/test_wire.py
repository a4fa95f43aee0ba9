"""Messages of the decision socket: round trips, chunks, limits, and bytes from anybody."""

from __future__ import annotations

import struct
from math import isnan
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper_otel.leyline import wire
from esper_otel.leyline.decisions import (
    Action,
    Decision,
    Finding,
    Proposal,
    SeedOperation,
    Severity,
    unanswered,
)

text = st.text(max_size=20)
integers = st.integers(-(2**63), 2**63 - 1)
finite = st.floats(allow_nan=False)
rows = st.lists(st.floats(), max_size=40)  # NaN is absent, so NaN must come through

proposals = st.builds(Proposal, seed_id=text, operation=st.sampled_from(SeedOperation))
seed_rows = st.builds(wire.SeedRow, seed_id=text, values=rows)
findings = st.builds(
    Finding,
    rule=text,
    action=st.sampled_from(Action),
    severity=st.sampled_from(Severity),
    text=text,
    values=st.dictionaries(text, finite, max_size=4),
    seed_id=st.none() | text,
)
decisions = st.builds(
    Decision,
    id=text,
    run=text,
    step=integers,
    observed_step=integers,
    action=st.sampled_from(Action),
    severity=st.sampled_from(Severity),
    reason=text,
    findings=st.lists(findings, max_size=3),
    target_seed=st.none() | text,
    seed_operation=st.none() | st.sampled_from(SeedOperation),
    parameters=st.dictionaries(text, finite, max_size=3),
    conservative=st.booleans(),
    table_version=text,
)
reports = st.dictionaries(
    text,
    st.none() | st.booleans() | integers | text | st.lists(integers, max_size=3),
    max_size=4,
)

to_server = st.one_of(
    st.builds(
        wire.Hello,
        protocol=integers,
        run=text,
        instance=text,
        rank=integers,
        world_size=integers,
        step_columns=st.lists(text, max_size=5),
        seed_columns=st.lists(text, max_size=5),
        mode=st.sampled_from(["", "advise", "enforce"]),
    ),
    st.builds(
        wire.Ask,
        request_id=integers,
        step=integers,
        time_unix_nano=integers,
        values=rows,
        seeds=st.lists(seed_rows, max_size=3),
        proposal=st.none() | proposals,
    ),
    st.builds(wire.Goodbye, step=integers, time_unix_nano=integers, how=text, exception=text),
    st.builds(wire.StatusRequest),
    st.builds(wire.LatestRequest, run=text, rank=integers),
)
to_client = st.one_of(
    st.builds(
        wire.Welcome, protocol=integers, table_version=text, takes_goodbyes=st.booleans()
    ),
    st.builds(wire.Refusal, message=text),
    st.builds(wire.Answer, request_id=integers, decision=decisions),
    st.builds(wire.Status, report=reports),
    st.builds(wire.Latest, decision=st.none() | decisions),
)


def same(left: Any, right: Any) -> bool:
    """Equal, where NaN equals NaN."""
    if isinstance(left, float) and isinstance(right, float):
        return left == right or (isnan(left) and isnan(right))
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, msgspec.Struct):
        return type(left) is type(right) and all(
            same(getattr(left, field), getattr(right, field))
            for field in left.__struct_fields__
        )
    return bool(left == right)


def only(data: bytes) -> bytes:
    (body,) = wire.MessageBuffer().feed(data)
    return body


@settings(deadline=None)
@given(to_server)
def test_the_server_reads_what_a_client_wrote(message: Any) -> None:
    assert same(wire.decode_to_server(only(wire.encode(message))), message)


@settings(deadline=None)
@given(to_client)
def test_the_client_reads_what_the_server_wrote(message: Any) -> None:
    assert same(wire.decode_to_client(only(wire.encode(message))), message)


def test_a_message_is_a_length_and_an_array_that_begins_with_its_tag() -> None:
    data = wire.encode(wire.Ask(7, 3, 1, [0.5]))
    assert struct.unpack("<I", data[:4]) == (len(data) - 4,)
    assert msgspec.msgpack.decode(data[4:]) == ["ask", 7, 3, 1, [0.5], [], None, {}]


def test_an_older_peer_may_leave_out_the_fields_that_have_defaults() -> None:
    body = msgspec.msgpack.encode(["ask", 1, 2, 3, [0.5]])
    assert wire.decode_to_server(body) == wire.Ask(1, 2, 3, [0.5], [], None)
    welcome = msgspec.msgpack.encode(["welcome", 1, "t"])
    assert wire.decode_to_client(welcome) == wire.Welcome(1, "t", takes_goodbyes=False)


def test_an_older_client_passes_over_what_a_welcome_says_beyond_what_it_knows() -> None:
    body = msgspec.msgpack.encode(["welcome", 1, "t", True, "what later versions add"])
    assert wire.decode_to_client(body) == wire.Welcome(1, "t", takes_goodbyes=True)


@settings(deadline=None)
@given(st.lists(to_server, max_size=6), st.data())
def test_however_a_stream_is_cut_the_same_bodies_come_out(
    messages: list[Any], data: st.DataObject
) -> None:
    stream = b"".join(map(wire.encode, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    chunks = [
        stream[start:end] for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)
    ]
    buffer = wire.MessageBuffer()
    bodies = [body for chunk in chunks for body in buffer.feed(chunk)]
    assert [struct.pack("<I", len(body)) + body for body in bodies] == list(
        map(wire.encode, messages)
    )
    assert len(buffer) == 0


def test_a_message_in_pieces_waits_for_its_rest() -> None:
    data = wire.encode(wire.Refusal("no"))
    buffer = wire.MessageBuffer()
    for byte in data[:-1]:
        assert list(buffer.feed(bytes([byte]))) == []
    assert len(buffer) == len(data) - 1
    assert list(buffer.feed(data[-1:])) == [data[4:]]


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_bytes_from_anybody_are_a_message_or_a_wire_error(body: bytes) -> None:
    for decode in (wire.decode_to_server, wire.decode_to_client):
        try:
            message = decode(body)
        except wire.WireError:
            continue
        assert isinstance(message, msgspec.Struct)


@pytest.mark.parametrize("nest", [b"\x91", b"\x81\xa1a"])
@pytest.mark.parametrize("begin", [b"\x92\xa7status?", b"\x93\xa6status\x80"])
def test_what_is_nested_deeply_is_a_message_or_a_wire_error(begin: bytes, nest: bytes) -> None:
    # Where a later version would have a field that this one passes over. Python 3.14 looks at
    # the stack that is left, and so passes over all that a message has room for.
    body = begin + nest * ((wire.MAX_BODY - len(begin) - 1) // len(nest)) + b"\xc0"
    for decode in (wire.decode_to_server, wire.decode_to_client):
        try:
            message = decode(body)
        except wire.WireError:
            continue
        assert isinstance(message, msgspec.Struct)


@settings(deadline=None)
@given(to_server, st.data())
def test_a_damaged_message_is_a_message_or_a_wire_error(
    message: Any, data: st.DataObject
) -> None:
    body = bytearray(only(wire.encode(message)))
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = wire.decode_to_server(bytes(body[: data.draw(st.integers(0, len(body)))]))
    except wire.WireError:
        return
    assert isinstance(read, wire.ToServer)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=64), max_size=8))
def test_a_stream_from_anybody_gives_bodies_or_a_wire_error(chunks: list[bytes]) -> None:
    buffer = wire.MessageBuffer()
    taken = 0
    try:
        for chunk in chunks:
            taken += sum(4 + len(body) for body in buffer.feed(chunk))
    except wire.WireError:
        return
    assert taken + len(buffer) == sum(map(len, chunks))


def test_messages_for_the_other_side_are_refused() -> None:
    answer = only(wire.encode(wire.Answer(1, unanswered("run", 1, "nominal"))))
    with pytest.raises(wire.WireError, match="protocol 1"):
        wire.decode_to_server(answer)
    with pytest.raises(wire.WireError, match="protocol 1"):
        wire.decode_to_client(only(wire.encode(wire.StatusRequest())))


@pytest.mark.parametrize("excess", [0, 1])
def test_the_limit_is_64_kib_for_who_writes(excess: int) -> None:
    overhead = len(wire.encode(wire.Refusal("x" * 60_000))) - 4 - 60_000
    message = wire.Refusal("x" * (wire.MAX_BODY - overhead + excess))
    if excess:
        with pytest.raises(wire.WireError, match="may have 65536 bytes, this one has 65537"):
            wire.encode(message)
    else:
        assert wire.decode_to_client(only(wire.encode(message))) == message


@pytest.mark.parametrize("length", [wire.MAX_BODY + 1, 2**32 - 1])
def test_the_limit_is_64_kib_for_who_reads_before_the_body_has_come(length: int) -> None:
    with pytest.raises(wire.WireError, match=f"one of {length} came"):
        list(wire.MessageBuffer().feed(struct.pack("<I", length)))


def test_messages_before_an_oversized_one_still_come() -> None:
    good = wire.encode(wire.StatusRequest())
    bodies = wire.MessageBuffer().feed(good + struct.pack("<I", wire.MAX_BODY + 1))
    assert next(bodies) == good[4:]
    with pytest.raises(wire.WireError):
        next(bodies)


class OldHello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """A Hello as it was before trainers said what they do with decisions."""

    protocol: int
    run: str
    instance: str
    rank: int
    world_size: int
    step_columns: list[str]
    seed_columns: list[str]


def test_a_hello_without_a_mode_and_one_with_it_are_understood_by_old_and_new() -> None:
    old = OldHello(1, "run", "i", 0, 1, ["step"], [])
    new = wire.decode_to_server(msgspec.msgpack.encode(old))
    assert isinstance(new, wire.Hello)
    assert new.mode == ""
    told = wire.Hello(1, "run", "i", 0, 1, ["step"], [], mode="enforce")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(told), type=OldHello) == old
