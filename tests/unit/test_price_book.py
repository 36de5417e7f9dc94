"""What an import changes in models.yaml, to the character, and when it changes nothing."""

import os
import stat
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config.load import load
from gateway.config.problem import ConfigError
from gateway.pricebook.book import BookError, open_book, replace
from gateway.pricebook.difference import Difference, difference
from gateway.pricebook.editing import edited
from gateway.pricebook.offer import Offer, Place, Refused
from gateway.pricebook.report import text
from gateway.pricebook.sources import Source

GATEWAY = """\
upstreams:
  local: {base_url: "http://127.0.0.1:8000/v1"}
  other: {base_url: "http://127.0.0.1:8001/v1"}
plans: {standard: {default: true}}
models: models.yaml
"""
MODELS = """\
# What we sell.
price_unit: usd_per_million_tokens   # required

models:
  # The large one.
  large:
      upstream: local               # indented by six
      input_token_price:   0.10     # was 0.20
      output_token_price: "0.40"
      context_window: 32768
      max_output_tokens: 4096

  flow:  {upstream: local, input_token_price: 1, output_token_price: 2, context_window: 100, max_output_tokens: 10} # f

  third: {upstream: local, second_price: 0.001}
# The end.
"""
MILLION = Decimal("1e-6")


def write(directory: Path, models: str = MODELS, gateway: str = GATEWAY) -> Path:
    """The configuration's files; the path of the main one."""
    (directory / "models.yaml").write_bytes(models.encode())
    (directory / "gateway.yaml").write_bytes(gateway.encode())
    return directory / "gateway.yaml"


def offer(figures: Mapping[Place, str], **fields: bool) -> Offer:
    """An offer with token prices as they are written per million."""
    tokens = ("_token_price", "character_price")
    return Offer(
        {
            place: Decimal(figure) * (MILLION if str(place[-1]).endswith(tokens) else 1)
            for place, figure in figures.items()
        },
        **fields,  # type: ignore[arg-type]
    )


def compare(
    config: Path, offers: Mapping[str, Offer | Refused], *only: str, upstream: str | None = "local", add: bool = False
) -> Difference:
    return difference(open_book(config), Source("the test", upstream, offers), only, add=add)


def result(config: Path, offers: Mapping[str, Offer | Refused], *, add: bool = False) -> str:
    """The new text of the models' file, as it is written."""
    found = compare(config, offers, add=add)
    assert not found.refused
    replace(found.book, edited(found.book, found.changed))
    return found.book.file.read_bytes().decode()


def swapped(text: str, *pairs: tuple[str, str]) -> str:
    """The text with each first part, which is in it once, in the place of the second."""
    for old, new in pairs:
        assert text.count(old) == 1
        text = text.replace(old, new)
    return text


# --- the text ---------------------------------------------------------------------------------------------------------


def test_only_the_figures_that_differ_are_written_anew(tmp_path: Path) -> None:
    offers = {
        "large": offer(
            {("input_token_price",): "0.35", ("output_token_price",): "0.4", ("max_output_tokens",): "8192"}
        ),
        "flow": offer({("input_token_price",): "1", ("output_token_price",): "2.5"}),
        "third": offer({("second_price",): "0.0001"}),
    }
    assert result(write(tmp_path), offers) == swapped(
        MODELS,
        ("  0.10     # was 0.20", "  0.35     # was 0.20"),
        ("max_output_tokens: 4096", "max_output_tokens: 8192"),
        ("output_token_price: 2,", "output_token_price: 2.5,"),
        ("second_price: 0.001", "second_price: 0.0001"),
    )


def test_quotes_stay(tmp_path: Path) -> None:
    written = result(write(tmp_path), {"large": offer({("output_token_price",): "0.5"})})
    assert written == swapped(MODELS, ('"0.40"', '"0.5"'))


def test_a_new_price_comes_behind_those_of_its_kind(tmp_path: Path) -> None:
    new = offer({("cache_read_token_price",): "0.01", ("tiers", 1000, "input_token_price"): "0.2"})
    assert result(write(tmp_path), {"large": new, "flow": new}) == swapped(
        MODELS,
        (
            'output_token_price: "0.40"\n',
            'output_token_price: "0.40"\n'
            "      cache_read_token_price: 0.01\n"
            "      tiers:\n"
            "        - {above_input_tokens: 1000, input_token_price: 0.2}\n",
        ),
        (
            "output_token_price: 2,",
            "output_token_price: 2, cache_read_token_price: 0.01, "
            "tiers: [{above_input_tokens: 1000, input_token_price: 0.2}],",
        ),
    )


