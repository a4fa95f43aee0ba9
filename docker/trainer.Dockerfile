# An example trainer: PyTorch, the instrumentation and examples/. Same user as the sidecar,
# which answers nobody else. For a smaller image name an index with wheels of PyTorch for
# CPUs: --build-arg PIP_EXTRA_INDEX_URL=…
FROM python:3.12-slim-bookworm

ARG PIP_EXTRA_INDEX_URL=""
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY sidecar sidecar
# What it depends on is bounded in pyproject.toml.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ".[demo]" \
 && install -d -o 10001 -g 10001 -m 0700 /run/esper /var/lib/esper
COPY examples examples
ENV HOME=/var/lib/esper \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
ENTRYPOINT ["esper-otel"]
CMD ["run", "examples/digits.py"]
