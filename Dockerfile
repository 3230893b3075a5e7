# minitron in a container. Where BASE brings no torch, TORCH_INDEX says where pip takes it from; with PyTorch's index of builds
# for the CPU the image has no CUDA libraries, which are several gigabytes:
#
#   docker build -t minitron --build-arg TORCH_INDEX=URL .
#   docker run --rm -v "$PWD:/work" minitron run specs/mine.yaml
#
# With CUDA, BASE may be any image with Python 3.11 or newer and a torch for CUDA, which is kept:
#
#   docker build -t minitron --build-arg BASE=pytorch/pytorch:TAG .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" minitron run specs/mine.yaml
ARG BASE=python:3.12-slim
FROM ${BASE}

# Empty: the torch of the base image, or else of the index that pip is set up with.
ARG TORCH_INDEX=
ARG EXTRAS=eval,tensorboard,datasets

# Nobody needs to be root to compile a model. The number is that of most people's files; a base image may have it already.
RUN useradd --create-home --non-unique --uid 1000 minitron

WORKDIR /opt/minitron
COPY . .
RUN if [ -n "${TORCH_INDEX}" ]; then \
      python -m pip install --no-cache-dir --index-url "${TORCH_INDEX}" -c constraints.txt torch; \
    fi \
    && python -m pip install --no-cache-dir ".[${EXTRAS}]"

USER minitron
WORKDIR /work
ENTRYPOINT ["minitron"]
CMD ["--help"]
