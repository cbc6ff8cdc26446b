# syntax=docker/dockerfile:1
# The node with its default model. Build: docker build -t openagi-node .
# Run: docker run -p 127.0.0.1:8765:8765 -p 4001:4001 -v openagi:/data openagi-node
# (the door asks for no key, so only this machine may ask it). Three nodes: docs/operators/compose.yaml
FROM python:3.11-slim

ENV PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /app
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY crypto crypto
COPY p2p p2p
COPY model model
COPY gossip gossip
COPY node node
COPY bootstrap_peers.json ./

# The same two installs as `make run`.
RUN python -m pip install -c constraints.txt torch \
    && python -m pip install -c constraints.txt -e . \
    && useradd --system --create-home --uid 10001 node \
    && install -d -o node -g node -m 0700 /data

USER node
VOLUME /data
EXPOSE 8765 4001

HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8765/readyz', timeout=4)"]

STOPSIGNAL SIGTERM
ENTRYPOINT ["python", "-m", "node"]
CMD ["run", "--data-dir", "/data", "--http", "0.0.0.0:8765", "--open", "--listen", "/ip4/0.0.0.0/tcp/4001"]
