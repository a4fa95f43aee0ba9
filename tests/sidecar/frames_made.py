"""Frames for tests, and the two ways they reach the sidecar."""

from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from esper_otel.leyline.custom import EVALUATION, NAME, PREFIX, is_custom, is_evaluation
from esper_otel.leyline.frames import ABSENT, StepFrame
from esper_otel.leyline.metrics import (
    BY_KEY,
    CUSTOM,
    INSTANCE_ID,
    RANK,
    RUN_ID,
    SEED_ID,
    SEED_KEYS,
    STEP_KEYS,
)
from esper_otel.leyline.protobuf import as_varint
from esper_otel.leyline.wire import (
    PROTOCOL,
    Ask,
    Hello,
    SeedRow,
    decode_to_server,
    encode,
)
from esper_tamiyo.receiving.pipe import PackedStep


def field(number, body):
    """A field of a protobuf message that has bytes."""
    return as_varint(number << 3 | 2) + as_varint(len(body)) + body


def frame(step, seeds=None, run="run", instance="one", rank=0, **values):
    """A frame with these values."""
    return StepFrame(
        run, instance, rank, step, 1 + step, {"step": float(step), **values}, seeds or {}
    )


def hello_of(frame, columns=STEP_KEYS):
    """The Hello of the trainer that ``frame`` came from."""
    return Hello(
        PROTOCOL, frame.run, frame.instance, frame.rank, 1, list(columns), list(SEED_KEYS)
    )


def set_client(frame, proposal=None):
    """``frame`` as an ask, after a trip over the wire."""
    row = [frame.values.get(key, ABSENT) for key in STEP_KEYS]
    seeds = [
        SeedRow(seed_id, [values.get(key, ABSENT) for key in SEED_KEYS])
        for seed_id, values in frame.seeds.items()
    ]
    custom = {k.removeprefix(PREFIX): v for k, v in frame.values.items() if is_custom(k)}
    ask = Ask(frame.step, frame.step, frame.time_unix_nano, row, seeds, proposal, custom)
    return decode_to_server(encode(ask)[4:])


def otlp_of(*frames):
    """``frames`` of one trainer as an OTLP request, one ScopeMetrics for each step."""
    request = ExportMetricsServiceRequest()
    resource = request.resource_metrics.add()
    put(resource.resource.attributes, RUN_ID, frames[0].run)
    put(resource.resource.attributes, INSTANCE_ID, frames[0].instance)
    resource.resource.attributes.add(key=RANK).value.int_value = frames[0].rank
    for one in frames:
        scope = resource.scope_metrics.add()
        for key, value in one.values.items():
            add_point(scope, key, one.time_unix_nano, value)
        for seed_id, values in one.seeds.items():
            for key, value in values.items():
                put(
                    add_point(scope, key, one.time_unix_nano, value).attributes,
                    SEED_ID,
                    seed_id,
                )
    return request


def records(harvest):
    """The step records of a harvest, as the decide process has them."""
    return [one.unpacked() if type(one) is PackedStep else one for one in harvest.frames]


def add_point(scope, key, time_unix_nano, value):
    """One gauge with one point."""
    name = CUSTOM.instrument if is_custom(key) else key
    metric = scope.metrics.add(name=BY_KEY[key].instrument if key in BY_KEY else name)
    point = metric.gauge.data_points.add(time_unix_nano=time_unix_nano, as_double=value)
    if is_custom(key):
        put(point.attributes, NAME, key.removeprefix(PREFIX))
        if is_evaluation(key):
            point.attributes.add(key=EVALUATION).value.bool_value = True
    return point


def put(attributes, key, text):
    """One attribute."""
    attributes.add(key=key).value.string_value = text


NUMBERS = st.sampled_from([-1.0, 0.0, 0.01, 0.1, 0.2, 1.0, 40.0, 60.0, 96.0, 130.0])
STEP_VALUES = st.dictionaries(
    st.sampled_from([*(key for key in STEP_KEYS if key != "step"), "custom.a", "custom.b"]),
    NUMBERS,
    max_size=12,
)
SEED_VALUES = st.dictionaries(
    st.sampled_from(["s1", "s2", "s3"]),
    st.dictionaries(st.sampled_from(SEED_KEYS), NUMBERS, min_size=1, max_size=4),
    max_size=2,
)


@st.composite
def runs(draw, max_size=30):
    """Frames of one run in the order of their steps, some steps missing."""
    gaps = draw(st.lists(st.integers(1, 3), min_size=1, max_size=max_size))
    step = -1
    frames = []
    for gap in gaps:
        step += gap
        frames.append(frame(step, draw(SEED_VALUES), **draw(STEP_VALUES)))
    return frames
