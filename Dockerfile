# factor-transfer on a CPU, without root. In a clone of the repository:
#   docker build --tag factor-transfer:cpu .
#   docker run --rm --user "$(id -u):$(id -g)" --shm-size 2g --volume "$PWD:/work" factor-transfer:cpu demo
# Runs and images are in the folder that is mounted as /work.

FROM python:3.11.13-slim-bookworm AS build
# torch's own index has builds without CUDA, which are a tenth of the size.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python -m venv /opt/factor-transfer
ENV PATH=/opt/factor-transfer/bin:$PATH
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" 'torch>=2.9' 'torchvision>=0.24'
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir '/source[all]'

FROM python:3.11.13-slim-bookworm
COPY --from=build /opt/factor-transfer /opt/factor-transfer
# With --user there is no home folder: caches go where everyone may write.
ENV PATH=/opt/factor-transfer/bin:$PATH HOME=/tmp
RUN useradd --create-home --uid 1000 user
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["factor-transfer"]
CMD ["--help"]
