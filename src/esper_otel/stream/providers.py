"""Providers: everything that needs the OpenTelemetry SDK.

The only module that imports ``opentelemetry.sdk``. It gives the resource of this trainer,
and tracers that never touch the process's random numbers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from opentelemetry import _logs, trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace import Tracer as SdkTracer
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace import SpanContext

from esper_otel._version import __version__
from esper_otel.leyline.metrics import INSTANCE_ID, LOCAL_RANK, RANK, RUN_ID, WORLD_SIZE
from esper_otel.leyline.trace_ids import span_id, trace_id
from esper_otel.stream.encoding import SCOPE

log = logging.getLogger("esper_otel")

SPANS_PER_REQUEST = 512


def trainer_resource(
    run_id: str, instance_id: str, rank: int, world_size: int, local_rank: int = -1
) -> Resource:
    """Who produces this telemetry: what OTel detects, and which trainer of which run.

    A ``local_rank`` below 0 is not known, and left out.

    The SDK's detectors read ``OTEL_SERVICE_NAME`` and ``OTEL_RESOURCE_ATTRIBUTES`` from
    the process's environment.
    """
    identity: dict[str, str | int] = {
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
    name = str(resource.attributes.get(SERVICE_NAME, ""))
    if not name or name.startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "esper-trainer"}))
    return resource


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
        return trace_id(self._run, self._step)

    def generate_span_id(self) -> int:
        """The announced span of the step."""
        return span_id(self._run, self._rank, self._instance, self._step, self._name)

    def is_trace_id_random(self) -> bool:
        """A hash is spread as evenly as random bits, which is what samplers ask for."""
        return True


class Tracers:
    """The tracer that spans go through: the user's provider, or one of our own.

    A global SDK ``TracerProvider`` is looked for every time, since a script may set one
    after the stream began. Spans of our own provider are collected here, for
    :meth:`encode_finished` to encode.
    """

    def __init__(self, resource: Resource) -> None:
        who = resource.attributes
        self.ids = StepIds(
            str(who.get(RUN_ID, "")), int(str(who.get(RANK, 0))), str(who.get(INSTANCE_ID, ""))
        )
        self._finished = _Collector()
        # shutdown_on_exit=False: the stream is closed by its owner, within its time.
        self._own = TracerProvider(
            resource=resource, shutdown_on_exit=False, id_generator=self.ids
        )
        self._own.add_span_processor(self._finished)

    @property
    def are_users(self) -> bool:
        """Whether the user has set a provider, which then delivers the spans itself."""
        return isinstance(trace.get_tracer_provider(), TracerProvider)

    def tracer(self) -> trace.Tracer:
        """A tracer whose ids are ours; a tracer is one scope's, so only our spans are."""
        current = trace.get_tracer_provider()
        provider = current if isinstance(current, TracerProvider) else self._own
        tracer = provider.get_tracer(SCOPE, __version__)
        if isinstance(tracer, SdkTracer):
            tracer.id_generator = self.ids
        return tracer

    def encode_finished(self, put: Callable[[bytes, int], None]) -> None:
        """Hand the finished spans of our own provider to ``put`` as (request, spans)."""
        spans, self._finished.spans = self._finished.spans, []
        for start in range(0, len(spans), SPANS_PER_REQUEST):
            some = spans[start : start + SPANS_PER_REQUEST]
            put(encode_spans(some).SerializeToString(), len(some))


def users_logger() -> _logs.Logger | None:
    """A logger of the provider that the user has set, None when there is none.

    Looked for every time, since a script may set one after the stream began.
    """
    provider = _logs.get_logger_provider()
    if not isinstance(provider, LoggerProvider):
        return None
    return provider.get_logger(SCOPE, __version__)


class _Collector(SpanProcessor):
    """Keeps finished spans; they are made and taken on the stream's one thread."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        if span.context.trace_flags.sampled:
            self.spans.append(span)
