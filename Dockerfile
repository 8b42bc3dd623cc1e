# lite-trgrpo on an NVIDIA card, from a checkout. UNBUILT: this file has never been built or run.
#
#     docker build -t lite-trgrpo .
#     docker run --rm -it --gpus all -v lite-trgrpo-cache:/cache -v "$PWD:/workspace" --user "$(id -u):$(id -g)" \
#         lite-trgrpo train --preset math-1.5b
#
# /cache keeps fetched models between containers; runs are written to /workspace/runs.
FROM nvidia/cuda:13.0.0-runtime-ubuntu24.04

# The compiler is for Triton and for reasoning-gym's pycosat.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY lite_trgrpo /src/lite_trgrpo
COPY presets /src/presets
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir -c /src/constraints.txt "/src[data]"

ENV PATH=/opt/venv/bin:$PATH HF_HOME=/cache/huggingface LITE_TRGRPO_CACHE=/cache/lite-trgrpo HOME=/tmp
# Any user may write there: --user gives the runs to the one who started the container.
RUN mkdir -p /cache /workspace && chmod 1777 /cache /workspace
VOLUME /cache
WORKDIR /workspace
USER 10001
ENTRYPOINT ["lite-trgrpo"]
CMD ["--help"]