def test_windows_line_ends_a_byte_order_mark_and_a_missing_last_newline_stay(tmp_path: Path) -> None:
    config = write(tmp_path)
    before = "\ufeff" + MODELS.split("\n\n  flow", maxsplit=1)[0].replace("\n", "\r\n")
    (tmp_path / "models.yaml").write_bytes(before.encode())
    new = offer({("input_token_price",): "0.35", ("request_price",): "0.01"})
    after = result(config, {"large": new})
    assert after == swapped(before, ("0.10", "0.35"), ('"0.40"\r\n', '"0.40"\r\n      request_price: 0.01\r\n'))
    assert load(config, {}).models["large"].prices.request_femto == 10**13


IMAGES = """\
price_unit: usd_per_token
models:
  block:
    upstream: local
    image_prices:
      1024x1024: 0.04   # square
      "*/high": 0.25
    # below
  flow: {upstream: local, image_prices: {1024x1024: 0.04, "*": 1}}
"""


def test_prices_of_images_are_changed_one_by_one(tmp_path: Path) -> None:
    new = offer({("image_prices", "1024x1024"): "0.05", ("image_prices", "*/low"): "0.01"})
    assert result(write(tmp_path, IMAGES), {"block": new, "flow": new}) == swapped(
        IMAGES,
        ("0.04   # square", "0.05   # square"),
        ('"*/high": 0.25\n', '"*/high": 0.25\n      "*/low": 0.01\n'),
        ('0.04, "*": 1}', '0.05, "*": 1, "*/low": 0.01}'),
    )


TIERS = """\
price_unit: usd_per_million_tokens
models:
  block:
    upstream: local
    input_token_price: 1
    tiers:
    - above_input_tokens: 1000   # a thousand
      input_token_price: 2
    - {above_input_tokens: 2000, input_token_price: 3}   # two
    output_token_price: 5
    context_window: 10000
    max_output_tokens: 100
  flow: {upstream: local, input_token_price: 1, tiers: [{above_input_tokens: 1000, input_token_price: 2}],
         output_token_price: 5, context_window: 10000, max_output_tokens: 100}
"""


def test_tiers_that_begin_where_they_did_are_changed_in_their_place(tmp_path: Path) -> None:
    new = {
        ("tiers", 1000, "input_token_price"): "2.5",
        ("tiers", 1000, "output_token_price"): "6",
    }
    both = {**new, ("tiers", 2000, "input_token_price"): "3", ("tiers", 2000, "cache_read_token_price"): "0.1"}
    assert result(write(tmp_path, TIERS), {"block": offer(both), "flow": offer(new)}) == swapped(
        TIERS,
        ("      input_token_price: 2\n", "      input_token_price: 2.5\n      output_token_price: 6\n"),
        ("2000, input_token_price: 3}", "2000, input_token_price: 3, cache_read_token_price: 0.1}"),
        ("1000, input_token_price: 2}", "1000, input_token_price: 2.5, output_token_price: 6}"),
    )


def test_tiers_that_begin_elsewhere_take_the_place_of_all_that_were_there(tmp_path: Path) -> None:
    new = offer({("tiers", 1500, "input_token_price"): "2.5", ("cache_read_token_price",): "0.1"})
    config = write(tmp_path, TIERS)
    found = compare(config, {"block": new})
    assert [(change.place, change.old, change.new) for change in found.changed[0].changes] == [
        (("tiers", 1000, "input_token_price"), "2", None),
        (("tiers", 1500, "input_token_price"), None, "2.5"),
        (("tiers", 2000, "input_token_price"), "3", None),
        (("cache_read_token_price",), None, "0.1"),
    ]
    assert result(config, {"block": new, "flow": new}) == swapped(
        TIERS,
        (
            "    - above_input_tokens: 1000   # a thousand\n      input_token_price: 2\n"
            "    - {above_input_tokens: 2000, input_token_price: 3}   # two\n    output_token_price: 5\n",
            "      - {above_input_tokens: 1500, input_token_price: 2.5}   # two\n"
            "    output_token_price: 5\n    cache_read_token_price: 0.1\n",
        ),
        ("1000, input_token_price: 2}]", "1500, input_token_price: 2.5}]"),
        ("output_token_price: 5,", "output_token_price: 5, cache_read_token_price: 0.1,"),
    )


