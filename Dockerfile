# What a device runs: OpenVINO without PyTorch, by a user without rights, for a root folder that cannot be written.
# The words for docker are in docs/boards.md; `make container` carries these steps out without Docker.
FROM python:3.13-slim-trixie
# openvino,teach,video: to teach it, and for cameras; teach brings ONNX Runtime
ARG EXTRAS=openvino
COPY pyproject.toml setup.py README.md LICENSE /src/
COPY ssod_edge /src/ssod_edge
COPY export /src/export
COPY bench /src/bench
RUN python3 -m venv /opt/ssod-edge \
    && SSOD_EDGE_EXT=none /opt/ssod-edge/bin/pip install --no-cache-dir "/src[$EXTRAS]" \
    && rm -r /src
# Python's compiled files were made above; at run time nothing could be written.
ENV PATH=/opt/ssod-edge/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /data
ENTRYPOINT ["ssod-edge"]
CMD ["--help"]
