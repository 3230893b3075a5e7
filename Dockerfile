# minitron in a container, for the CPU by default:
#
#   docker build -t minitron .
#   docker run --rm -v "$PWD:/work" minitron run specs/mine.yaml
#
# and with CUDA, where BASE is any image with Python 3.11 or newer and a torch of 2.13 or newer for CUDA:
#
#   docker build -t minitron --build-arg BASE=pytorch/pytorch:TAG --build-arg TORCH_INDEX= .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" minitron run specs/mine.yaml
ARG BASE=python:3.12-slim
FROM ${BASE}

# Empty where the base image brings torch: then that one is kept.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
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
