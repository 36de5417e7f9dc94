"""The pictures of the demo model, asked for by the real OpenAI client and decoded."""

import base64
from typing import Any

import aiohttp
import openai
import pytest

from gateway.demo.upstream import DemoUpstream
from gateway.demo.words import split_tokens
from tests.integration.demo.conftest import MODEL
from tests.integration.demo.pictures import Picture, decoded

PROMPT = "A lighthouse at noon"


def picture_of(image: Any) -> Picture:
    return decoded(base64.b64decode(image.b64_json))


async def test_pictures_have_the_size_asked_for_and_colours_of_their_own(client: openai.AsyncOpenAI) -> None:
    answer = await client.images.generate(model=MODEL, prompt=PROMPT, n=2, size="1024x1536", quality="high")
    first, second = map(picture_of, answer.data or [])
    assert (first.width, first.height) == (second.width, second.height) == (1024, 1536)
    assert len(first.colours) == 1 and first.colours != second.colours
    assert (answer.size, answer.quality, answer.output_format, answer.background) == (
        "1024x1536",
        "high",
        "png",
        "opaque",
    )
    again = await client.images.generate(model=MODEL, prompt=PROMPT, size="1024x1536")
    other = await client.images.generate(model=MODEL, prompt="A lighthouse at night")
    assert picture_of(again.data[0]) == first
    assert picture_of(other.data[0]).colours != first.colours


async def test_usage_grows_with_number_size_and_quality(client: openai.AsyncOpenAI) -> None:
    small = await client.images.generate(model=MODEL, prompt=PROMPT, size="1024x1024", quality="low")
    large = await client.images.generate(model=MODEL, prompt=PROMPT, size="1024x1536", quality="high", n=2)
    assert small.usage is not None and large.usage is not None
    assert (small.usage.output_tokens, large.usage.output_tokens) == (272, 2 * 6240)
    assert small.usage.input_tokens == small.usage.input_tokens_details.text_tokens == len(split_tokens(PROMPT))
    assert large.usage.total_tokens == large.usage.input_tokens + large.usage.output_tokens


async def test_a_picture_can_come_as_a_url_and_be_transparent(client: openai.AsyncOpenAI) -> None:
    answer = await client.images.generate(
        model=MODEL, prompt=PROMPT, size="256x256", response_format="url", background="transparent"
    )
    head, _, data = str(answer.data[0].url).partition(",")
    assert head == "data:image/png;base64"
    assert decoded(base64.b64decode(data)).transparent
    assert answer.background == "transparent"


async def test_a_stream_ends_in_the_picture_and_its_usage(client: openai.AsyncOpenAI) -> None:
    whole = await client.images.generate(model=MODEL, prompt=PROMPT)
    stream = await client.images.generate(model=MODEL, prompt=PROMPT, stream=True, partial_images=2)
    *partial, last = [event async for event in stream]
    assert [event.type for event in partial] == ["image_generation.partial_image"] * 2
    assert [event.partial_image_index for event in partial] == [0, 1]
    assert last.type == "image_generation.completed"
    assert picture_of(last) == picture_of(whole.data[0])
    assert whole.usage is not None
    assert last.usage.output_tokens == whole.usage.output_tokens + 200
    assert last.usage.total_tokens == last.usage.input_tokens + last.usage.output_tokens


async def test_edits_count_the_pictures_that_they_are_given(client: openai.AsyncOpenAI) -> None:
    one = await client.images.edit(model=MODEL, prompt=PROMPT, image=b"one", size="512x512")
    more = await client.images.edit(model=MODEL, prompt=PROMPT, image=[b"one", b"two"], mask=b"mask", n=2)
    assert one.usage is not None and more.usage is not None
    assert (picture_of(one.data[0]).width, len(more.data)) == (512, 2)
    assert picture_of(one.data[0]).colours != picture_of(more.data[0]).colours
    assert more.usage.input_tokens_details.image_tokens == 3 * one.usage.input_tokens_details.image_tokens > 0
    assert one.usage.input_tokens_details.text_tokens == len(split_tokens(PROMPT))


async def test_edits_can_be_streamed(client: openai.AsyncOpenAI) -> None:
    stream = await client.images.edit(model=MODEL, prompt=PROMPT, image=b"one", stream=True, partial_images=1)
    kinds = [event.type async for event in stream]
    assert kinds == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.filterwarnings("ignore:deprecated:DeprecationWarning")  # the client's word on this endpoint
async def test_variations_need_no_prompt(client: openai.AsyncOpenAI) -> None:
    answer = await client.images.create_variation(model=MODEL, image=b"one", n=3, size="256x256")
    assert len({tuple(picture_of(image).colours) for image in answer.data}) == 3
    assert answer.usage is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"n": 9}, "n"),
        ({"n": 2, "stream": True}, "n"),
        ({"size": "big"}, "size"),
        ({"size": "5000x100"}, "size"),
        ({"quality": "best"}, "quality"),
        ({"output_format": "webp"}, "output_format"),
        ({"partial_images": 4}, "partial_images"),
    ],
)
async def test_what_it_cannot_draw_is_refused_by_name(
    client: openai.AsyncOpenAI, fields: dict[str, object], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.images.generate(model=MODEL, prompt=PROMPT, extra_body=fields)
    assert refused.value.param == param


async def test_a_form_without_a_picture_is_refused(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.images.edit(model=MODEL, prompt=PROMPT, image=[])
    assert refused.value.param == "image"
    with pytest.raises(openai.BadRequestError) as too_many:
        await client.images.edit(model=MODEL, prompt=PROMPT, image=[b"one"] * 17)
    assert too_many.value.param == "image"


FORM = "multipart/form-data; boundary=line"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"--line--"),
        (FORM, b""),
        (FORM, b"no form at all"),
        (FORM, b'--line\r\nContent-Disposition: form-data; name="model"\r\n\r\norg/demo'),
        (FORM, b'--line\r\nContent-Disposition: form-data; name="model"\r\n\r\n\xff\r\n--line--\r\n'),
        (FORM, b'--line\r\nContent-Disposition: form-data; name="\xe5"\r\n\r\n\xe5\r\n--line--\r\n'),
        (FORM, b"--line\r\nX\r\n\r\norg\r\n--line--\r\n"),
        (FORM, b"--line\r\nContent-Disposition: form-data\r\n\r\norg\r\n--line--\r\n"),
        (FORM, b"--line\r\nContent-Type: multipart/mixed; boundary=in\r\n\r\n--in\r\n\r\n\r\n--in--\r\n--line--\r\n"),
        (FORM, b'--line\r\nContent-Disposition: form-data; name="n"\r\n\r\n1\r\n' * 65 + b"--line--\r\n"),
    ],
)
async def test_what_is_no_form_is_refused(upstream: DemoUpstream, content_type: str, body: bytes) -> None:
    async with (
        aiohttp.ClientSession() as session,
        session.post(
            f"{upstream.base_url}/images/edits", data=body, headers={"Content-Type": content_type}
        ) as response,
    ):
        assert response.status == 400
        assert (await response.json())["error"]["type"] == "invalid_request_error"
