# The head, MLflow, submitters, and everything on machines without a GPU.
#   docker build -f infra/images/cpu.Dockerfile -t stillhouse/cpu:0.1.0 .
FROM debian:12.12-slim

# The compiler is DeepSpeed's: it builds one operator when a student first starts. wget is for KubeRay's probes. Versions
# are the release's own; a mirror drops each one when its security update comes.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ ninja-build wget \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 1000 --create-home --shell /usr/sbin/nologin stillhouse
# Ray lets no node join whose Python differs from the head's, even in the patch level. So the interpreter is not the
# distribution's: uv installs the same build of the one version in python-version into every image.
COPY --from=ghcr.io/astral-sh/uv:0.13.9 /uv /usr/local/bin/uv
COPY infra/images/python-version /opt/python-version
RUN UV_PYTHON_INSTALL_DIR=/opt/python uv venv --no-cache --seed --managed-python --python "$(cat /opt/python-version)" /opt/venv \
    && chown --recursive stillhouse /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    DS_ACCELERATOR=cpu \
    MLFLOW_DISABLE_TELEMETRY=true \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    RAY_USAGE_STATS_ENABLED=0
# By number: Kubernetes cannot see that a name is not root.
USER 1000
WORKDIR /home/stillhouse

# The libraries first: they change seldom, and are nearly all of the image.
COPY --chown=stillhouse constraints.txt /tmp/constraints.txt
# Where PyPI's torch is the one for GPUs, --build-arg TORCH_INDEX names an index that has the one for CPUs.
ARG TORCH_INDEX=
RUN pip install -c /tmp/constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch==2.13.0
COPY --chown=stillhouse pyproject.toml README.md LICENSE /tmp/stillhouse/
COPY --chown=stillhouse cluster /tmp/stillhouse/cluster
COPY --chown=stillhouse jobs /tmp/stillhouse/jobs
COPY --chown=stillhouse serving /tmp/stillhouse/serving
RUN pip install -c /tmp/constraints.txt "/tmp/stillhouse[train,serve]" psycopg2-binary \
    && rm -rf /tmp/stillhouse/build

# Healthy where it can do what it is for; KubeRay's own probes look at Ray.
HEALTHCHECK --interval=60s --timeout=20s --start-period=60s CMD ["stillhouse", "--version"]
CMD ["stillhouse", "--help"]
