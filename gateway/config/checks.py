"""Rules that join several values. They read the written values, so that they hold beside other mistakes too."""

from typing import Any

from gateway.config.document import Document, Location, Text
from gateway.config.fields import MOST_TOKENS, integer, refresh_ms
from gateway.config.raw import NEEDED_FOR_TOKENS, OTHER_PRICES, SELLS_TOKENS, TOKEN_PRICES, RawModel
from gateway.config.validation import Section, report_missing


def check_upstream_keys(main: Document) -> None:
    """Either every upstream is set up or none is: half a set-up would answer some models with errors only."""
    upstreams = _mappings(main.tree.get("upstreams"))
    empty = [name for name, upstream in upstreams.items() if _is_empty(upstream.get("api_key"))]
    ready = [name for name in upstreams if name not in empty]
    if not ready:
        return
    other = f"{ready[0]} {'has a key' if 'api_key' in upstreams[ready[0]] else 'is set up'}"
    for name in empty:
        Section(main, main.tree).report(
            ("upstreams", name, "api_key"), f"is empty while {other}: set it or remove the upstream"
        )


def check_counting(main: Document) -> None:
    """Usage on every chunk has to be asked for."""
    for name, upstream in _mappings(main.tree.get("upstreams")).items():
        if _is(upstream.get("count_output"), "usage") and _is(upstream.get("stream_usage"), "false"):
            Section(main, main.tree).report(
                ("upstreams", name, "count_output"),
                "must not be usage beside stream_usage: false: the gateway could not ask for what it counts by",
            )


def check_listeners(main: Document) -> None:
    """The two listeners cannot share a port."""
    admin = main.tree.get("admin")
    data_text = main.tree.get("listen")
    admin_text = admin.get("listen") if isinstance(admin, dict) else None
    if not isinstance(data_text, Text) or not isinstance(admin_text, Text):
        return
    if data_text.text == admin_text.text and not data_text.text.endswith(":0"):
        Section(main, main.tree).report(("admin", "listen"), "is the same address as listen: use another port")


def check_plans(section: Section) -> None:
    """One default plan; every plan can pay in exactly the ways that it says."""
    if not isinstance(section.tree.get("plans"), dict):
        return
    plans = _mappings(section.tree["plans"])
    for name, plan in plans.items():
        _check_allowance(section, name, plan)
    _check_default(section, plans)


def _check_allowance(section: Section, name: str, plan: dict[str, Any]) -> None:
    here = ("plans", name, "allowance")
    match plan.get("allowance"):
        case dict() as allowance:
            _check_kind(section, here, allowance)
        case list() as windows:
            for index, window in enumerate(windows):
                if isinstance(window, dict):
                    _check_kind(section, (*here, index), window)
            _check_lengths(section, here, windows)
        case None if _is(plan.get("payg"), "false"):
            section.report(
                ("plans", name, "payg"), "must be true because the plan has no allowance: nothing else could pay"
            )


def _check_kind(section: Section, here: Location, allowance: dict[str, Any]) -> None:
    kinds = [kind for kind in ("monthly", "per_window") if kind in allowance]
    if len(kinds) == 2:
        second = max(kinds, key=list(allowance).index)
        section.report((*here, second), "stands beside the other kind: keep one", at_key=True)
    if not kinds:
        section.report(here, "has no amount: add monthly or per_window, in credits", at_key=True)


def _check_lengths(section: Section, here: Location, windows: list[Any]) -> None:
    """One window of each length: a second of the same could only make the first one larger or useless."""
    first: dict[int, str] = {}
    for index, window in enumerate(windows):
        if not isinstance(window, dict) or "refresh" not in window:
            continue
        place = (*here, index, "refresh")
        try:
            length_ms = refresh_ms(window["refresh"])
        except ValueError:
            continue
        if length_ms in first:
            section.report(place, f"is as long as {first[length_ms]}: keep one window of each length")
        first.setdefault(length_ms, section.name(place))


def _check_default(section: Section, plans: dict[str, dict[str, Any]]) -> None:
    defaults = [name for name, plan in plans.items() if _is(plan.get("default"), "true")]
    if not defaults:
        section.report(("plans",), "has no default plan: add `default: true` to one", at_key=True)
    for name in defaults[1:]:
        section.report(("plans", name, "default"), f"must not be true beside {defaults[0]}'s: keep one default plan")


def check_models(section: Section) -> None:
    """A model has a price, and one that sells tokens has all that a request's cost needs."""
    if not isinstance(section.tree, dict):
        return
    for name, model in _mappings(section.tree.get("models")).items():
        here = ("models", name)
        _check_fallbacks(section, here, model.get("fallbacks"))
        if any(key in model for key in SELLS_TOKENS):
            for key in NEEDED_FOR_TOKENS:
                if key not in model:
                    report_missing(section, (*here, key), RawModel.model_fields[key])
            _check_tiers(section, (*here, "tiers"), model.get("tiers"))
        elif not any(key in model for key in OTHER_PRICES):
            section.report(
                here,
                "has no price: add input_token_price and output_token_price, or one of " + ", ".join(OTHER_PRICES),
                at_key=True,
            )


def _check_tiers(section: Section, here: Location, tiers: Any) -> None:
    """Each has a price, and each begins above the one before it."""
    below = 0
    for index, tier in enumerate(tiers if isinstance(tiers, list) else ()):
        if not isinstance(tier, dict):
            continue
        if not any(key in tier for key in TOKEN_PRICES):
            section.report((*here, index), "changes no price: add one such as input_token_price, or remove the tier")
        try:
            above = integer(tier.get("above_input_tokens"), 1, MOST_TOKENS)
        except ValueError:
            continue
        if above <= below:
            section.report(
                (*here, index, "above_input_tokens"), f"must be more than the tier's before it ({below}), not {above}"
            )
        below = max(below, above)


def _check_fallbacks(section: Section, here: Location, fallbacks: Any) -> None:
    """Each is another model, named once."""
    seen = {here[-1]: "the model itself"}
    for index, name in enumerate(fallbacks if isinstance(fallbacks, list) else ()):
        if not isinstance(name, Text):
            continue
        place = (*here, "fallbacks", index)
        if name.text in seen:
            section.report(place, f"is {seen[name.text]}: name another model, or remove it")
        seen.setdefault(name.text, f"the same as {section.name(place)}")


def _mappings(value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict):
        return {}
    return {name: entry for name, entry in value.items() if isinstance(entry, dict)}


def _is(value: Any, word: str) -> bool:
    return isinstance(value, Text) and value.text.lower() == word


def _is_empty(value: Any) -> bool:
    return isinstance(value, Text) and not value.text.strip()
