"""The stream: step records to OTLP, off the training thread.

Importing this package is cheap; what sending needs is loaded by :meth:`Stream.start`.
"""

from esper_otel.leyline.otlp_file import RecordingError
from esper_otel.stream.destination import is_disabled
from esper_otel.stream.recording import read_frames, read_recording
from esper_otel.stream.redelivery import FileReport, ResendReport, resend
from esper_otel.stream.spool import Account
from esper_otel.stream.stream import Stream, StreamReport

__all__ = [
    "Account",
    "FileReport",
    "RecordingError",
    "ResendReport",
    "Stream",
    "StreamReport",
    "is_disabled",
    "read_frames",
    "read_recording",
    "resend",
]
