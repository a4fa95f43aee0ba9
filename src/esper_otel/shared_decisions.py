"""Shared decisions: the source of a rank's decisions, and their application on all ranks.

Either each calls :meth:`esper_otel.Run.agree`, or they meet by themselves at the end of the
first step (:class:`~esper_otel.ranks.rendezvous.Rendezvous`). torch is imported only where it
is there already, and has several ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

from esper_otel.leyline.faults import alone
from esper_otel.leyline.folders import usual_socket_path
from esper_otel.loop import tell_once
from esper_otel.ranks.world import is_shared
from esper_otel.settings import EsperSettings, Mode
from esper_otel.tamiyo.client import TamiyoClient
from esper_otel.tolaria.ports import DecisionAgreement
from esper_otel.tolaria.recorder import Recorder
from esper_otel.tolaria.responses import RateFactor, Responses
from esper_otel.tolaria.restoring import Restoring

if TYPE_CHECKING:
    from esper_otel.ranks.agreement import Agreement
    from esper_otel.ranks.rendezvous import Rendezvous


def client_of(settings: EsperSettings, run_id: str, instance_id: str) -> TamiyoClient | None:
    """Who asks the sidecar for a run; None where nobody is to be asked, or can be."""
    if settings.mode is Mode.OFF:
        return None
    return alone(
        "asking Tamiyo",
        lambda: TamiyoClient(
            Path(settings.tamiyo_socket) if settings.tamiyo_socket else usual_socket_path(),
            run=run_id,
            instance=instance_id,
            rank=settings.rank,
            world_size=settings.world_size,
            deadline_ms=settings.tamiyo_deadline_ms,
            mode=settings.mode.value,
        ),
    )


def responses_of(settings: EsperSettings) -> Responses:
    """What decisions do to a run, within the bounds of its settings."""
    enforce = settings.mode is Mode.ENFORCE
    rate = RateFactor(
        minimum=settings.lr_scale_min,
        maximum=settings.lr_scale_max,
        release_steps=settings.release_steps,
    )
    restoring = Restoring(
        every=settings.snapshot_every if enforce else 0,
        most=settings.snapshot_restores_max,
        several_ranks=is_shared,
    )
    return Responses(rate, enforce=enforce, restoring=restoring)


class SharedDecisions:
    """What the decisions of one rank have to do with those of the others."""

    def __init__(
        self,
        recorder: Recorder,
        client: TamiyoClient | None,
        settings: EsperSettings,
        run_id: str,
    ) -> None:
        self.agreement: Agreement | None = None
        """That of all ranks, once there is one."""
        self.rendezvous: Rendezvous | None = None
        self.may_meet = settings.ranks_agree and client is not None
        """Whether :meth:`meet` is to be called at the end of a step."""
        self._recorder = recorder
        self._client = client
        self._settings = settings
        self._run_id = run_id

    def set_client(self, client: TamiyoClient | None) -> None:
        """The run, which nobody was asked for before, asks by ``client``."""
        self._client = client
        self.may_meet = self._settings.ranks_agree and client is not None

    def agree(self) -> bool:
        """Meet the other ranks now; see :meth:`esper_otel.Run.agree`."""
        if not is_shared():
            return False
        from esper_otel.ranks.agreement import Agreement
        from esper_otel.ranks.process_group import join

        self.may_meet = False
        if self.agreement is None and self.rendezvous is not None:
            # All ranks are at the same step, so either all have come to one or none has.
            self.agreement = self.rendezvous.end()
        if self.agreement is None:
            group = join(self._settings.ranks_timeout_s)
            self.agreement = Agreement(group, self._run_id)
            self._decide_by(self.agreement, leads=group.leads)
        return True

    def meet(self) -> None:
        """At the end of the first step: come to agree with the other ranks, if there are."""
        if not is_shared():
            # Ranks that are told of in the environment may yet form a group.
            self.may_meet = self._settings.world_size > 1
            return
        self.may_meet = False
        try:
            from esper_otel.ranks.rendezvous import Rendezvous

            settings = self._settings
            alike = (
                settings.mode,
                settings.lr_scale_min,
                settings.lr_scale_max,
                settings.release_steps,
                settings.snapshot_every,
                settings.snapshot_restores_max,
            )
            self.rendezvous = Rendezvous(
                self._run_id,
                alike=crc32(repr(alike).encode()),
                timeout_s=settings.ranks_timeout_s,
            )
            self._decide_by(self.rendezvous, leads=self.rendezvous.leads)
        except Exception:
            tell_once("the ranks of this run cannot synchronise decisions")

    def close(self) -> None:
        """The run is over on this rank."""
        agreement = self.agreement
        if agreement is None and self.rendezvous is not None:
            agreement = self.rendezvous.end()
        if agreement is not None:
            agreement.close()

    def forget_garden(self) -> None:
        """The garden that took part in the agreement is closed."""
        if self.agreement is not None:
            self.agreement.shared = None

    def _decide_by(self, agreement: DecisionAgreement, *, leads: bool) -> None:
        self._recorder.share_decisions(agreement, asks=leads)
        if not leads and self._client is not None:
            self._client.close()
