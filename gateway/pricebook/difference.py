"""What a source would change in the models: worked out, and nothing written."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any

from gateway.config.document import Text
from gateway.config.fields import PriceUnit, model_name
from gateway.pricebook.book import Book
from gateway.pricebook.offer import (
    FIELDS,
    SIZES,
    Offer,
    Place,
    Refused,
    check,
    completed,
    from_file,
    in_file,
    sold_by,
    way_of,
    without_empty_prices,
)
from gateway.pricebook.sources import Source


@dataclass(frozen=True, slots=True)
class Change:
    """A figure as the file has it and as it would be, both in the file's notation; None: not there."""

    place: Place
    old: str | None
    new: str | None


@dataclass(frozen=True, slots=True)
class Kept:
    """A figure of the file that is left, and why."""

    place: Place
    text: str
    reason: str


@dataclass(frozen=True, slots=True)
class ModelDifference:
    """What would change in one model. upstream: of a model to be added; None for one that is there. tiers: all of the
    new ones, where those of the file are replaced as a whole. notes: what the source says and the file cannot."""

    name: str
    changes: tuple[Change, ...]
    upstream: str | None = None
    tiers: Mapping[int, Mapping[str, str]] | None = None
    kept: tuple[Kept, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Difference:
    """What would change. unknown: models of the file that the source does not have. refused: the reason, by model.
    others: how many models the source has beside those of the file."""

    source: str
    book: Book
    changed: list[ModelDifference] = field(default_factory=list)
    unchanged: list[ModelDifference] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    others: int = 0


def difference(book: Book, source: Source, only: Sequence[str] = (), *, add: bool = False) -> Difference:
    """Compare. only: patterns such as ``openai/*`` of the models to look at, by the file's name or the source's. add:
    take models over that the file lacks; the source must then have an upstream."""
    result = Difference(source.name, book)
    met = set()
    for name in book.models:
        model = book.config.models[name]
        met |= {name, model.sent_as or name}
        if source.upstream not in (None, model.upstream) or not _wanted(only, name, model.sent_as or name):
            continue
        offer = source.offers.get(model.sent_as or name)
        if offer is None:
            result.unknown.append(name)
        else:
            _compare(result, name, offer)
    for name in source.offers:
        if name in met or not _wanted(only, name):
            continue
        if add:
            _add(result, name, source.offers[name], source.upstream)
        else:
            result.others += 1
    return result


def _wanted(only: Sequence[str], *names: str) -> bool:
    return not only or any(fnmatchcase(name, pattern) for pattern in only for name in names)


def _compare(result: Difference, name: str, offer: Offer | Refused) -> None:
    written = _written(result.book.models[name])
    try:
        if isinstance(offer, Refused):
            raise offer
        ways = {way_of(place) for place in written if place not in SIZES}
        offer = sold_by(without_empty_prices(offer), ways)
        sizes = {place: Decimal(written[place].text) for place in SIZES if place in written}
        check({**sizes, **offer.figures})
        found = _Comparison(written, offer, result.book.unit).result(name)
    except Refused as error:
        result.refused[name] = str(error)
        return
    (result.changed if found.changes else result.unchanged).append(found)


def _add(result: Difference, name: str, offer: Offer | Refused, upstream: str | None) -> None:
    assert upstream is not None, "the command line asks for one"
    try:
        if isinstance(offer, Refused):
            raise offer
        model_name(name)
        offer = completed(sold_by(without_empty_prices(offer), None))
        check(offer.figures)
    except ValueError as error:
        result.refused[name] = str(error)
        return
    unit = result.book.unit
    changes = tuple(
        Change(place, None, in_file(place, offer.figures[place], unit)) for place in _ordered(offer.figures)
    )
    result.changed.append(ModelDifference(name, changes, upstream, notes=offer.notes))


def _written(model: Mapping[str, Any]) -> dict[Place, Text]:
    """The figures of a model of the file."""
    written: dict[Place, Text] = {(name,): model[name] for name in FIELDS if isinstance(model.get(name), Text)}
    written |= {("image_prices", kind): price for kind, price in model.get("image_prices", {}).items()}
    for tier in model.get("tiers", ()):
        above = int(tier["above_input_tokens"].text)
        written |= {("tiers", above, name): price for name, price in tier.items() if name != "above_input_tokens"}
    return written


def _figures(written: Mapping[Place, Text], unit: PriceUnit) -> dict[Place, Decimal]:
    return {place: from_file(place, text.text, unit) for place, text in written.items()}


def _ordered(places: Iterable[Place]) -> list[Place]:
    """Each once, as they are put into a model: by field, tiers upwards, kinds of images as they came."""
    return sorted(dict.fromkeys(places), key=_rank)


def _rank(place: Place) -> tuple[int, int, int]:
    tier = (int(place[1]), FIELDS.index(str(place[2]))) if place[0] == "tiers" else (0, 0)
    return FIELDS.index(str(place[0])), *tier


class _Comparison:
    def __init__(self, written: Mapping[Place, Text], offer: Offer, unit: PriceUnit) -> None:
        self.written, self.offer, self.unit = written, offer, unit
        self.old = _figures(written, unit)
        self.kept: list[Kept] = []
        self.changes: list[Change] = []

    def result(self, name: str) -> ModelDifference:
        tiers = self._tiers()
        for place in _ordered((*self.written, *self.offer.figures)):
            if place[0] != "tiers" or tiers is None:
                self._look_at(place)
        return ModelDifference(name, tuple(self.changes), tiers=tiers, kept=tuple(self.kept), notes=self.offer.notes)

    def _look_at(self, place: Place) -> None:
        new, old = self.offer.figures.get(place), self.old.get(place)
        if new == old:
            return
        if new is None:
            self._keep(place, "the source does not say it")
        elif self._from_environment(place):
            self._keep(place, f"it comes from the environment; the source says {in_file(place, new, self.unit)}")
        elif place == ("context_window",) and self.offer.window_at_least and old is not None and old > new:
            self._keep(place, f"the source says only that the longest input is {in_file(place, new, self.unit)}")
        else:
            self._change(place)

    def _tiers(self) -> dict[int, dict[str, str]] | None:
        """All new tiers, where those of the file begin at other lengths: none of them would be right to keep."""
        of_file, offered = (
            {int(place[1]) for place in of if place[0] == "tiers"} for of in (self.old, self.offer.figures)
        )
        if not of_file or not offered or of_file == offered:
            return None
        places = _ordered(place for place in (*self.old, *self.offer.figures) if place[0] == "tiers")
        if any(self._from_environment(place) for place in places):
            raise Refused(
                "has tiers whose prices come from the environment, and the source has others: change them by hand"
            )
        tiers: dict[int, dict[str, str]] = {}
        for place in places:
            if self.old.get(place) != self.offer.figures.get(place):
                self._change(place)
            if place in self.offer.figures:
                text = in_file(place, self.offer.figures[place], self.unit)
                tiers.setdefault(int(place[1]), {})[str(place[2])] = text
        return tiers

    def _change(self, place: Place) -> None:
        new = self.offer.figures.get(place)
        old = self.written[place].written if place in self.written else None
        self.changes.append(Change(place, old, None if new is None else in_file(place, new, self.unit)))

    def _keep(self, place: Place, reason: str) -> None:
        self.kept.append(Kept(place, self.written[place].written, reason))

    def _from_environment(self, place: Place) -> bool:
        return place in self.written and "${" in self.written[place].written
