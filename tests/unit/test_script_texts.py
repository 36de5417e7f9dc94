"""What the store is given to run: every call of a script defines anew all the functions in its text."""

import re

import pytest

from gateway.credits.store import SCRIPTS, load_script


def _functions(text: str, indented: str) -> list[str]:
    return re.findall(rf"^{indented}local function (\w+)", text, re.MULTILINE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_has_only_the_functions_that_it_calls(name: str) -> None:
    code = re.sub(r"--.*", "", load_script(name).text)
    functions = _functions(code, " *")
    # change_windows is there twice: on demand, and in itself.
    assert len(set(functions)) >= len(functions) - 1
    assert [function for function in functions if len(re.findall(rf"\b{function}\b", code)) < 2] == []


@pytest.mark.parametrize("name", ["reserve", "settle", "extend", "show"])
def test_what_only_a_refresh_needs_is_defined_by_a_refresh_alone(name: str) -> None:
    text = load_script(name).text
    needed = {"day_of_month", "window_at", "new_window", "next_window", "first_window", "close_window", "read_windows"}
    assert needed.isdisjoint(_functions(text, ""))
    assert needed <= set(_functions(text, "  "))
