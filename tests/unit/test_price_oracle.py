"""Usage × price against another opinion: published prices, read as a configuration, and costs worked out by hand or
with fractions alone (tests/price_oracle), equal to the nano-credit."""

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import pytest
import yaml

from gateway.config.load import load
from gateway.domain.metered import Images, Metered
from gateway.domain.model import Model
from gateway.domain.price import FEMTO_PER_NANO, Cost
from tests.price_oracle import generate

_NUMBER = re.compile(r"[0-9]+(\.[0-9]+)?(e[0-9]+)?")


@dataclass(frozen=True)
class Case:
    """A line of a file of cases."""

    place: str
    model: str
    rate: str
    use: str
    list_nano: int
    plan_nano: int
    worked: str

    @property
    def metered(self) -> Metered:
        """The use, as the gateway says it."""
        counts: dict[str, int] = {}
        images: tuple[Images, ...] = ()
        for word in self.use.split():
            kind, amount = word.split("=")
            if kind == "images":
                what, number = amount.split(":")
                size, _, quality = what.partition("/")
                images = (Images(size, quality, int(number)),)
            else:
                counts[kind] = int(amount)
        return Metered(**counts, images=images)


def read(name: str) -> Iterator[Case]:
    with (generate.HERE / name).open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            nano = int(row["list_nano"]), int(row["plan_nano"])
            yield Case(f"{name}:{number}", row["model"], row["rate"], row["use"], *nano, row["worked"])


BY_HAND = [*read("by_hand.csv")]
CASES = [*BY_HAND, *read("cases.csv")]


@dataclass(frozen=True)
class Sold:
    """What the configuration makes of the price files: the models, and the rates of its plans as parts per million."""

    models: dict[str, Model]
    rates_ppm: dict[str, int]


@pytest.fixture(scope="module")
def sold(tmp_path_factory: pytest.TempPathFactory) -> Sold:
    models: dict[str, Model] = {}
    rates = sorted({case.rate for case in CASES})
    for name in generate.FILES:
        main = tmp_path_factory.mktemp("oracle") / "gateway.yaml"
        main.write_text(
            yaml.safe_dump(
                {
                    "upstreams": {"published": {"base_url": "http://127.0.0.1:8000/v1"}},
                    "plans": {
                        f"plan-{index}": {"rate": rate, **({"default": True} if not index else {})}
                        for index, rate in enumerate(rates)
                    },
                    "models": str(generate.HERE / name),
                }
            )
        )
        config = load(main, {})
        models |= config.models
    return Sold(models, {rate: config.plans[f"plan-{index}"].rate_ppm for index, rate in enumerate(rates)})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.place)
def test_a_use_costs_exactly_what_the_oracle_says(sold: Sold, case: Case) -> None:
    prices = sold.models[case.model].prices
    assert prices.cost(case.metered, sold.rates_ppm[case.rate]) == Cost(case.list_nano, case.plan_nano)
    # What was held for the same use before it was forwarded is never less.
    assert prices.most_femto(case.metered) >= prices.femto(case.metered) > (case.list_nano - 1) * FEMTO_PER_NANO


@pytest.mark.parametrize("case", BY_HAND, ids=lambda case: case.place)
def test_what_was_worked_out_by_hand_adds_up(case: Case) -> None:
    usd = evaluated(case.worked)
    assert math.ceil(usd * 10**9) == case.list_nano
    assert math.ceil(usd * Fraction(case.rate) * 10**9) == case.plan_nano


def evaluated(worked: str) -> Fraction:
    """The value of an expression of numbers, with no binary fraction on the way."""
    assert re.fullmatch(r"[-+*/()0-9.e ]+", worked), worked
    value = eval(_NUMBER.sub(lambda number: f"Fraction('{number[0]}')", worked), {"Fraction": Fraction})
    assert isinstance(value, Fraction)
    return value


def test_the_oracle_covers_what_can_have_a_price(sold: Sold) -> None:
    assert len(CASES) >= 500 and len(BY_HAND) >= 60
    assert {case.model for case in CASES} == {*sold.models} and len(sold.models) >= 40
    kinds = {word.split("=")[0] for case in CASES for word in case.use.split()}
    assert kinds == {*Metered.__dataclass_fields__}
    assert len(sold.rates_ppm) >= 5


def test_the_cases_are_those_that_the_generator_writes() -> None:
    assert (generate.HERE / "cases.csv").read_text() == generate.cases()
