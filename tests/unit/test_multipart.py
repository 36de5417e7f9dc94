"""Forms on their way in, and written anew for the upstream."""

import asyncio
import email
import email.policy
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest
from aiohttp import StreamReader, web
from aiohttp.base_protocol import BaseProtocol
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from gateway.apis.form import HEAD_BYTES, Form
from gateway.http import multipart
from gateway.http.errors import Failure
from gateway.http.multipart import UPLOADS_AT_ONCE, UploadRoom, read_form, written

# Warned of in a process of its own, whose filters the module sets; a test's are others.
pytestmark = pytest.mark.filterwarnings(
    "ignore::aiohttp.BadContentDispositionHeader", "ignore::aiohttp.BadContentDispositionParam"
)

MOST = 4 * 2**20
MARK = "a-mark"


class Connection(BaseProtocol):
    """One that stays open, and has no need to be told to wait."""

    connected = True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self, resume_parser: bool = True) -> None:
        pass


class Request:
    """What ``read_form`` takes of a request, whose body has come already."""

    def __init__(self, body: bytes, content_type: str, pieces: int, told: bool) -> None:
        loop = asyncio.get_running_loop()
        self.headers = CIMultiDict({"Content-Type": content_type})
        self.content_length = len(body) if told else None
        self.writer = AsyncMock()
        self.content = StreamReader(Connection(loop), 2**16, loop=loop)
        for start in range(0, len(body), pieces):
            self.content.feed_data(body[start : start + pieces])
        self.content.feed_eof()


async def read(
    body: bytes, content_type: str = f"multipart/form-data; boundary={MARK}", *, most: int = MOST, pieces: int = 2**16,
    told: bool = False, room: UploadRoom | None = None,
) -> Form | Failure:  # fmt: skip
    request = cast(web.BaseRequest, Request(body, content_type, pieces, told))
    return await read_form(request, most, room or UploadRoom())


async def form_of(body: bytes, **options: Any) -> Form:
    form = await read(body, **options)
    assert isinstance(form, Form), form
    return form


def part(disposition: str, content: bytes = b"x", *headers: str) -> bytes:
    lines = [f"--{MARK}", f"Content-Disposition: form-data; {disposition}", *headers, "", ""]
    return "\r\n".join(lines).encode(errors="surrogateescape") + content + b"\r\n"


END = f"--{MARK}--\r\n".encode()


async def everything(form: Form, model: str = "m") -> tuple[bytes, str, int]:
    """The form as it is sent: its bytes, its content type, and how many bytes are told beforehand."""
    upload = written(form, model)
    assert upload.size_bytes is not None
    return b"".join([chunk async for chunk in upload.chunks()]), upload.content_type, upload.size_bytes


def parsed(body: bytes, content_type: str) -> list[tuple[str, str | None, str, bytes]]:
    """The parts as Python's parser of mail understands them: name, filename, content type, content."""
    head = f"Content-Type: {content_type}\r\nMIME-Version: 1.0\r\n\r\n".encode()
    message = email.message_from_bytes(head + body, policy=email.policy.HTTP)
    parts = []
    for one in message.iter_parts():
        words = dict(one["Content-Disposition"].params)
        content = cast(bytes, one.get_payload(decode=True))
        parts.append((words["name"], words.get("filename"), one.get_content_type(), content))
    return parts


async def test_no_more_forms_are_put_aside_than_there_is_room_for() -> None:
    room, largest = UploadRoom(), 1000
    body = part('name="file"; filename="a"', b"x" * (largest - 200)) + END
    forms = []
    while isinstance(form := await read(body, most=largest, room=room), Form):
        forms.append(form)
    assert len(forms) == UPLOADS_AT_ONCE * largest // (largest - 200)
    assert (form.status, form.code) == (503, "upload_not_possible")
    forms.pop().close()
    again = await form_of(body, most=largest, room=room)
    assert isinstance(await read(body, most=largest, room=room), Failure)
    for one in (*forms, again):
        one.close()
    (await form_of(body, most=largest, room=room)).close()


