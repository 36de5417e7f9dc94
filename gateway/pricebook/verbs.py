"""The verbs ``prices diff`` and ``prices import``: what they show, ask and write."""

import asyncio
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping

from gateway.config.load import shipped_dir
from gateway.config.model import Upstream
from gateway.config.problem import ConfigError, suggestion
from gateway.pricebook import report
from gateway.pricebook.book import Book, BookError, open_book, replace
from gateway.pricebook.difference import Difference, difference
from gateway.pricebook.editing import edited
from gateway.pricebook.sources import Source, from_file, from_upstream


class PricesError(Exception):
    """What the verbs have to say about how they were asked."""


def diff(args: Namespace) -> bool:
    """Show what would change. Whether no model had to be refused. Raises ConfigError, SourceError and PricesError."""
    found = _found(args)
    _show(found, args, written=False)
    return not found.refused


def import_(args: Namespace) -> bool:
    """The same, and write it once that is agreed to. Raises BookError too."""
    if args.config is None:
        raise PricesError("says no --config: the configuration that ships is not for changing; copy it and name yours")
    if args.json and not args.yes:
        raise PricesError("--json asks nothing: add --yes, or look with `prices diff --json` first")
    found = _found(args)
    if not args.json:
        _show(found, args, written=False)
    written = bool(found.changed) and _agreed(args)
    if written:
        _write(found)
    if args.json:
        _show(found, args, written=written)
    elif found.changed:
        print(f"written: {found.book.file}" if written else "nothing was written")
    return not found.refused and (written or not found.changed)


def _found(args: Namespace) -> Difference:
    book = open_book(args.config or shipped_dir() / "gateway.yaml")
    source = _source(args, book)
    if args.add and source.upstream is None:
        raise PricesError("--add needs --upstream NAME beside --from-file: the upstream that serves the added models")
    return difference(book, source, args.only, add=args.add)


def _source(args: Namespace, book: Book) -> Source:
    if args.from_upstream is not None:
        if args.upstream not in (None, args.from_upstream):
            raise PricesError(f"--upstream {args.upstream} is for a file: the list is that of {args.from_upstream}")
        return asyncio.run(from_upstream(_upstream(book, args.from_upstream)))
    return from_file(args.from_file, None if args.upstream is None else _upstream(book, args.upstream).name)


def _upstream(book: Book, name: str) -> Upstream:
    upstreams = book.config.upstreams
    if name not in upstreams:
        raise PricesError(f"{name[:64]!r} is no upstream of the configuration: {suggestion(name, upstreams)}")
    return upstreams[name]


def _show(found: Difference, args: Namespace, *, written: bool) -> None:
    print(json.dumps(report.document(found, written=written), indent=2) if args.json else report.text(found))


def _agreed(args: Namespace) -> bool:
    if args.yes:
        return True
    if not sys.stdin.isatty():
        raise PricesError("nothing was written: standard input is no terminal to ask; add --yes")
    try:
        return input("write? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _write(found: Difference) -> None:
    content = edited(found.book, found.changed)
    try:
        replace(found.book, content)
    except ConfigError as error:
        raise BookError(f"nothing was written, because the new {found.book.file} would not load:\n{error}") from error


PRICE_VERBS: Mapping[str, Callable[[Namespace], bool]] = {"prices diff": diff, "prices import": import_}
