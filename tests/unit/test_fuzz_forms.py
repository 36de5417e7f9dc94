"""Forms of any shape: each is refused or priced, nothing of it stays on disk, and what the upstream gets is read there
as it was priced."""

import asyncio
from collections.abc import Iterator
from email import policy
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from aiohttp import web
from hypothesis import strategies as st

from gateway.apis.form import Form
from gateway.apis.registry import APIS
from gateway.config.load import load
from gateway.config.model import GatewayConfig
from gateway.domain.request import InvalidRequest
from gateway.http.errors import Failure
from gateway.http.multipart import MAX_PARTS, UploadRoom, read_form, written
from gateway.http.quote import Quote, read_form_quote
from tests.gateway_process import gateway_config
from tests.unit.fuzzing import FEW_OR_MANY, fuzz

# aiohttp warns of what it does not read; only this suite makes errors of warnings.
pytestmark = [
    pytest.mark.filterwarnings("ignore::aiohttp.BadContentDispositionHeader"),
    pytest.mark.filterwarnings("ignore::aiohttp.BadContentDispositionParam"),
]

PATHS = [path for path, api in APIS.items() if api.takes_form]
MOST_BYTES = 50_000
BOUNDARY = b"edge"
SENT_AS = "the/real-one"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> GatewayConfig:
    raw = gateway_config("http://127.0.0.1:1/v1", ["m"], image_prices={"*": "0.01"}, second_price="0.0001")
    raw["models"]["models"]["renamed"] = {**raw["models"]["models"]["m"], "upstream_model": SENT_AS}
    path: Path = tmp_path_factory.mktemp("fuzz") / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    return load(path, {})