# --- in --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [1, 7, 64, 2**16])
async def test_fields_and_files_are_told_apart(pieces: int) -> None:
    sound = bytes(range(256)) * 64
    body = part('name="model"', "größe".encode()) + part(
        'name="file"; filename="a.mp3"', sound, "Content-Type: audio/mpeg"
    )
    form = await form_of(body + part("name=n", b"") + END, pieces=pieces)
    assert form.fields == (("model", "größe"), ("n", ""))
    (file,) = form.files
    assert (file.name, file.filename, file.content_type, file.size_bytes) == ("file", "a.mp3", "audio/mpeg", len(sound))
    assert file.head == sound[:HEAD_BYTES]
    file.content.seek(0)
    assert file.content.read() == sound
    form.close()
    assert file.content.closed


@pytest.mark.parametrize(
    "content",
    [b"", b"\r\n", b"\r\n\r\n", b"--", b"\r\n--a-mar", b"\r\n--A-MARK\r\n", b"\n--a-mark\n", b"\x00" * 99],
    ids=range(8),
)  # fmt: skip
async def test_a_file_may_hold_what_looks_like_the_forms_own(content: bytes) -> None:
    form = await form_of(part('name="file"; filename="a"', content) + part('name="model"') + END)
    form.files[0].content.seek(0)
    assert form.files[0].content.read() == content
    assert form.fields == (("model", "x"),)
    form.close()


BROKEN = {
    "empty": b"",
    "no form": b"hello",
    "no end": part('name="a"'),
    "end in a head": f"--{MARK}\r\nContent-Disp".encode(),
    "no name": part("filename=a") + END,
    "empty name": part('name=""') + END,
    "blank in the name": part('name="a b"') + END,
    "sign in the name": part('name="a\x01"') + END,
    "name of bytes": part('name="\udcff"') + END,
    "name that is hidden": part("name*=utf-8''a%0d%0ab") + END,
    "long name": part(f'name="{"a" * 65}"') + END,
    "name twice": part('name="a"; name="b"') + END,
    "no disposition": f"--{MARK}\r\nContent-Type: text/plain\r\n\r\nx\r\n".encode() + END,
    "brackets that do not close": part('name="a["') + END,
    "base64": part('name="a"', b"eA==", "Content-Transfer-Encoding: base64") + END,
    "quoted": part('name="a"', b"x", "Content-Transfer-Encoding: quoted-printable") + END,
    "gzip": part('name="a"', b"x", "Content-Encoding: gzip") + END,
    "form in a form": part('name="a"', b"--b\r\n\r\nx\r\n--b--", "Content-Type: multipart/mixed; boundary=b") + END,
    "form without boundary": part('name="a"', b"x", "Content-Type: multipart/mixed") + END,
    "no text": part('name="a"', b"\xff") + END,
    "many parts": part('name="a"') * 65 + END,
    "10k parts": part('name="a"') * 10_000 + END,
    "giant header": part('name="a"', b"x", "X: " + "x" * 20_000) + END,
    "many headers": part('name="a"', b"x", *["X: y"] * 300) + END,
    "much text": part('name="a"', b"x" * (2**20 + 1)) + END,
    "text in many parts": part('name="a"', b"x" * 2**19) * 3 + END,
    "lines before it": b"\r\n" * 10_000 + part('name="a"') + END,
    "charset": part('name="_charset_"', b"utf-8") + part('name="a"') + END,
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("pieces", [13, 2**16])
async def test_a_broken_form_is_refused(name: str, pieces: int) -> None:
    failure = await read(BROKEN[name], pieces=pieces)
    assert isinstance(failure, Failure)
    assert (failure.status, failure.code) == (400, "invalid_body")
    failure.body("req_1")


@pytest.mark.parametrize(
    "content_type",
    ["", "text/plain", "application/json", "multipart/mixed; boundary=a-mark", "multipart/form-data",
     "multipart/form-data; boundary", f"multipart/form-data; boundary={'x' * 71}", "multipart/form-data; \udcff"],
)  # fmt: skip
async def test_what_has_no_boundary_is_no_form(content_type: str) -> None:
    failure = await read(part('name="a"') + END, content_type)
    assert isinstance(failure, Failure)
    assert (failure.status, failure.code) == (400, "invalid_body")
    failure.body("req_1")


@pytest.mark.parametrize(
    "body",
    [
        part('name="file"; filename="a"', bytes(2000)) + END,
        part('name="a"', bytes(2000)) + END,
        part('name="a"') + END + bytes(2000),
        b"x" * 990 + b"\r\n" * 10 + part('name="a"') + END,
        part('name="a"', b"x", "X: " + "y" * 1000) + END,
    ],
    ids=["file", "text", "behind", "before", "header"],
)
@pytest.mark.parametrize("told", [False, True])
async def test_the_limit_is_the_whole_bodys_wherever_in_it_the_bytes_are(body: bytes, told: bool) -> None:
    failure = await read(body, most=1000, told=told)
    assert isinstance(failure, Failure)
    assert failure.status == 413
    (await form_of(body, most=len(body))).close()


async def test_no_file_stays_open_where_the_form_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Any] = []
    original = multipart.tempfile.TemporaryFile

    def counted() -> Any:
        opened.append(original())
        return opened[-1]

    monkeypatch.setattr(multipart.tempfile, "TemporaryFile", counted)
    whole = part('name="a"; filename="a"', bytes(3000))
    for rest in (b"", part('name=""') + END, whole[:900], whole + BROKEN["no text"]):
        assert isinstance(await read(whole + rest, pieces=100), Failure)
    assert isinstance(await read(whole + whole + END, most=4000), Failure)
    assert len(opened) >= 7
    assert all(file.closed for file in opened)


