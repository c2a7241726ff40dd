# The captioning service, without a model: mount a run's folder, or a folder of runs, at /model.
#
#     docker build -t caption-service .                                # for CPUs
#     docker build -t caption-service:cuda --build-arg DEVICE=cuda .   # for NVIDIA GPUs; run it with --gpus all
#     docker run --read-only --tmpfs /tmp -v "$PWD/saved_models:/model:ro" -p 127.0.0.1:8000:8000 caption-service

ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS packages
ARG DEVICE=cpu
WORKDIR /build
RUN python -m pip install --no-cache-dir uv==0.13.9 && python -m venv /opt/venv
# before the code, so that a change of that installs nothing anew
COPY requirements.txt requirements-service.txt ./
# torch of PyPI brings CUDA's libraries (5 GB), torch of its own index for CPUs does not
RUN case "$DEVICE" in \
        cpu) set -- --torch-backend cpu ;; \
        cuda) set -- ;; \
        *) echo "DEVICE must be cpu or cuda, not $DEVICE" >&2; exit 1 ;; \
    esac \
    && uv pip install --python /opt/venv --no-cache --compile-bytecode "$@" \
        -r requirements.txt -r requirements-service.txt

FROM python:${PYTHON}-slim-bookworm
COPY --from=packages /opt/venv /opt/venv
WORKDIR /app
COPY *.py ./
COPY service_page service_page
RUN /opt/venv/bin/python -m compileall -q . \
    && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin captioner
# nothing but /tmp is written to
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    CAPTION_MODEL=/model \
    CAPTION_HOST=0.0.0.0 \
    CAPTION_PORT=8000
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + (os.environ.get('CAPTION_PORT') or '8000') + '/health', timeout=4)"]
CMD ["python", "-m", "caption_service", "serve"]
