# docker build -t unmask .                                                                          for a CPU
# docker build -t unmask --build-arg TORCH=https://download.pytorch.org/whl/cu128 .      for NVIDIA GPUs (docker run --gpus all …)
FROM python:3.12-slim

ARG TORCH=https://download.pytorch.org/whl/cpu

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /unmask
COPY pyproject.toml constraints.txt LICENSE ./
COPY docs/package.md docs/package.md
COPY src src
RUN grep '^torch==' constraints.txt > torch.txt \
    && pip install --no-cache-dir --index-url "$TORCH" --requirement torch.txt \
    && pip install --no-cache-dir --constraint constraints.txt ".[serve]"

RUN useradd --create-home --uid 1000 unmask
USER 1000
WORKDIR /home/unmask
EXPOSE 8000
ENTRYPOINT ["unmask"]
CMD ["--help"]