async def test_a_full_disk_is_not_the_clients_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(multipart.tempfile, "TemporaryFile", full)
    failure = await read(part('name="a"; filename="a"') + END)
    assert isinstance(failure, Failure)
    assert (failure.status, failure.code) == (503, "upload_not_possible")


async def test_who_is_too_slow_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "UPLOAD_S", 0.01)
    request = Request(part('name="a"'), f"multipart/form-data; boundary={MARK}", 100, told=False)
    loop = asyncio.get_running_loop()
    request.content = StreamReader(Connection(loop), 2**16, loop=loop)
    request.content.feed_data(part('name="a"; filename="a"')[:-9])
    failure = await read_form(cast(web.BaseRequest, request), MOST, UploadRoom())
    assert isinstance(failure, Failure)
    assert failure.status == 408


@given(st.binary(max_size=400), st.integers(1, 60))
async def test_whatever_comes_is_a_form_or_refused(noise: bytes, pieces: int) -> None:
    for body in (noise, part('name="a"') + noise, part('name="a"; filename="b"', noise) + END, part('name="a"', noise)):
        read_as = await read(body, pieces=pieces)
        if isinstance(read_as, Form):
            await everything(read_as)
            read_as.close()
        else:
            assert read_as.status == 400
            read_as.body("req_1")


async def test_forms_that_differ_have_other_digests() -> None:
    bodies = [
        part('name="a"', b"x"), part('name="a"', b"y"), part('name="b"', b"x"), part('name="a"; filename="f"', b"x"),
        part('name="a"; filename="g"', b"x"), part('name="a"; filename="f"', b"y"),
    ]  # fmt: skip
    forms = [await form_of(body + END) for body in (*bodies, *bodies)]
    digests = [form.digest for form in forms]
    assert len(set(digests)) == len(bodies)
    assert digests[: len(bodies)] == digests[len(bodies) :]
    for form in forms:
        form.close()


# --- out -------------------------------------------------------------------------------------------------------------

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,9}(\[[a-z0-9]{0,3}\])?", fullmatch=True)
FILENAMES = st.text(
    alphabet=st.characters(exclude_characters='"\\\r\n;=\x00', exclude_categories=["Cs", "Cc"]), max_size=20
)


