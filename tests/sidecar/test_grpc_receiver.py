"""The gRPC receiver by itself: what a call is answered when nobody is there to take it."""

import asyncio
from types import SimpleNamespace

import grpc
import pytest

from esper_tamiyo.receiving.addresses import Address
from esper_tamiyo.receiving.credentials import BearerAuth
from esper_tamiyo.receiving.grpc_receiver import GrpcReceiver
from esper_tamiyo.receiving.intake import Intake
from sidecar.frames_made import frame, otlp_of
from testkit.half_calls import EXPORT
from testkit.patience import PATIENCE_S


class EndedPipe:
    """A pipe whose other end has gone."""

    transport = SimpleNamespace(
        set_write_buffer_limits=lambda high: None, get_write_buffer_size=lambda: 0
    )

    def writelines(self, data):
        raise ConnectionResetError

    async def drain(self):
        raise ConnectionResetError


async def code_of(intake):
    receiver = GrpcReceiver(intake, 8)
    address = await receiver.start(Address("127.0.0.1", 0))
    try:
        async with grpc.aio.insecure_channel(str(address)) as channel:
            call = channel.unary_unary(EXPORT.decode())
            with pytest.raises(grpc.RpcError) as caught:
                await call(otlp_of(frame(1)).SerializeToString(), timeout=PATIENCE_S)
            return caught.value.code()
    finally:
        await receiver.stop(0)


def test_a_producer_is_told_to_come_again_when_the_sidecar_has_gone():
    async def test():
        return await code_of(Intake(EndedPipe(), BearerAuth("")))

    assert asyncio.run(test()) is grpc.StatusCode.UNAVAILABLE