def test_added_models_are_written_as_the_last_one_is(tmp_path: Path) -> None:
    added = {
        "acme/new:free": offer(
            {
                ("input_token_price",): "0.1",
                ("output_token_price",): "0.2",
                ("context_window",): "8192",
                ("max_output_tokens",): "512",
            }
        ),
        "{odd}": offer({("image_prices", "*"): "0.04", ("image_prices", "512x512"): "0.01"}),
    }
    config = write(tmp_path)
    assert result(config, added, add=True) == swapped(
        MODELS,
        (
            "second_price: 0.001}\n",
            "second_price: 0.001}\n"
            "  acme/new:free: {upstream: local, input_token_price: 0.1, output_token_price: 0.2, context_window: 8192, "
            "max_output_tokens: 512}\n"
            '  "{odd}": {upstream: local, image_prices: {"*": 0.04, 512x512: 0.01}}\n',
        ),
    )
    block = MODELS.split("\n  flow", maxsplit=1)[0]
    config = write(tmp_path, block)
    assert result(config, added, add=True) == (
        block.rstrip("\n") + "\n\n  acme/new:free:\n      upstream: local\n      input_token_price: 0.1\n"
        "      output_token_price: 0.2\n      context_window: 8192\n      max_output_tokens: 512\n"
        '\n  "{odd}":\n      upstream: local\n      image_prices:\n        "*": 0.04\n        512x512: 0.01\n'
    )
    assert {*load(config, {}).models} == {"large", "acme/new:free", "{odd}"}


def test_models_within_gateway_yaml_are_changed_there(tmp_path: Path) -> None:
    inline = GATEWAY.replace(
        "models: models.yaml",
        "models: {price_unit: usd_per_token, models: {m: {upstream: local, character_price: 0.00001}}} # inline",
    )
    config = write(tmp_path, gateway=inline)
    new = {"m": offer({("character_price",): "15"}), "n": offer({("request_price",): "0.01"})}
    assert result(config, new, add=True) == swapped(
        inline, ("0.00001}}", "0.000015}, n: {upstream: local, request_price: 0.01}}")
    )


def test_what_comes_from_the_environment_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRICE", "0.3")
    models = MODELS.replace("0.10 ", '"${PRICE}" ').replace("upstream: local  ", "upstream: ${U:-local}  ")
    config = write(tmp_path, models)
    found = compare(config, {"large": offer({("input_token_price",): "0.4", ("output_token_price",): "0.5"})})
    [model] = found.changed
    assert [change.place for change in model.changes] == [("output_token_price",)]
    assert (model.kept[0].text, model.kept[0].reason) == (
        "${PRICE}",
        "it comes from the environment; the source says 0.4",
    )
    assert edited(found.book, found.changed).decode() == swapped(models, ('"0.40"', '"0.5"'))


@pytest.mark.parametrize(
    ("models", "problem"),
    [
        (
            "price_unit: usd_per_token\nmodels:\n  a: &one {upstream: local, second_price: 0.001}\n  b: *one\n",
            "models.b in .* is shared by an anchor",
        ),
        (
            "price_unit: usd_per_token\nmodels:\n  a: {upstream: local, request_price: &p 0.001}\n"
            "  b: {upstream: local, second_price: *p}\n",
            "models.b.second_price in .* is shared by an anchor",
        ),
    ],
)
def test_an_alias_is_not_changed_behind_its_other_users_back(tmp_path: Path, models: str, problem: str) -> None:
    found = compare(write(tmp_path, models), {"b": offer({("second_price",): "0.002"})})
    with pytest.raises(BookError, match=problem):
        edited(found.book, found.changed)


