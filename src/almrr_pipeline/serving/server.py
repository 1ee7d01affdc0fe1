"""The HTTP server: POST /predict; GET /health, /model and /metrics.

Starlette on uvicorn, which MLflow brings; one process, one thread for the network, batches of what
arrives together. It listens only after the model is warm.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from anyio import to_thread
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.errors import AlmrrError, quote
from almrr_pipeline.common.images import encode_map
from almrr_pipeline.common.region import show_counted
from almrr_pipeline.evaluation.thresholds import alarm_p_value
from almrr_pipeline.inference.predictor import Prediction, Predictor
from almrr_pipeline.reporting.overlays import draw_overlay, encode_image
from almrr_pipeline.serving.batcher import Batcher, BusyError
from almrr_pipeline.serving.metrics import CONTENT_TYPE, Metrics
from almrr_pipeline.serving.requests import IMAGES, MEGAPIXELS, RequestError, read_images

logger = logging.getLogger(__name__)

_EXTRAS = frozenset({"overlay", "map"})
_AT_ONCE = 16  # requests whose images are in memory; further ones wait with their bodies
_YES, _NO = frozenset({"1", "true", "yes", ""}), frozenset({"0", "false", "no"})


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    megabytes: float = 32.0  # of the body
    megapixels: float = 50.0  # of an image, or fewer if the model says so
    together: float = MEGAPIXELS  # of a request's images
    images: int = IMAGES  # of a request
    seconds: float = 30.0  # until the answer


class Service:
    """A model, warm, and the answers to requests."""

    def __init__(self, folder: Path, predictor: Predictor, limits: Limits) -> None:
        """Warm the model up.

        Args:
            folder: the model folder that `predictor` was loaded from.
            predictor: the model.
            limits: of a request.
        """
        self.limits, self.metrics = limits, Metrics()
        self._predictor, self._version = predictor, model_version(folder)
        reading = predictor.config.reading
        largest = min(reading.max_megapixels, limits.megapixels)
        self._reading = reading.model_copy(update={"max_megapixels": largest})
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._batcher = Batcher(predictor, waiting=_AT_ONCE * limits.images)
        self._batcher.warm_up()

    def close(self) -> None:
        """Answer what waits, and end."""
        self._batcher.close()

    async def predict(self, request: Request) -> Response:
        """Scores and verdicts for the images of a request; overlays and maps if asked for."""
        extras = _read_extras(request)
        body = await self._read_body(request)
        request.state.is_complete = True
        async with self._at_once:
            return await self._answer(request, body, extras)

    async def _answer(self, request: Request, body: bytes, extras: frozenset[str]) -> Response:
        content_type = request.headers.get("content-type", "")
        together = max(self.limits.together, self._reading.max_megapixels)
        read = partial(read_images, most=self.limits.images, megapixels=together)
        images = await to_thread.run_sync(read, body, content_type, self._reading)
        futures = [asyncio.wrap_future(self._batcher.submit(image)) for image in images]
        predictions = await asyncio.gather(*futures)
        for found in predictions:
            self.metrics.count_image(found.score, found.is_anomalous, found.unlike)
        rows = [
            await to_thread.run_sync(self._describe, image, prediction, extras)
            if extras
            else self._describe(image, prediction, extras)
            for image, prediction in zip(images, predictions, strict=True)
        ]
        return JSONResponse({"model": self._describe_model(), "predictions": rows})

    async def show_health(self, request: Request) -> Response:
        """Whether the server is there: it is not before the model is warm."""
        return JSONResponse({"status": "ok"})

    async def show_model(self, request: Request) -> Response:
        """The model, its thresholds and what they guarantee."""
        stored = self._predictor.config.image_threshold
        rows, columns = self._predictor.config.image_size
        guarantee = stored.guarantee if stored else None
        return JSONResponse(
            {**self._describe_model(), "image_size": [rows, columns], "guarantee": guarantee}
        )

    async def show_metrics(self, request: Request) -> Response:
        """Counters for Prometheus."""
        stored = self._predictor.config.image_threshold
        if stored and stored.value != self._predictor.image_threshold:
            stored = None  # another one was given, which promises nothing
        text = self.metrics.render(
            waiting=self._batcher.waiting,
            version=self._version,
            p_value=alarm_p_value(stored, *self.metrics.recent),
        )
        return Response(text, media_type=CONTENT_TYPE)

    def _describe_model(self) -> dict[str, Any]:
        predictor = self._predictor
        return {
            "category": predictor.config.category,
            "version": self._version,
            "threshold": predictor.image_threshold,
        }

    def _describe(
        self, image: ImageArray, prediction: Prediction, extras: frozenset[str]
    ) -> dict[str, Any]:
        row: dict[str, Any] = {"score": prediction.score, "is_anomalous": prediction.is_anomalous}
        if prediction.unlike:
            row["unlike_calibration"] = prediction.unlike
        if "overlay" in extras:
            overlay = draw_overlay(
                show_counted(image, self._predictor.config.region),
                prediction.anomaly_map,
                threshold=self._predictor.pixel_threshold,
                score=prediction.score,
                is_anomalous=prediction.is_anomalous,
            )
            row["overlay"] = _as_uri(encode_image(overlay), "webp")
        if "map" in extras:
            row["map"] = _as_uri(encode_map(prediction.anomaly_map), "png")
        return row

    async def _read_body(self, request: Request) -> bytes:
        most = round(self.limits.megabytes * 1e6)
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise RequestError(
                    f"The request is larger than {self.limits.megabytes:g} MB; send fewer or "
                    "smaller images.",
                    413,
                )
            parts.append(part)
        return b"".join(parts)


def build_app(service: Service) -> Starlette:
    """The application around a service; it closes the service when it ends."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await to_thread.run_sync(service.close)

    routes = [
        Route("/predict", _answered(service, service.predict), methods=["POST"]),
        Route("/health", service.show_health),
        Route("/model", service.show_model),
        Route("/metrics", service.show_metrics),
    ]
    handlers: dict[Any, Any] = {404: _explain_address, 405: _explain_address}
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)


