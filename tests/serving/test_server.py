"""`almrr serve` as its users know it: a process, and requests over HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image
from starlette.requests import Request

from almrr_pipeline.inference.predictor import Prediction, Predictor
from almrr_pipeline.serving.metrics import Metrics
from almrr_pipeline.serving.server import Limits, Service, _answered, model_version

pytestmark = pytest.mark.xdist_group("server")  # one process


@pytest.fixture(scope="module")
def address(model_folder: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "almrr_pipeline.cli", "serve", str(model_folder)]
    options = ["--port", "0", "--max-mb", "1", "--max-megapixels", "0.5", "--batch-size", "4"]
    process = subprocess.Popen(
        [*command, *options, "--device", "cpu"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert select.select([process.stdout], [], [], 120)[0]
        line = process.stdout.readline()
        assert line.startswith("Ready: "), line
        begin = time.perf_counter()
        url = line.removeprefix("Ready: ").strip()
        _post(url, images=[_to_base64(np.zeros((90, 120, 3), np.uint8))])
        assert time.perf_counter() - begin < 2
        yield url
    finally:
        process.terminate()
        assert process.wait(timeout=30) in (0, -15)


@pytest.fixture(scope="module")
def local(model_folder: Path, noise_paths: list[Path]) -> list[Prediction]:
    return Predictor(model_folder, device="cpu")(noise_paths)


def _to_base64(image: Any) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def _post(url: str, query: str = "", **values: Any) -> dict[str, Any]:
    answer = requests.post(f"{url}/predict{query}", json=values, timeout=60)
    assert answer.status_code == 200, answer.text
    parsed: dict[str, Any] = answer.json()
    return parsed


def test_an_image_unlike_those_of_the_calibration_is_named_in_its_answer() -> None:
    image, anomaly_map = np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), np.float32)
    for unlike in ((), ("darker", "less sharp")):
        prediction = Prediction(anomaly_map, 0.1, False, 0, unlike)
        row = Service._describe(None, image, prediction, frozenset())  # type: ignore[arg-type]
        assert row.get("unlike_calibration", ()) == unlike


def test_400_requests_of_8_clients_are_answered_as_locally(
    address: str, local: list[Prediction], noise_paths: list[Path]
) -> None:
    files = [path.read_bytes() for path in noise_paths]

    def ask(number: int) -> tuple[int, float, bool]:
        which = number % len(files)
        answer = requests.post(
            f"{address}/predict",
            data=files[which],
            headers={"Content-Type": "image/png"},
            timeout=60,
        )
        (row,) = answer.json()["predictions"]
        return which, row["score"], row["is_anomalous"]

    with ThreadPoolExecutor(8) as clients:
        answers = list(clients.map(ask, range(400)))
    assert len(answers) == 400
    for which, score, is_anomalous in answers:
        assert score == pytest.approx(local[which].score, abs=1e-6)
        assert is_anomalous == local[which].is_anomalous


def test_base64_data_uris_and_multipart_are_the_same_images(
    address: str, local: list[Prediction], noise_paths: list[Path]
) -> None:
    contents = [path.read_bytes() for path in noise_paths[:3]]
    text = [base64.b64encode(content).decode() for content in contents]
    as_json = _post(address, images=[text[0], f"data:image/png;base64,{text[1]}", text[2]])
    files = [("image", (f"{i}.png", content)) for i, content in enumerate(contents)]
    answer = requests.post(f"{address}/predict", files=files, timeout=60).json()
    scores = [row["score"] for row in as_json["predictions"]]
    assert scores == pytest.approx([prediction.score for prediction in local[:3]], abs=1e-6)
    assert [row["score"] for row in answer["predictions"]] == pytest.approx(scores, abs=1e-6)


def test_an_answer_names_model_version_and_threshold(address: str, model_folder: Path) -> None:
    model = _post(address, images=[_to_base64(np.zeros((90, 120, 3), np.uint8))])["model"]
    stored = json.loads((model_folder / "inference.json").read_text())
    assert model == {
        "category": "sample_brick",
        "version": model_version(model_folder),
        "threshold": stored["thresholds"]["image"]["value"],
    }
    described = requests.get(f"{address}/model", timeout=60).json()
    assert described["guarantee"] == stored["thresholds"]["image"]["guarantee"]


def test_overlay_and_map_come_on_request(
    address: str, local: list[Prediction], noise_paths: list[Path]
) -> None:
    text = base64.b64encode(noise_paths[1].read_bytes()).decode()
    (plain,) = _post(address, images=[text])["predictions"]
    assert set(plain) == {"score", "is_anomalous"}
    (row,) = _post(address, "?overlay=1&map=1", images=[text])["predictions"]
    drawn = {
        name: Image.open(io.BytesIO(base64.b64decode(row[name].partition(",")[2])))
        for name in ("overlay", "map")
    }
    values = np.asarray(drawn["map"], np.float32) / 65535
    assert np.allclose(values, local[1].anomaly_map, atol=2e-5)
    assert drawn["overlay"].format == "WEBP"


PNG = {"Content-Type": "image/png"}
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "headers", "status", "said"),
    [
        (b"", PNG, 400, "The request holds no image"),
        (b"no image", PNG, 400, "Image 0"),
        (b"{", JSON, 400, "The body is not JSON"),
        (b"[]", JSON, 400, "The JSON is not of the form"),
        (b'{"images": []}', JSON, 400, "The request holds no image"),
        (b'{"images": ["-"]}', JSON, 400, "Image 0"),
        (b'{"images": [3]}', JSON, 400, "Image 0 is not base64"),
        (b'{"images": ["aaaa"], "map": 1}', JSON, 400, "The JSON is not of the form"),
        (b"x", {"Content-Type": "multipart/form-data"}, 400, "The multipart body"),
        (b"x", {"Content-Type": "text/html"}, 415, "The content type 'text/html'"),
        (bytes(1_000_001), PNG, 413, "The request is larger than 1 MB"),
    ],
)
def test_a_bad_body_is_refused_in_a_sentence(
    address: str, body: bytes, headers: dict[str, str], status: int, said: str
) -> None:
    answer = requests.post(f"{address}/predict", data=body, headers=headers, timeout=60)
    assert answer.status_code == status
    assert answer.json()["error"].startswith(said)
    assert "/" not in answer.json()["error"].replace("multipart/form-data", "").replace(
        "text/html", ""
    )


@pytest.mark.parametrize(
    ("arrives", "status", "said"),
    [("late", 408, "did not arrive within 0.05 s"), ("never", 400, "The connection ended")],
)
def test_a_body_that_does_not_arrive_is_the_clients_fault(
    arrives: str, status: int, said: str
) -> None:
    async def receive() -> dict[str, str]:
        await asyncio.sleep(10 if arrives == "late" else 0)
        return {"type": "http.disconnect"}

    service = Service.__new__(Service)  # without a model, which is not asked
    service.limits, service.metrics = Limits(seconds=0.05), Metrics()
    request = Request({"type": "http", "headers": [], "query_string": b""}, receive)
    response = asyncio.run(_answered(service, service.predict)(request))
    assert response.status_code == status
    assert said in bytes(response.body).decode()


def test_a_large_image_and_an_unknown_parameter_are_refused(address: str) -> None:
    large = _to_base64(np.zeros((1000, 600, 3), np.uint8))
    answer = requests.post(f"{address}/predict", json={"images": [large]}, timeout=60)
    assert answer.status_code == 400
    assert "megapixels" in answer.json()["error"]
    answer = requests.post(f"{address}/predict?heat=1", json={"images": [large]}, timeout=60)
    assert answer.status_code == 400
    assert "heat=1" in answer.json()["error"]
    assert requests.get(f"{address}/predict", timeout=60).status_code == 405
    assert requests.get(f"{address}/nowhere", timeout=60).status_code == 404


def test_health_and_counters(address: str) -> None:
    def counted() -> dict[str, float]:
        text = requests.get(f"{address}/metrics", timeout=60).text
        samples = [line for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in (s.rpartition(" ") for s in samples)}

    assert requests.get(f"{address}/health", timeout=60).json() == {"status": "ok"}
    before = counted()
    _post(address, images=[_to_base64(np.zeros((90, 120, 3), np.uint8))] * 2)
    requests.post(f"{address}/predict", data=b"{", headers=JSON, timeout=60)
    after = counted()
    images = [name for name in after if name.startswith("almrr_images_total")]
    assert sum(after[name] - before.get(name, 0) for name in images) == 2
    for status, more in (("200", 1), ("400", 1)):
        name = f'almrr_requests_total{{status="{status}"}}'
        assert after[name] - before.get(name, 0) == more
    assert after["almrr_request_seconds_count"] - before["almrr_request_seconds_count"] == 2
    assert 0 <= after["almrr_alarm_p_value"] <= 1
    assert after['almrr_request_seconds_bucket{le="+Inf"}'] == after["almrr_request_seconds_count"]


def test_a_taken_port_is_named_in_one_sentence(address: str, model_folder: Path) -> None:
    from almrr_pipeline.common.errors import AlmrrError
    from almrr_pipeline.serving.server import serve

    port = int(address.rpartition(":")[2])
    service = Service(model_folder, Predictor(model_folder, device="cpu"), Limits())
    with pytest.raises(AlmrrError, match=f"127.0.0.1:{port} cannot be listened at"):
        serve(service, host="127.0.0.1", port=port)
    for host in ("\udcff", "x" * 70):
        with pytest.raises(AlmrrError, match="cannot be listened at"):
            serve(service, host=host, port=0)
    service.close()
