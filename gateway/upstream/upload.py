"""Request bodies that are not in memory."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass

from gateway.upstream.connection import Connection
from gateway.upstream.errors import UpstreamUnavailable


@dataclass(frozen=True, slots=True)
class Upload:
    """A body that is not in memory. size_bytes: None where it is not known. chunks: all of it."""

    content_type: str
    size_bytes: int | None
    chunks: Callable[[], AsyncIterator[bytes]]


async def write_upload(connection: Connection, upload: Upload) -> None:
    """Write the body as fast as the upstream takes it. What goes wrong ends the answer."""
    chunks = upload.chunks()
    try:
        await _write_all(connection, upload.size_bytes, chunks)
        connection.uploaded()
    except Exception as error:
        connection.fail(UpstreamUnavailable(f"the request's body broke: {error}"))
    finally:
        if isinstance(chunks, AsyncGenerator):
            await chunks.aclose()


async def _write_all(connection: Connection, size_bytes: int | None, chunks: AsyncIterator[bytes]) -> None:
    left = size_bytes
    async for chunk in chunks:
        if not chunk:
            continue  # in chunks it would be the end
        if left is None:
            await connection.write(b"%x\r\n%b\r\n" % (len(chunk), chunk))
            continue
        left -= len(chunk)
        if left < 0:
            raise ValueError("it is longer than was said")
        await connection.write(chunk)
    if left is None:
        await connection.write(b"0\r\n\r\n")
    elif left:
        raise ValueError("it is shorter than was said")
