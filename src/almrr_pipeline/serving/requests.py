"""From the body of a request to images: JSON with base64, multipart, or an image file itself."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

from werkzeug.exceptions import HTTPException
from werkzeug.formparser import parse_form_data

from almrr_pipeline.common.arrays import ImageArray
from almrr_pipeline.common.encoded import to_bytes
from almrr_pipeline.common.errors import AlmrrError, quote
from almrr_pipeline.common.images import Reading, decode_image

IMAGES, MEGAPIXELS = 64, 200.0  # that a request may hold
EXAMPLE = '{"images": ["<base64 of an image file>"]}'
_ACCEPTED = (
    f"send JSON such as {EXAMPLE}, multipart/form-data with files, or an image file as the body"
)


@dataclass
class RequestError(AlmrrError):
    """A request that cannot be answered, with its HTTP status."""

    sentence: str
    status: int = 400

    def __str__(self) -> str:
        """The sentence."""
        return self.sentence


def read_images(
    body: bytes,
    content_type: str,
    reading: Reading,
    *,
    most: int = IMAGES,
    megapixels: float = MEGAPIXELS,
) -> list[ImageArray]:
    """Decode all images of a body, as uint8 RGB of shape (H, W, 3).

    Args:
        body: JSON `{"images": [...]}` with base64 or data URIs, multipart/form-data with files, or
            an image file.
        content_type: of the request, with its parameters.
        reading: of the model; with the largest number of megapixels.
        most: images of a request.
        megapixels: of all its images together, which a small body can unpack to.

    Raises:
        RequestError: there is no image in it, there are too many, or one cannot be read; says
            which.
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        files = _read_multipart(body, content_type)
    elif kind == "application/json":
        files = _read_json(body)
    elif kind in {"", "application/octet-stream"} or kind.startswith("image/"):
        files = [body]
    else:
        raise RequestError(f"The content type {quote(repr(kind))} is not known; {_ACCEPTED}.", 415)
    if not files or files == [b""]:
        raise RequestError(f"The request holds no image; {_ACCEPTED}.")
    if len(files) > most:
        raise RequestError(f"The request holds {len(files)} images; send at most {most}.", 413)
    images: list[ImageArray] = []
    for position, file in enumerate(files):
        images.append(_decode(file, f"Image {position}", reading))
        if sum(image.size for image in images) > 3e6 * megapixels:
            found = f"The request's images have more than {megapixels:g} megapixels together"
            raise RequestError(f"{found}; send fewer.", 413)
    return images


def _read_json(body: bytes) -> list[bytes]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(f"The body is not JSON; {_ACCEPTED}.") from None
    images = values.get("images") if isinstance(values, dict) else None
    if not isinstance(images, list) or set(values) != {"images"}:
        raise RequestError(f"The JSON is not of the form {EXAMPLE}; {_ACCEPTED}.")
    files = []
    for position, text in enumerate(images):
        try:
            files.append(to_bytes(text))
        except (TypeError, ValueError):
            raise RequestError(f"Image {position} is not base64; {_ACCEPTED}.") from None
    return files


def _read_multipart(body: bytes, content_type: str) -> list[bytes]:
    environment = {
        "wsgi.input": io.BytesIO(body),
        "CONTENT_TYPE": content_type,
        "CONTENT_LENGTH": str(len(body)),
        "REQUEST_METHOD": "POST",
    }
    try:
        _, _, files = parse_form_data(environment, silent=False)
    except (ValueError, HTTPException):
        raise RequestError(f"The multipart body cannot be read; {_ACCEPTED}.") from None
    return [file.read() for _, file in files.items(multi=True)]


def _decode(file: bytes, name: str, reading: Reading) -> ImageArray:
    try:
        return decode_image(file, Path(name), reading)
    except AlmrrError as error:
        raise RequestError(str(error)) from None
