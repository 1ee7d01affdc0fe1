"""Base64 in the forms that clients send."""

from __future__ import annotations

import base64
from urllib.parse import quote

import pytest

from almrr_pipeline.common.encoded import to_bytes

CONTENT = b"\x89PNG\r\n\x1a\n\xfb\xff\xbe\xef"  # + and / in base64, and padding
TEXT = base64.b64encode(CONTENT).decode()


@pytest.mark.parametrize(
    "sent",
    [
        CONTENT,
        TEXT,
        TEXT.encode(),
        TEXT.rstrip("="),
        TEXT + "==",
        base64.urlsafe_b64encode(CONTENT).decode(),
        f" {TEXT[:8]}\r\n{TEXT[8:]}\n",
        f"data:image/png;base64,{TEXT}",
        f"DATA:image/png;BASE64,{TEXT}",
        f"data:image/png;name=a.png;base64,{quote(TEXT, safe='')}",
        f"data:,{TEXT}",
        f"{{'b64': '{TEXT}'}}",
        f"{{'b64': 'data:image/png;base64,{TEXT}'}}",
    ],
)
def test_an_image_is_taken_in_any_usual_form(sent: object) -> None:
    assert to_bytes(sent) == CONTENT


@pytest.mark.parametrize("sent", ["%%%", "/srv/a.png", "http://x/a.png", "é", "b'aGk='", "{", b"x"])
def test_other_text_is_refused(sent: object) -> None:
    with pytest.raises(ValueError, match=r"base64|characters|ascii|padding"):
        to_bytes(sent)


@pytest.mark.parametrize("sent", [None, 5, True, [1], {"b64": "aGk="}])
def test_what_is_no_text_is_refused_by_its_type(sent: object) -> None:
    with pytest.raises(TypeError, match=f"type {type(sent).__name__}"):
        to_bytes(sent)
