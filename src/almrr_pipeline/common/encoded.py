"""Image files as text: base64 in its usual forms."""

from __future__ import annotations

import base64
import re
from urllib.parse import unquote

_PREFIX = re.compile(r"\s*(?:\{'b64': ')?(?:data:[^,]*,)?", flags=re.IGNORECASE)
"""Of a data URI, or of TensorFlow Serving's {"b64": ...} as MLflow writes it into a cell."""


def to_bytes(content: object) -> bytes:
    """Return an image file's bytes; base64 is decoded, also URL-safe, unpadded, as a data URI.

    Raises:
        TypeError: the content is neither bytes nor text.
        ValueError: the text is not base64 (binascii.Error, UnicodeError).
    """
    if isinstance(content, bytes) and not re.fullmatch(rb"[\x20-\x7e\s]*", content[:64]):
        return content  # every image format has other bytes in its header
    text = content.decode("ascii") if isinstance(content, bytes) else content
    if not isinstance(text, str):
        raise TypeError(f"it is of the type {type(content).__name__}")
    encoded = unquote(_PREFIX.sub("", text, count=1).removesuffix("'}"))  # base64 has no %
    standard = "".join(encoded.split()).rstrip("=").translate(str.maketrans("-_", "+/"))
    return base64.b64decode(standard + "=" * (-len(standard) % 4), validate=True)
