"""Images of requests that arrive together go through the network together."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.errors import AlmrrError
from almrr_pipeline.inference.predictor import Prediction, Predictor

_Job = tuple[ImageArray, "Future[Prediction]"]
_WARM_UP_SIZE = (96, 128)  # rows and columns; any but the network's, so that resizing is warm too


class BusyError(AlmrrError):
    """More images wait than can be answered in time; try again later."""


class Batcher:
    """One thread that predicts what is waiting, up to a batch at a time.

    Nothing waits for a batch to fill: while one is computed, the next one gathers.
    """

    def __init__(self, predictor: Predictor, *, waiting: int) -> None:
        """Begin to work.

        Args:
            predictor: the model; its batch size is that of a turn.
            waiting: images that may wait; more are refused.
        """
        self._predictor = predictor
        self._waiting: queue.Queue[_Job | None] = queue.Queue(waiting)
        self._batch_size = predictor.map_predictor.batch_size
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Images that wait."""
        return self._waiting.qsize()

    def warm_up(self) -> None:
        """Predict one image and a full batch, which compiles kernels and takes memory."""
        image = np.full((*_WARM_UP_SIZE, 3), 128, np.uint8)
        for count in (1, self._batch_size):
            for submitted in [self.submit(image) for _ in range(count)]:
                submitted.result()

    def submit(self, image: ImageArray) -> Future[Prediction]:
        """Queue an image, uint8 RGB of shape (H, W, 3); BusyError if too many wait."""
        future: Future[Prediction] = Future()
        try:
            self._waiting.put_nowait((image, future))
        except queue.Full:
            raise BusyError("Too many images are waiting; send this one again later.") from None
        return future

    def close(self) -> None:
        """Answer what waits, and end the thread."""
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        ended = False
        while not ended:
            jobs = [self._waiting.get()]
            while jobs[-1] is not None and len(jobs) < self._batch_size:
                try:
                    jobs.append(self._waiting.get_nowait())
                except queue.Empty:
                    break
            ended = jobs[-1] is None
            wanted = [job for job in jobs if job and job[1].set_running_or_notify_cancel()]
            if wanted:
                self._predict(wanted)

    def _predict(self, jobs: Sequence[_Job]) -> None:
        try:
            predictions = self._predictor([image for image, _ in jobs])
        except Exception as error:
            for _, future in jobs:
                future.set_exception(error)
            return
        for (_, future), prediction in zip(jobs, predictions, strict=True):
            future.set_result(prediction)
