# grc serve on CPUs: the runtime and its engines, no compiler, no rights.
#   docker build -t grc-serve .
#   docker run --rm -p 8000:8000 -v $PWD/model.grc:/models/model:ro grc-serve model=/models/model
FROM python:3.12-slim-bookworm AS build

ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/grc
WORKDIR /src
COPY constraints.txt ./
# The CPU build first: what follows would bring the one for CUDA, which is twenty times as large.
RUN /opt/grc/bin/pip install -c constraints.txt torch --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE ./
COPY grc ./grc
RUN /opt/grc/bin/pip install -c constraints.txt '.[serve]' 'onnxruntime>=1.22' \
    && find /opt/grc -name __pycache__ -prune -exec rm -r {} +

FROM python:3.12-slim-bookworm

# The OpenMP runtime that AOTInductor's libraries are linked with.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends libgomp1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --no-create-home grc
COPY --from=build /opt/grc /opt/grc
ENV PATH=/opt/grc/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 OMP_WAIT_POLICY=PASSIVE
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/v2/health/live', timeout=2)"]
# Within a container loopback can't be reached: who may come in is decided where the port is published.
ENTRYPOINT ["grc", "serve", "--server", "own", "--host", "0.0.0.0"]
CMD ["--help"]