def model_version(folder: Path) -> str:
    """Twelve hexadecimal digits of the weights and the thresholds."""
    digest = hashlib.sha256()
    for name in ("model.safetensors", "config.json", "inference.json"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:12]


def _answered(
    service: Service, answer: Callable[[Request], Awaitable[Response]]
) -> Callable[[Request], Awaitable[Response]]:
    """An answer within the time limit, counted, or one sentence that says what was wrong."""

    async def respond(request: Request) -> Response:
        begin = time.perf_counter()
        try:
            response = await asyncio.wait_for(answer(request), service.limits.seconds)
        except RequestError as error:
            response = _refuse(str(error), error.status)
        except BusyError as error:
            response = _refuse(str(error), 503)
        except TimeoutError:
            seconds = f"{service.limits.seconds:g} s"
            if hasattr(request.state, "is_complete"):
                response = _refuse(f"There was no answer within {seconds}; send it later.", 503)
            else:
                response = _refuse(f"The body did not arrive within {seconds}.", 408)
        except ClientDisconnect:
            response = _refuse("The connection ended before the body did.", 400)
        except Exception:
            logger.exception("A request failed.")
            response = _refuse("The server failed; its log says why.", 500)
        service.metrics.count_request(response.status_code, time.perf_counter() - begin)
        return response

    return respond


async def _explain_address(request: Request, error: Exception) -> Response:
    text = "Known are POST /predict, GET /health, GET /model and GET /metrics."
    return _refuse(text, getattr(error, "status_code", 404))


def _refuse(sentence: str, status: int) -> Response:
    return JSONResponse({"error": sentence}, status_code=status)


def _read_extras(request: Request) -> frozenset[str]:
    wanted = set()
    for name, value in request.query_params.items():
        if name not in _EXTRAS or value.lower() not in _YES | _NO:
            wrong = quote(repr(f"{name}={value}"))
            raise RequestError(f"{wrong} is not known; the parameters are overlay=1 and map=1.")
        if value.lower() in _YES:
            wanted.add(name)
    return frozenset(wanted)


def _as_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


class _Server(uvicorn.Server):
    """A server that tells when it listens."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if sockets and self.started:
            host, port = sockets[0].getsockname()[:2]
            self._on_ready(f"http://{host}:{port}")


def serve(
    service: Service, *, host: str, port: int, on_ready: Callable[[str], None] = logger.info
) -> None:
    """Answer requests until SIGINT or SIGTERM; what was accepted before is answered.

    Args:
        service: warm.
        host: address to listen at.
        port: 0 for any that is free.
        on_ready: called with the address when requests are taken.

    Raises:
        AlmrrError: the address cannot be listened at.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except (OSError, UnicodeError, TypeError) as error:  # the last two of a host that is no text
        listening.close()
        reason = getattr(error, "strerror", None) or "no name of a host"
        raise AlmrrError(
            f"{quote(host)}:{port} cannot be listened at ({reason}); name another --port or --host."
        ) from None
    config = uvicorn.Config(build_app(service), log_config=None, access_log=False)
    _Server(config, on_ready).run(sockets=[listening])
