"""Providers: everything that needs the OpenTelemetry SDK.

The only module that imports ``opentelemetry.sdk``. It gives the resource of this trainer,
and tracers that never touch the process's random numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from opentelemetry import _logs, trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import (
    ReadableSpan,
    SpanLimits,
    SpanProcessor,
    TracerProvider,
)
from opentelemetry.sdk.trace import Tracer as SdkTracer
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import (
    Decision,
    ParentBased,
    StaticSampler,
    TraceIdRatioBased,
)
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext
from opentelemetry.util.types import AttributeValue

from esper_otel._version import __version__
from esper_otel.leyline.metrics import INSTANCE_ID, LOCAL_RANK, RANK, RUN_ID, WORLD_SIZE
from esper_otel.leyline.trace_ids import span_id, trace_id
from esper_otel.stream.encoding import SCOPE
from esper_otel.stream.environment import can_have_provider
from esper_otel.stream.span_encoding import SPANS_PER_REQUEST, SpanContent, SpanEncoder

log = logging.getLogger("esper_otel")

_SAMPLERS = (StaticSampler, TraceIdRatioBased, ParentBased)
"""Those that ``OTEL_TRACES_SAMPLER`` names: they decide alike of all spans of a step."""


def trainer_resource(
    run_id: str,
    instance_id: str,
    rank: int,
    world_size: int,
    local_rank: int = -1,
    labels: Mapping[str, str] = {},
) -> Resource:
    """Who produces this telemetry: what OTel detects, and which trainer of which run.

    A ``local_rank`` below 0 is not known, and left out. ``labels`` are more attributes.

    The SDK's detectors read ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` from
    the process's environment.
    """
    identity: dict[str, str | int] = {
        **labels,
        RUN_ID: run_id,
        RANK: rank,
        WORLD_SIZE: world_size,
        INSTANCE_ID: instance_id,
    }
    if local_rank >= 0:
        identity[LOCAL_RANK] = local_rank
    try:
        resource = Resource.create(identity)
    except Exception as error:
        # Detectors are plugins, and at the interpreter's end they get no threads.
        log.debug("resource detection failed: %s", error)
        resource = Resource(identity)
    resource = Resource(
        {name: _text(value) for name, value in resource.attributes.items()}, resource.schema_url
    )
    name = str(resource.attributes.get(SERVICE_NAME, ""))
    if not name or name.startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "esper-trainer"}))
    return resource


def _text(value: AttributeValue) -> AttributeValue:
    """``value`` as UTF-8 can have it: the environment may hold any bytes."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def resource_of_another(resource: Resource, run_id: str, instance_id: str) -> Resource:
    """``resource`` of one run of this process, for another one."""
    return resource.merge(Resource({RUN_ID: run_id, INSTANCE_ID: instance_id}))


def serialised_resource(resource: Resource) -> bytes:
    """``resource`` as the SDK's own encoder writes it, taken from around a span."""
    span = ReadableSpan("resource", context=SpanContext(1, 1, False), resource=resource)
    return encode_spans([span]).resource_spans[0].resource.SerializeToString()


class StepIds(IdGenerator):
    """The ids of one trainer's spans, which the sidecar and other ranks work out as well.

    The SDK's generator draws from the global ``random``: one span would change the
    numbers that the training run sees next. These follow from the run, the step and the
    span's name (:mod:`~esper_otel.leyline.trace_ids`), so that all ranks of a step share
    a trace and the sidecar continues it. A span must be announced by :meth:`next` before
    it is started; all of them are, on the stream's one thread.
    """

    def __init__(self, run: str, rank: int, instance: str) -> None:
        self._run = run
        self._rank = rank
        self._instance = instance
        self._step = 0
        self._name = ""

    def next(self, step: int, name: str) -> None:
        """The next span to be started is that of ``step`` called ``name``."""
        self._step = step
        self._name = name

    def generate_trace_id(self) -> int:
        """The trace of the step."""
        return self.trace_of(self._step)

    def generate_span_id(self) -> int:
        """The announced span of the step."""
        return self.span_of(self._step, self._name)

    def trace_of(self, step: int) -> int:
        """The trace of ``step``."""
        return trace_id(self._run, step)

    def span_of(self, step: int, name: str) -> int:
        """The span of ``step`` called ``name``."""
        return span_id(self._run, self._rank, self._instance, step, name)

    def is_trace_id_random(self) -> bool:
        """A hash is spread as evenly as random bits, which is what samplers ask for."""
        return True


