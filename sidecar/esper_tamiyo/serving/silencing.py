"""Silencing: requests of tools to suppress a rule, done and recorded."""

from __future__ import annotations

import logging

from esper_otel.leyline.wire import SilenceReply, SilenceRequest
from esper_tamiyo.journaling.decision_log import DecisionLog
from esper_tamiyo.judging.engine import Engine
from esper_tamiyo.judging.silences import SilenceError

log = logging.getLogger("tamiyo")


def silence(
    engine: Engine, decision_log: DecisionLog, request: SilenceRequest, uid: int
) -> SilenceReply:
    """Do what the user ``uid`` asks for, or say why not."""
    try:
        order = engine.silence(request)
    except SilenceError as error:
        return SilenceReply("", str(error))
    decision_log.on_silence(order, uid)
    log.info("run %s: %s %s, by user %d", order.run, order.rule, order.told, uid)
    return SilenceReply(order.told)
