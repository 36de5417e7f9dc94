"""A form's fields as endpoints see them."""

import io
from typing import Any

import pytest

from gateway.apis.form import File, Form, files_of
from gateway.domain.request import InvalidRequest


def file(name: str) -> File:
    return File(name, "a.png", "image/png", 3, b"abc", io.BytesIO(b"abc"))


def document(*fields: tuple[str, str], files: tuple[File, ...] = (), typed: set[str] | None = None) -> dict[str, Any]:
    return Form(fields, files, "").document(typed or set())


def test_fields_are_texts_unless_they_are_typed() -> None:
    fields = [("model", "m"), ("n", "3"), ("stream", "true"), ("temperature", "0.5"), ("user", "7")]
    read = document(*fields, typed={"n", "stream", "temperature"})
    assert read == {"model": "m", "n": 3, "stream": True, "temperature": 0.5, "user": "7"}
    assert type(read["stream"]) is bool


@pytest.mark.parametrize("value", ["", " ", "x", "null", "[1]", "{}", '"1"', "01", "1 2", "True", "NaN", "0x10"])
def test_a_typed_field_that_is_neither_a_number_nor_true_or_false_is_refused(value: str) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        document(("n", value), typed={"n"})
    assert refusal.value.param == "n"


def test_names_with_brackets_are_parts_of_one_field() -> None:
    words = [("include[]", "a"), ("include[]", "b"), ("chunking[type]", "x"), ("chunking[size]", "5")]
    assert document(*words) == {"include": ["a", "b"], "chunking": ["x", "5"]}


@pytest.mark.parametrize(
    "fields",
    [[("n", "1"), ("n", "1")], [("n", "1"), ("n[]", "2")], [("n[]", "1"), ("n", "2")], [("n[x]", "1"), ("n", "2")]],
)
def test_a_field_that_is_given_twice_is_refused(fields: list[tuple[str, str]]) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        document(*fields)
    assert refusal.value.param == "n"


@pytest.mark.parametrize("written", ["image", "image[]", "image[0]"])
@pytest.mark.parametrize("text", [("image", "x"), ("image[]", "x")])
def test_a_field_is_either_a_text_or_a_file(written: str, text: tuple[str, str]) -> None:
    with pytest.raises(InvalidRequest) as refusal:
        document(text, files=(file(written),))
    assert refusal.value.param == "image"


def test_files_of_a_field_come_together_in_order() -> None:
    files = file("image"), file("image[]"), file("mask"), file("image[]")
    read = document(files=files)
    assert read["image"] == [files[0], files[1], files[3]]
    assert files_of(read, "image", 3) == read["image"]
    assert files_of(read, "mask", 1) == [files[2]]
    assert files_of(read, "nothing", 1) == []
    with pytest.raises(InvalidRequest, match="at most 2"):
        files_of(read, "image", 2)
    with pytest.raises(InvalidRequest, match="must be a file"):
        files_of({"image": "x"}, "image", 1)
    with pytest.raises(InvalidRequest, match="must be a file"):
        files_of({"image": ["x"]}, "image", 1)


def test_closing_it_closes_its_files() -> None:
    files = file("a"), file("b")
    Form((), files, "").close()
    assert all(one.content.closed for one in files)