class Tracers:
    """The tracer that spans go through: the user's provider, or one of our own.

    A global SDK ``TracerProvider`` is looked for every time, since a script may set one
    after the stream began. Where there is none, spans are encoded at once and kept for
    :meth:`encode_finished`. Our own provider is for what an encoder cannot do: limits that a
    span exceeds, and samplers that we do not know. Its spans are collected here as well.
    """

    is_on = True

    def __init__(self, resource: Resource) -> None:
        who = resource.attributes
        self.ids = StepIds(
            str(who.get(RUN_ID, "")), int(str(who.get(RANK, 0))), str(who.get(INSTANCE_ID, ""))
        )
        self._finished = _Collector()
        self._limits = SpanLimits()
        # shutdown_on_exit=False: the stream is closed by its owner, within its time.
        self._own = TracerProvider(
            resource=resource,
            shutdown_on_exit=False,
            id_generator=self.ids,
            span_limits=self._limits,
        )
        self._own.add_span_processor(self._finished)
        is_on = isinstance(self._own.get_tracer(SCOPE, __version__), SdkTracer)
        self._encoder = SpanEncoder(
            serialised_resource(resource), _serialised_scope(), resource.schema_url
        )
        self._encodes = is_on and isinstance(self._own.sampler, _SAMPLERS)

    @property
    def are_users(self) -> bool:
        """Whether the user has set a provider, which then delivers the spans itself."""
        return isinstance(_current_provider(), TracerProvider)

    def tracer(self) -> trace.Tracer:
        """A tracer whose ids are ours; a tracer is one scope's, so only our spans are."""
        current = _current_provider()
        provider = current if isinstance(current, TracerProvider) else self._own
        tracer = provider.get_tracer(SCOPE, __version__)
        if isinstance(tracer, SdkTracer):
            tracer.id_generator = self.ids
        return tracer

    @property
    def waiting(self) -> int:
        """Spans that are made, and not handed on yet."""
        return self._encoder.waiting + len(self._finished.spans)

    def encoder_for(self, spans: Sequence[SpanContent], step: int) -> SpanAdder | None:
        """What takes the spans of ``step`` as they are; None where a tracer has to.

        The first of ``spans`` is the one above the others. Spans that are not sampled are
        taken and forgotten.
        """
        if not self._encodes or self.are_users or not all(map(self._fits, spans)):
            return None
        root = spans[0]
        sampled = self._own.sampler.should_sample(
            Context(),
            self.ids.trace_of(step),
            root.name,
            trace.SpanKind.INTERNAL,
            root.attributes,
            (),
        )
        is_sampled = sampled.decision is Decision.RECORD_AND_SAMPLE
        return self._encoder if is_sampled else _Forgetting()

    def _fits(self, span: SpanContent) -> bool:
        """Whether the limits of ``OTEL_*`` leave it as it is."""
        limits = self._limits
        return (
            limits.max_attribute_length is None
            and limits.max_span_attribute_length is None
            and _within(len(span.attributes), limits.max_span_attributes)
            and _within(len(span.events), limits.max_events)
            and all(
                _within(len(event.attributes), limits.max_event_attributes)
                for event in span.events
            )
        )

    def encode_finished(self, put: Callable[[bytes, int], None]) -> None:
        """Hand the finished spans, but those of the user's provider, to ``put`` as
        (request, spans)."""
        for body, count in self._encoder.take():
            put(body, count)
        spans, self._finished.spans = self._finished.spans, []
        for start in range(0, len(spans), SPANS_PER_REQUEST):
            some = spans[start : start + SPANS_PER_REQUEST]
            put(encode_spans(some).SerializeToString(), len(some))


class NoSpans(Tracers):
    """In place of tracers that cannot be made: the run has no spans."""

    is_on = False

    def __init__(self) -> None:
        pass

    @property
    def are_users(self) -> bool:
        """Nobody's."""
        return False

    @property
    def waiting(self) -> int:
        """None."""
        return 0

    def encode_finished(self, put: Callable[[bytes, int], None]) -> None:
        """There is none."""


def _current_provider() -> trace.TracerProvider | None:
    """The global one; None where asking for it raises, as its variable names none."""
    if can_have_provider("OTEL_PYTHON_TRACER_PROVIDER"):
        return trace.get_tracer_provider()
    return trace._TRACER_PROVIDER


def users_logger() -> _logs.Logger | None:
    """A logger of the provider that the user has set, None when there is none.

    Looked for every time, since a script may set one after the stream began.
    """
    if not can_have_provider("OTEL_PYTHON_LOGGER_PROVIDER"):
        return None
    provider = _logs.get_logger_provider()
    if not isinstance(provider, LoggerProvider):
        return None
    return provider.get_logger(SCOPE, __version__)


class SpanAdder(Protocol):
    """Takes spans with their ids."""

    def add(self, span: SpanContent, trace: int, span_id: int, parent: int) -> None:
        """Take one span; ``parent`` is 0 where it has none."""


class _Forgetting:
    """Takes spans that are not sampled."""

    def add(self, span: SpanContent, trace: int, span_id: int, parent: int) -> None:
        """Nothing comes of it."""


def _within(count: int, most: int | None) -> bool:
    return most is None or count <= most


def _serialised_scope() -> bytes:
    """Our scope as the SDK's own encoder writes it, taken from around a span."""
    scope = InstrumentationScope(SCOPE, __version__)
    span = ReadableSpan(
        "scope",
        context=SpanContext(1, 1, False),
        resource=Resource.get_empty(),  # else it is detected once more
        instrumentation_scope=scope,
    )
    return encode_spans([span]).resource_spans[0].scope_spans[0].scope.SerializeToString()


class _Collector(SpanProcessor):
    """Keeps finished spans; they are made and taken on the stream's one thread."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        if span.context.trace_flags.sampled:
            self.spans.append(span)
