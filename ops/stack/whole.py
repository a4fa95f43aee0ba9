"""The whole stack as one thing: its parts by name, begun and ended together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ops.stack import services, traces_page
from ops.stack.ports import free
from ops.stack.processes import Process
from ops.stack.programs import COLLECTOR, JAEGER, PROMETHEUS, find
from ops.stack.queries import Jaeger, Prometheus, is_page
from ops.stack.services import CONFIG, Ports


class Stack:
    """Processes of one stack; raises ``MissingError`` when a binary is not here."""

    def __init__(self, ports: Ports, state: Path, socket: Path, config: Path = CONFIG) -> None:
        self.ports = ports
        self.state = state
        self.socket = socket
        made = [
            services.prometheus(find(PROMETHEUS), ports, state),
            services.jaeger(find(JAEGER), ports),
            services.tamiyo(ports, socket),
            services.collector(find(COLLECTOR), ports, state, (config,)),
        ]
        if not traces_page.missing():
            made.append(services.traces_page(ports))
        self.parts = {one.name: Process(one, state / "logs") for one in made}

    @property
    def url(self) -> str:
        """For ``OTEL_EXPORTER_OTLP_ENDPOINT``."""
        return f"http://127.0.0.1:{self.ports.otlp_http}"

    @property
    def prometheus(self) -> Prometheus:
        """Its Prometheus."""
        return Prometheus(f"http://127.0.0.1:{self.ports.prometheus}")

    @property
    def jaeger(self) -> Jaeger:
        """Its Jaeger."""
        return Jaeger(f"http://127.0.0.1:{self.ports.jaeger}")

    def pages(self) -> dict[str, str]:
        """What people can look at, by its name: the addresses that answer with a page.

        A Jaeger that was built from its module, or a Prometheus without its page, has an API
        alone. Raises nothing: who does not answer has none.
        """
        addresses = {
            "Prometheus": f"http://127.0.0.1:{self.ports.prometheus}/graph",
            "Jaeger": f"http://127.0.0.1:{self.ports.jaeger}/search",
        }
        if "traces" in self.parts:
            addresses["traces"] = f"http://127.0.0.1:{self.ports.traces}/"
        return {name: url for name, url in addresses.items() if is_page(url)}

    def start(self) -> None:
        """Start all parts and wait for them; raises ``StartError``, and then none runs."""
        try:
            for part in self.parts.values():
                part.start()
            for part in self.parts.values():
                part.wait()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all parts: the Collector first, so that what it holds finds those who listen."""
        self.parts["collector"].stop()
        for part in self.parts.values():
            part.ask_to_end()
        for part in self.parts.values():
            part.stop()


@contextmanager
def running(state: Path, config: Path = CONFIG) -> Iterator[Stack]:
    """A stack on ports that the system gives, for tests and benches."""
    names = Ports.__struct_fields__
    ports = Ports(**dict(zip(names, free(len(names)), strict=True)))
    stack = Stack(ports, state, state / "socket" / "tamiyo.sock", config)
    stack.start()
    try:
        yield stack
    finally:
        stack.stop()