class Desk:
    """A server that reads forms; each answer is empty. run: its loop's."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self.run = runner.run
        self._read: list[Form | Failure] = []
        self.run(self._start())

    async def _start(self) -> None:
        self._server = web.ServerRunner(web.Server(self._answer, access_log=None))
        await self._server.setup()
        await web.TCPSite(self._server, "127.0.0.1", 0).start()

    def close(self) -> None:
        self.run(self._server.cleanup())

    async def _answer(self, request: web.BaseRequest) -> web.Response:
        self._read.append(await read_form(request, MOST_BYTES, UploadRoom()))
        answer = web.Response()
        answer.force_close()
        return answer

    def read(self, raw: bytes, content_type: str, step: int) -> Form | Failure:
        """What becomes of a form that comes in pieces of so many bytes."""
        self.run(self._send(raw, content_type, step))
        return self._read.pop()

    async def _send(self, raw: bytes, content_type: str, step: int) -> None:
        reader, writer = await asyncio.open_connection(*self._server.addresses[0])
        head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n"
        pieces = [raw[place : place + step] for place in range(0, len(raw), step)]
        writer.write(head.encode() + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces))
        writer.write(b"0\r\n\r\n")
        async with asyncio.timeout(60):
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
        writer.close()
        await writer.wait_closed()


@pytest.fixture(scope="module")
def desk() -> Iterator[Desk]:
    with asyncio.Runner() as runner:
        desk = Desk(runner)
        yield desk
        desk.close()


# --- forms -----------------------------------------------------------------------------------------------------------

WAV = b"RIFF\0\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x40\x1f\0\0\1\0\x08\0data"
FIELDS = [
    *(
        (b"model", b"m"),
        (b"model", b"renamed"),
        (b"model", b"nobody"),
        (b"prompt", b"a cat"),
        (b"prompt", "é".encode()),
    ),
    *((b"n", b"2"), (b"n", b"10"), (b"n", b"11"), (b"n", b" 3 "), (b"n", b"3.0"), (b"n", b"\xff"), (b"n[]", b"5")),
    *((b"size", b"1024x1024"), (b"stream", b"true"), (b"stream", b"True"), (b"response_format", b"json")),
    *((b"temperature", b"0.5"), (b"language", b"de"), (b"timestamp_granularities[]", b"word"), (b"unknown", b"x")),
]
FILES = [
    *(
        (b'name="file"; filename="a.wav"', WAV + b"\x80" * 900),
        (b'name="image"; filename="a.png"', b"\x89PNG\r\n\x1a\n"),
    ),
    *((b'name="image[]"; filename="b.png"', b"\r\n--edg\r\n"), (b'name="mask"; filename=""', b"")),
    *((b'name="model"; filename="m"', b"m"), (b"name=\"image\"; filename*=utf-8''%e2%82%ac.png", b"x" * 5000)),
    (b'name="file"; filename="a\\"b; name=\\"n\\"\x7f.mp3"', b"ID3" + b"\0" * 20_000),
]
#: Heads that are odd or wrong.
HEADS = [
    *(b'Content-Disposition: form-data; name="n"; name="prompt"', b"Content-Disposition: form-data", b"", b": x"),
    *(b'Content-Disposition: attachment; name="n"', b'content-disposition: FORM-DATA; NAME="n"', b"X: \xff\xfe"),
    *(b'Content-Disposition: form-data; name="n\r\nX: 1"', b'Content-Disposition: form-data; name="\xc3\xa9"'),
    *(b'Content-Disposition: form-data; name="n"\r\nContent-Transfer-Encoding: base64', b"X: " + b"x" * 9000),
    b'Content-Disposition: form-data; name="n"\r\nContent-Encoding: gzip',
    b'Content-Disposition: form-data; name="n"\r\nContent-Type: multipart/mixed; boundary=in',
    b'Content-Disposition: form-data; name="n"\r\nContent-Length: 2',
    b'Content-Disposition: form-data; name="n"\r\nContent-Length: -2',
    b'Content-Disposition: form-data; name="n"\r\nContent-Length: 9999',
    b'Content-Disposition: form-data; name="_charset_"',
]


def part(head: bytes, body: bytes) -> bytes:
    return b"--" + BOUNDARY + b"\r\n" + head + b"\r\n\r\n" + body + b"\r\n"


def field(name: bytes, value: bytes) -> bytes:
    return part(b'Content-Disposition: form-data; name="' + name + b'"', value)


def file(said: bytes, content: bytes) -> bytes:
    return part(b"Content-Disposition: form-data; " + said + b"\r\nContent-Type: audio/x-wav", content)


NESTED = field(b"prompt", b"") + part(
    b'Content-Disposition: form-data; name="n"\r\nContent-Type: multipart/form-data; boundary=in',
    b'--in\r\nContent-Disposition: form-data; name="n"\r\n\r\n9\r\n--in--',
)
END = b"--" + BOUNDARY + b"--\r\n"
GOOD = {
    "/images/edits": [field(b"model", b"m"), field(b"prompt", b"a cat"), file(*FILES[1])],
    "/images/variations": [field(b"model", b"m"), file(*FILES[1])],
    "/audio/transcriptions": [field(b"model", b"m"), file(*FILES[0])],
    "/audio/translations": [file(*FILES[0]), field(b"model", b"m")],
}
PARTS = st.one_of(
    st.builds(field, *(st.shared(st.sampled_from(FIELDS), key="f").map(lambda pair, i=i: pair[i]) for i in (0, 1))),
    st.sampled_from(FIELDS).map(lambda pair: field(*pair)),
    st.sampled_from(FILES).map(lambda pair: file(*pair)),
    st.builds(part, st.sampled_from(HEADS), st.sampled_from([b"2", b"", b"\r\n", b"--edge"]) | st.binary(max_size=9)),
    st.just(NESTED),
    st.just(field(b"user", b"x") * 100),
    st.binary(max_size=20),
)


@st.composite
def forms(draw: st.DrawFn, path: str) -> bytes:
    """A form that is right, a little changed, or one of any parts."""
    parts = list(GOOD[path]) if draw(st.integers(0, 4)) else []
    for more in draw(st.lists(PARTS, max_size=3)):
        parts.insert(draw(st.integers(0, len(parts))), more)
    raw = b"".join(draw(st.permutations(parts))) + END
    if draw(st.integers(0, 2)) == 0:
        place = draw(st.integers(0, len(raw)))
        instead = st.sampled_from([b"\r", b"\n", b"\r\n", b"--edge", b"--edge--", b"\0"]) | st.binary(max_size=3)
        raw = raw[:place] + draw(instead) + raw[place + draw(st.integers(0, 30)) :]
    if draw(st.integers(0, 5)) == 0:
        raw = raw[: draw(st.integers(0, len(raw)))]
    return raw + draw(st.sampled_from([b"", b"", b"behind", b"\r\n" + END, field(b"n", b"9") + END]))


CONTENT_TYPES = st.sampled_from(
    ["multipart/form-data; boundary=edge"] * 9
    + ['multipart/form-data; boundary="edge"', "Multipart/Form-Data; BOUNDARY=edge; charset=x", "multipart/form-data"]
    + ["multipart/form-data; boundary=", "multipart/mixed; boundary=edge", "multipart/form-data; boundary=" + "x" * 71]
    + ["application/json", "multipart/form-data; boundary=\xe9", "multipart/form-data, boundary=edge"]
)


# --- what is shown ---------------------------------------------------------------------------------------------------


@FEW_OR_MANY
@pytest.mark.parametrize("path", PATHS)
def test_a_form_is_refused_or_read_as_the_upstream_will_read_it(
    config: GatewayConfig, desk: Desk, path: str, examples: int
) -> None:
    priced = 0

    @fuzz(examples, forms(path), CONTENT_TYPES, st.integers(1, 3000))
    def check(raw: bytes, content_type: str, step: int) -> None:
        nonlocal priced
        before = open_files()
        form = desk.read(raw, content_type, step)
        if isinstance(form, Failure):
            assert form.status in (400, 413)
        else:
            assert all(not one.content.closed for one in form.files)
            try:
                quote = read_form_quote(config, APIS[path], form)
            except InvalidRequest as refused:
                assert refused.param is None or len(refused.param) < 200
            else:
                if isinstance(quote, Quote):
                    priced += 1
                    model = quote.model.sent_as or quote.model.name
                    check_sent(quote, form, desk.run(sent(form, model)))
            form.close()
        assert open_files() == before

    assert priced  # else this shows nothing


async def sent(form: Form, model: str) -> tuple[str, bytes]:
    """Content type and body of what is forwarded, whose length must be what it says."""
    upload = written(form, model)
    body = b"".join([piece async for piece in upload.chunks()])
    assert len(body) == upload.size_bytes
    assert body == b"".join([piece async for piece in upload.chunks()])  # it may have to be sent again
    return upload.content_type, body


def check_sent(quote: Quote, form: Form, told: tuple[str, bytes]) -> None:
    """Another reader finds the same fields, each as it was priced."""
    content_type, body = told
    parts = BytesParser(policy=policy.HTTP).parsebytes(b"Content-Type: " + content_type.encode() + b"\r\n\r\n" + body)
    texts, files = [], []
    for one in parts.iter_parts():
        name = one.get_param("name", header="content-disposition")
        content: Any = one.get_payload(decode=True)
        if one.get_param("filename", header="content-disposition") is None:
            texts.append((name, content))
        else:
            files.append((name, content))
    model = quote.model.sent_as or quote.model.name
    assert texts == [(name, model.encode() if name == "model" else value.encode()) for name, value in form.fields]
    assert files == [(one.name, content_of(one)) for one in form.files]
    found = dict(texts)
    assert len(found) == len({name for name, _ in texts if not name.endswith("[]")} | set(found))
    if quote.ask.operation == "image_generation":
        assert [images.count for images in quote.bound.units.images] == [int(found.get("n", b"1"))]
    else:
        size = sum(len(content) for _, content in files)
        assert quote.bound.units.audio_ms >= size * 1000 // 2**22  # more than any recording has in a second
    assert quote.ask.stream == (found.get("stream", b"false").strip() == b"true")


def content_of(one: Any) -> bytes:
    one.content.seek(0)
    content: bytes = one.content.read()
    assert len(content) == one.size_bytes
    return content


def open_files() -> int:
    """Files on disk that this process has open."""
    names = (name.readlink() for name in Path("/proc/self/fd").iterdir() if name.is_symlink())
    return sum(str(name).endswith("(deleted)") for name in names)


@pytest.mark.parametrize("count", [MAX_PARTS + 1, 10_000])
def test_a_form_of_many_parts_is_refused_early(desk: Desk, count: int) -> None:
    before = open_files()
    raw = (file(*FILES[3]) * count)[: MOST_BYTES * 4] + END
    failure = desk.read(raw, "multipart/form-data; boundary=edge", 2**14)
    assert isinstance(failure, Failure)
    assert failure.status in (400, 413)
    assert open_files() == before


@pytest.mark.parametrize("extra", [0, 1])
def test_a_form_may_be_as_large_as_the_limit(desk: Desk, extra: int) -> None:
    around = len(file(b'name="file"; filename="a"', b"") + END)
    raw = file(b'name="file"; filename="a"', b"x" * (MOST_BYTES - around + extra)) + END
    form = desk.read(raw, "multipart/form-data; boundary=edge", 2**14)
    assert isinstance(form, Failure) == bool(extra)
    if isinstance(form, Form):
        form.close()
