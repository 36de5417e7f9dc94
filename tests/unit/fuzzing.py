"""What the fuzzing tests share: JSON of any kind, documents that were tampered with, and how often to try."""

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Json: TypeAlias = Any

#: For a test's ``examples``: a hundred always, more than a thousand among the long ones.
FEW_OR_MANY = pytest.mark.parametrize(
    "examples", [120, pytest.param(1_500, marks=[pytest.mark.long, pytest.mark.timeout(3600)])]
)

_WORDS = (
    "auto text function custom user system tool m other 5m 1h enabled disabled image_url input_image image input_text "
    "tool_result tool_use message thinking high default https://example.com/a.png data:image/png;base64,AAAA"
).split()
#: Deeper than is written, though not than is read.
DEEP: Json = None
for _ in range(300):
    DEEP = {"a": DEEP}
ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, 2, -1, 16, 128, 129, 1000, 10**9, 10**9 + 1, 2**53 + 1, 2**63, 2**64 - 1, 1.0, 0.5, 1e300]),
    st.sampled_from(["", *_WORDS, DEEP]),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)
JSON = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "content", "url", "x", "n"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def fuzz(examples: int, *strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    """Run what it decorates with so many examples of the strategies, now."""

    def run(check: Callable[..., None]) -> None:
        quiet = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
        # The same each time: what fails shall not fail by chance.
        settings(max_examples=examples, derandomize=True, suppress_health_check=quiet)(given(*strategies)(check))()

    return run


@st.composite
def tampered(draw: st.DrawFn, bases: st.SearchStrategy[Json], names: tuple[str, ...] = (), most: int = 4) -> Json:
    """One of the bases, a few of its places changed. names: keys that an object may get besides its own."""
    document = copy.deepcopy(draw(bases))
    for _ in range(draw(st.integers(0, most))):
        document = _change(draw, document, names)
    return document


def _change(draw: st.DrawFn, document: Json, names: tuple[str, ...]) -> Json:
    """The document with one change at a place some way down."""
    if isinstance(document, dict) and document and draw(st.integers(0, 3)):
        name = draw(st.sampled_from(sorted(document)))
        return {**document, name: _change(draw, document[name], names)}
    if isinstance(document, list) and document and draw(st.integers(0, 3)):
        place = draw(st.integers(0, len(document) - 1))
        return [*document[:place], _change(draw, document[place], names), *document[place + 1 :]]
    if isinstance(document, dict):
        if document and draw(st.booleans()):
            return {name: value for name, value in document.items() if name != draw(st.sampled_from(sorted(document)))}
        known = st.sampled_from(names) if names else st.sampled_from(["type", "content"])
        return {**document, draw(known | st.text(max_size=4)): draw(JSON)}
    if isinstance(document, list) and draw(st.booleans()):
        return [*document, *([draw(st.sampled_from(document))] if document else []), draw(JSON)]
    return draw(JSON)
