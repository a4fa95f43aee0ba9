# Tamiyo: the sidecar, without torch. Runs as user 10001 on a read-only file system; only
# /run/esper (its socket) and /var/lib/esper (its journal and state) are written.
FROM python:3.12-slim-bookworm AS made

WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY sidecar sidecar
# numpy encodes the trainers' telemetry, and the sidecar only reads it.
RUN python -m venv /opt/esper \
 && /opt/esper/bin/pip install --no-cache-dir . \
 && /opt/esper/bin/pip uninstall --yes numpy pip

FROM python:3.12-slim-bookworm

RUN install -d -o 10001 -g 10001 -m 0700 /run/esper /var/lib/esper
COPY --from=made /opt/esper /opt/esper
ENV PATH=/opt/esper/bin:$PATH \
    HOME=/var/lib/esper \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
# OTLP by gRPC and by HTTP, and health
EXPOSE 4317 4318 8080
ENTRYPOINT ["tamiyo"]
CMD ["serve"]