@given(
    fields=st.lists(
        st.tuples(NAMES, st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=50)), max_size=4
    ),
    files=st.lists(st.tuples(NAMES, st.binary(max_size=2000)), max_size=4),
)
async def test_what_is_written_means_the_same_as_what_was_read(
    fields: list[tuple[str, str]], files: list[tuple[str, bytes]]
) -> None:
    body = b"".join(part(f'name="{name}"', value.encode()) for name, value in fields)
    body += b"".join(
        part(f'name="{name}"; filename="{number}.bin"', content, "Content-Type: audio/wav")
        for number, (name, content) in enumerate(files)
    )
    if f"--{MARK}" in body.decode(errors="replace").replace(f"--{MARK}\r\n", ""):
        return
    form = await form_of(body + END)
    sent, content_type, size = await everything(form, "the/real-one")
    assert len(sent) == size
    again = await form_of(sent, content_type=content_type)
    assert again.fields == tuple((name, "the/real-one" if name == "model" else value) for name, value in form.fields)
    assert [file.name for file in again.files] == [name for name, _ in files]
    for file, (_, content) in zip(again.files, files, strict=True):
        file.content.seek(0)
        assert (file.content.read(), file.content_type) == (content, "audio/wav")
    form.close()
    again.close()


async def test_it_parses_as_mail_does() -> None:
    body = part('name="model"', b"m") + part('name="prompt"', b"two\r\nlines") + part('name="include[]"', b"a")
    body += part('name="image[]"; filename="a b.png"', b"\x89PNG\r\n\x00", "Content-Type: image/png")
    form = await form_of(body + END)
    sent, content_type, _ = await everything(form, "the/real-one")
    assert parsed(sent, content_type) == [
        ("model", None, "text/plain", b"the/real-one"),
        ("prompt", None, "text/plain", b"two\r\nlines"),
        ("include[]", None, "text/plain", b"a"),
        ("image[]", "a b.png", "image/png", b"\x89PNG\r\n\x00"),
    ]
    assert await everything(form) != await everything(form)  # a boundary of its own, each time
    form.close()


@pytest.mark.parametrize(
    ("disposition", "filename"),
    [('filename="a\\"b"', "a_b"), ("filename*=utf-8''a%0D%0AX%3A%20y", "a__X: y"),
     ("filename*=unicode_escape''%5Cud800x", "_x"), ('filename="\udcff.mp3"', "_.mp3"),
     (f'filename="{"x" * 999}"', "x" * 255), ('filename=""', ""), ("filename*=utf-16''%ff%feA%00", "A")],
    ids=range(7),
)  # fmt: skip
async def test_a_filename_stays_within_its_quotes(disposition: str, filename: str) -> None:
    form = await form_of(part(f'name="file"; {disposition}', b"abc") + END)
    sent, _, _ = await everything(form)
    lines = sent.split(b"\r\n")
    assert lines[1] == f'Content-Disposition: form-data; name="file"; filename="{filename}"'.encode()
    assert lines[2:5] == [b"Content-Type: application/octet-stream", b"", b"abc"]
    form.close()


@pytest.mark.parametrize(
    ("content_type", "sent_as"),
    [
        ("audio/wav", "audio/wav"),
        ("audio/ogg; codecs=opus", "audio/ogg; codecs=opus"),
        ("", "application/octet-stream"),
        ("audio", "application/octet-stream"),
        ("a/b\x01", "application/octet-stream"),
        ("a/\udcff", "application/octet-stream"),
        ('a/b; x="y"', "application/octet-stream"),
        ("a/" + "b" * 99, "application/octet-stream"),
    ],
    ids=range(8),
)
async def test_a_content_type_is_one_or_none(content_type: str, sent_as: str) -> None:
    form = await read(part('name="file"; filename="a"', b"abc", f"Content-Type: {content_type}") + END)
    if isinstance(form, Failure):
        assert form.status == 400
        return
    assert form.files[0].content_type == sent_as
    form.close()
