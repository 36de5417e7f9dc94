"""What the store is given to run: every call of a script defines anew all the functions in its text."""

import re

import pytest

from gateway.credits.store import SCRIPTS, load_script


def _functions(text: str, indented: str) -> list[str]:
    return re.findall(rf"^{indented}local function (\w+)", text, re.MULTILINE)


def _blocks(text: str) -> list[str]:
    """Each of its functions, with those that are inside."""
    return re.findall(r"^local function .*?^end$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_only_the_functions_that_it_calls(name: str) -> None:
    code = re.sub(r"--.*", "", load_script(name).text)
    for block in _blocks(code):  # what is inside of one may be inside of another, too
        functions = _functions(block, " *")
        assert len(set(functions)) == len(functions)
        inner = _functions(block, "  ")
        assert [function for function in inner if len(re.findall(rf"\b{function}\b", block)) < 2] == []
    outer = _functions(code, "")
    assert len(set(outer)) == len(outer)
    assert [function for function in outer if len(re.findall(rf"\b{function}\b", code)) < 2] == []


@pytest.mark.parametrize("name", ["reserve", "settle", "extend", "show"])
def test_what_only_a_refresh_needs_is_defined_by_a_refresh_alone(name: str) -> None:
    text = load_script(name).text
    needed = {"day_of_month", "window_at", "new_window", "next_window", "first_window", "close_window", "read_windows"}
    assert needed.isdisjoint(_functions(text, ""))
    assert needed <= set(_functions(text, "  "))


def test_what_only_a_repeat_needs_is_defined_by_a_repeat_alone() -> None:
    text = load_script("reserve").text
    needed = {"read_record", "read_parts", "parts_sum"}
    assert needed.isdisjoint(_functions(text, ""))
    assert needed <= set(_functions(text, "  "))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_its_constants_where_they_are_used(name: str) -> None:
    code = re.sub(r"--.*", "", load_script(name).text.partition("]]")[2])
    assert re.findall(r"\b(?:[A-Z]+_MS|MAX_NANO|PPM)\b", code) == []
