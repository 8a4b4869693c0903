# Teachers, students and arms on GPUs.
#   docker build -f infra/images/cuda.Dockerfile -t stillhouse/cuda:0.1.0 .
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ ninja-build wget \
    && rm -rf /var/lib/apt/lists/*
# Ubuntu's image has a user 1000 already.
RUN usermod --login stillhouse --home /home/stillhouse --move-home ubuntu
# Ray lets no node join whose Python differs from the head's, even in the patch level. So the interpreter is not the
# distribution's: uv installs the same build of the one version in python-version into every image.
COPY --from=ghcr.io/astral-sh/uv:0.13.9 /uv /usr/local/bin/uv
COPY infra/images/python-version /opt/python-version
RUN UV_PYTHON_INSTALL_DIR=/opt/python uv venv --no-cache --seed --managed-python --python "$(cat /opt/python-version)" /opt/venv \
    && chown --recursive stillhouse /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    MLFLOW_DISABLE_TELEMETRY=true \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    RAY_USAGE_STATS_ENABLED=0
# By number: Kubernetes cannot see that a name is not root.
USER 1000
WORKDIR /home/stillhouse

COPY --chown=stillhouse constraints.txt /tmp/constraints.txt
RUN pip install -c /tmp/constraints.txt torch==2.13.0
COPY --chown=stillhouse pyproject.toml README.md LICENSE /tmp/stillhouse/
COPY --chown=stillhouse cluster /tmp/stillhouse/cluster
COPY --chown=stillhouse jobs /tmp/stillhouse/jobs
COPY --chown=stillhouse serving /tmp/stillhouse/serving
RUN pip install -c /tmp/constraints.txt "/tmp/stillhouse[train,serve]" \
    && rm -rf /tmp/stillhouse/build

HEALTHCHECK --interval=60s --timeout=20s --start-period=60s CMD ["stillhouse", "--version"]
CMD ["stillhouse", "--help"]
