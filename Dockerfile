# A server for a trained model, on a CPU: docs/predict.md#in-a-container

FROM python:3.13-slim AS build
# Address of an index that has torch's CPU builds, for an image without CUDA's libraries
ARG PIP_EXTRA_INDEX_URL
WORKDIR /source
COPY constraints.txt pyproject.toml LICENSE ./
COPY docs/package.md docs/
COPY src src
RUN python -m venv /opt/almrr \
    && /opt/almrr/bin/pip install --no-cache-dir --constraint constraints.txt .

FROM python:3.13-slim
RUN useradd --uid 10001 --create-home almrr
COPY --from=build /opt/almrr /opt/almrr
ENV PATH=/opt/almrr/bin:$PATH \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /home/almrr
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=3m \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# The model folder is mounted at /model; further options of `almrr serve` follow the image's name
ENTRYPOINT ["almrr", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
