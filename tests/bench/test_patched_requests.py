"""Requests of the benches that are patched: what a receiver reads in them."""

import time

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from bench.roundtrip_peers import FRAME, Trainer
from esper_tamiyo.receiving.otlp_frames import frames_of
from testkit.patched_requests import PatchedRank


def read(body):
    harvest = frames_of(ExportMetricsServiceRequest.FromString(body))
    assert harvest.foreign == harvest.unusable == 0
    return harvest.frames


def test_a_patched_rank_sends_each_step_with_its_values_and_seeds():
    rank = PatchedRank("load", 3, 64, metrics=24, seeds=4)
    before = time.time_ns()
    frames = [read(rank.request(step))[0] for step in (0, 7)]
    assert [frame.step for frame in frames] == [0, 7]
    assert {
        (frame.run, frame.rank, len(frame.values), len(frame.seeds)) for frame in frames
    } == {("load", 3, 24, 4)}
    assert before <= frames[0].time_unix_nano <= frames[1].time_unix_nano
    assert frames[1].values["loss"] - frames[0].values["loss"] == 7.0


def test_a_trainer_sends_the_next_steps_with_every_request():
    trainer = Trainer("fleet", 1, 3)
    frames = read(trainer.request()) + read(trainer.request())
    assert [frame.step for frame in frames] == list(range(6))
    assert {tuple(frame.values) for frame in frames} == {tuple(FRAME)}
    assert len({frame.values["loss"] for frame in frames}) == 6
