"""The events of a streamed picture."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from gateway.demo.events import named_event
from gateway.demo.words import TOKEN_SECONDS


async def image_events(
    kind: str, settings: dict[str, Any], picture: str, partial: int, usage: dict[str, Any]
) -> AsyncIterator[bytes]:
    """partial times the picture on its way, which is the picture, and then the picture with its usage.

    kind: "image_generation" or "image_edit". picture: as base64.
    """
    common = {"b64_json": picture, "created_at": int(time.time()), **settings}
    for index in range(partial):
        yield named_event({"type": f"{kind}.partial_image", "partial_image_index": index, **common})
        await asyncio.sleep(TOKEN_SECONDS)
    yield named_event({"type": f"{kind}.completed", **common, "usage": usage})