prices = st.decimals("0.001", "2000", places=6)
MODEL = st.fixed_dictionaries(
    {("input_token_price",): prices, ("output_token_price",): prices},
    optional={
        ("cache_read_token_price",): prices,
        ("reasoning_token_price",): prices,
        ("request_price",): st.decimals("0.001", "1", places=6),
        ("tiers", 1000, "input_token_price"): prices,
        ("tiers", 2000, "output_token_price"): prices,
    },
)


@settings(max_examples=30)
@given(st.dictionaries(st.sampled_from(["large", "flow", "block", "new", "newer"]), MODEL, min_size=1))
def test_what_is_written_is_what_was_offered_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, figures: dict[str, dict[Place, Decimal]]
) -> None:
    tmp_path = tmp_path_factory.mktemp("book")
    whole = MODELS + TIERS.split("models:\n")[1].split("  flow:", maxsplit=1)[0]
    config = write(tmp_path, whole)
    sizes: dict[Place, Decimal] = {("context_window",): Decimal(100_000), ("max_output_tokens",): Decimal(500)}
    offers: dict[str, Offer | Refused] = {
        name: offer({place: str(figure) for place, figure in {**model, **sizes}.items()})
        for name, model in figures.items()
    }
    before = load(config, {}).models
    result(config, offers, add=True)
    assert not compare(config, offers, add=True).changed
    after = load(config, {}).models
    assert {name: after[name] for name in before if name not in offers} == {
        name: model for name, model in before.items() if name not in offers
    }
    assert {line for line in whole.splitlines() if line.strip().startswith("#")} <= {
        *(tmp_path / "models.yaml").read_text().splitlines()
    }


# --- the difference ---------------------------------------------------------------------------------------------------


def test_models_of_other_upstreams_and_names_are_left_alone(tmp_path: Path) -> None:
    models = MODELS.replace("third: {upstream: local,", "third: {upstream: other,")
    config = write(tmp_path, models)
    offers: dict[str, Offer | Refused] = {"third": offer({("second_price",): "0.1"}), "stranger": offer({})}
    found = compare(config, offers)
    assert (found.changed, found.unknown, found.others) == ([], ["large", "flow"], 1)
    assert [model.name for model in compare(config, offers, upstream=None).changed] == ["third"]
    assert compare(config, offers, "l*", upstream=None).unknown == ["large"]


def test_a_renamed_model_is_looked_for_under_the_upstreams_name(tmp_path: Path) -> None:
    models = MODELS.replace("third: {", "third: {upstream_model: acme/3, ")
    found = compare(write(tmp_path, models), {"acme/3": offer({("second_price",): "0.1"})}, "acme/*", add=True)
    assert [(model.name, model.upstream) for model in found.changed] == [("third", None)]


def test_what_the_source_does_not_say_is_kept_and_said_to_be(tmp_path: Path) -> None:
    found = compare(write(tmp_path), {"large": offer({("input_token_price",): "0.1"})})
    [model] = found.unchanged
    assert [(kept.place[0], kept.text) for kept in model.kept] == [
        ("output_token_price", "0.40"),
        ("context_window", "32768"),
        ("max_output_tokens", "4096"),
    ]


def test_the_longest_input_makes_no_window_smaller(tmp_path: Path) -> None:
    config = write(tmp_path)
    smaller = offer({("context_window",): "30000"}, window_at_least=True)
    assert compare(config, {"large": smaller}).unchanged[0].kept[-2].reason == (
        "the source says only that the longest input is 30000"
    )
    larger = offer({("context_window",): "40000"}, window_at_least=True)
    assert [change.new for change in compare(config, {"large": larger}).changed[0].changes] == ["40000"]
    assert [
        change.new for change in compare(config, {"large": offer({("context_window",): "30000"})}).changed[0].changes
    ] == ["30000"]


def test_a_model_is_not_given_a_second_way_to_be_charged(tmp_path: Path) -> None:
    offers: dict[str, Offer | Refused] = {
        "third": offer({("second_price",): "0.1", ("input_token_price",): "1", ("request_price",): "0.1"}),
        "large": offer({("second_price",): "0.1"}),
    }
    found = compare(write(tmp_path), offers)
    [third] = found.changed
    assert [change.place for change in third.changes] == [("request_price",), ("second_price",)]
    assert third.notes == ("input_token_price 0.000001 USD, because the model is sold by second_price",)
    assert found.unchanged[0].notes == ("second_price 0.1 USD, because the model is sold by tokens",)


def test_a_refused_model_does_not_keep_the_others_from_being_changed(tmp_path: Path) -> None:
    offers: dict[str, Offer | Refused] = {
        "large": offer({("input_token_price",): "300000"}),
        "flow": offer({("max_output_tokens",): "101"}),
        "third": offer({("second_price",): "0.1"}),
        "no name": offer({("request_price",): "0.1"}),
        "half": offer({("input_token_price",): "1"}),
    }
    found = compare(write(tmp_path), offers, add=True)
    assert [model.name for model in found.changed] == ["third"]
    assert found.refused == {
        "large": "input_token_price is 0.3 USD per token, which is 300000 per million: a price is 0 or from 0.001 to "
        "2000 USD per million tokens, so this one may be in another unit",
        "flow": "max_output_tokens is 101, more than the context_window of 100",
        "no name": "is not a model name: write 1 to 200 printable characters without spaces and |",
        "half": "cannot be added: the source does not say output_token_price and context_window and max_output_tokens",
    }


def test_what_a_source_calls_its_models_does_not_reach_the_terminal_as_it_is(tmp_path: Path) -> None:
    offers: dict[str, Offer | Refused] = {"a\x1b[2Jb\n": offer({("request_price",): "0.1"})}
    shown = text(compare(write(tmp_path), offers, add=True))
    assert "REFUSED, left as it is: a?[2Jb?: is not a model name" in shown


def test_tiers_from_the_environment_do_not_give_way_to_others(tmp_path: Path) -> None:
    models = TIERS.replace("input_token_price: 3", 'input_token_price: "${T:-3}"')
    found = compare(write(tmp_path, models), {"block": offer({("tiers", 1500, "input_token_price"): "2"})})
    assert "change them by hand" in found.refused["block"]


# --- the file ---------------------------------------------------------------------------------------------------------


NEW = MODELS.replace("0.10", "0.35").encode()


def test_the_file_keeps_its_mode_and_a_link_stays_a_link(tmp_path: Path) -> None:
    config = write(tmp_path)
    real = tmp_path / "real"
    real.mkdir()
    file = (tmp_path / "models.yaml").rename(real / "prices.yaml")
    file.chmod(0o640)
    (tmp_path / "models.yaml").symlink_to(file)
    replace(open_book(config), NEW)
    assert (tmp_path / "models.yaml").is_symlink()
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == (NEW, 0o640)
    assert [*real.iterdir()] == [file]


def test_a_file_that_was_changed_in_the_meantime_is_left_alone(tmp_path: Path) -> None:
    book = open_book(write(tmp_path))
    theirs = MODELS + "# a change by somebody else\n"
    book.file.write_text(theirs)
    with pytest.raises(BookError, match="was changed in the meantime"):
        replace(book, NEW)
    assert book.file.read_text() == theirs
    assert {path.name for path in tmp_path.iterdir()} == {"gateway.yaml", "models.yaml"}


@pytest.mark.parametrize("content", [NEW.replace(b"0.35", b"350000"), b"models: {", b"# " + b"x" * 2**20])
def test_a_content_that_would_not_load_is_not_written(tmp_path: Path, content: bytes) -> None:
    book = open_book(write(tmp_path))
    with pytest.raises(ConfigError, match=r"models\.yaml:"):
        replace(book, content)
    assert book.file.read_bytes() == book.content
    assert {path.name for path in tmp_path.iterdir()} == {"gateway.yaml", "models.yaml"}


def test_a_disk_that_does_not_take_it_leaves_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = open_book(write(tmp_path))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BookError, match=r"cannot write .*: No space left on device"):
        replace(book, NEW)
    assert book.file.read_bytes() == book.content
    assert {path.name for path in tmp_path.iterdir()} == {"gateway.yaml", "models.yaml"}


def test_a_configuration_with_mistakes_is_not_compared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not known"):
        open_book(write(tmp_path, MODELS + "mistake: 1\n"))
    (tmp_path / "models.yaml").unlink()
    with pytest.raises(ConfigError, match="which is not to be found"):
        open_book(tmp_path / "gateway.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        open_book(tmp_path / "none.yaml")
