"""Reads the configuration files into a GatewayConfig, or reports every mistake of every file at once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gateway.config.checks import check_counting, check_listeners, check_models, check_plans, check_upstream_keys
from gateway.config.document import UNREADABLE, Document, Text, quoted, read_document
from gateway.config.fields import PRICE_UNITS, Context
from gateway.config.model import (
    AdminConfig,
    ArchiveConfig,
    GatewayConfig,
    Limits,
    Passthrough,
    StoreConfig,
    Upstream,
)
from gateway.config.problem import ConfigError, Problem
from gateway.config.raw import (
    MainFile,
    ModelsFile,
    PlansFile,
    RawAllowance,
    RawArchive,
    RawModel,
    RawPassthrough,
    RawPlan,
    RawStore,
    RawTier,
    RawTokenPrices,
    RawUpstream,
)
from gateway.config.validation import Section, validate
from gateway.domain.model import Model
from gateway.domain.plan import Allowance, Plan
from gateway.domain.price import Prices, Tier, TokenPrices

__all__ = ["ConfigError", "OperatorConfig", "Problem", "load", "load_for_operator", "shipped_dir"]


def shipped_dir() -> Path:
    """The directory of the configuration that ships: inside an installed package, or the checkout's ``config``."""
    packaged = Path(__file__).parent / "shipped"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "config"


def load(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    contents: Mapping[Path, bytes] = MappingProxyType({}),
) -> GatewayConfig:
    """Read gateway.yaml at path (default: the one that ships) and the files it names.

    environ: what ``${NAME}`` stands for (default: the process's environment). contents: what to take for the content of
    a file, whatever is in it. Raises ConfigError with every mistake.
    """
    reading = _Reading(os.environ if environ is None else environ, contents=contents)
    parts = _read(path, reading)
    if reading.problems or parts is None:
        raise ConfigError(reading.problems, reading.files)
    return replace(_build(parts), files=reading.files)


@dataclass(frozen=True, slots=True)
class OperatorConfig:
    """What an operator's verbs need of the configuration, whatever is wrong with the rest of it.

    problems: every mistake. Beside any, plans is None (a running gateway goes on with those that it had) and
    default_plan empty; archive is None if the file does not say where that is.
    """

    store: StoreConfig
    archive: ArchiveConfig | None
    plans: Mapping[str, Plan] | None
    default_plan: str
    problems: tuple[Problem, ...]


def load_for_operator(path: Path | None = None, environ: Mapping[str, str] | None = None) -> OperatorConfig:
    """The same for a verb that has to find the store, and may not need the rest.

    Raises ConfigError with every mistake where one of them is about the store or its archive, and where the file does
    not say itself where the store is: it may say so in the wrong place.
    """
    reading = _Reading(os.environ if environ is None else environ)
    parts = _read(path, reading)
    error = ConfigError(reading.problems, reading.files)
    if parts is None or ("store" not in parts.document.tree and error.problems):
        raise error
    if not parts.document.sections.isdisjoint({"", "store", "archive"}):
        raise error
    main, context = parts.document, Context(None, None, None)
    store = validate(Section(main, main.tree.get("store", {}), ("store",)), RawStore, context)
    archive = validate(Section(main, main.tree.get("archive", {}), ("archive",)), RawArchive, context)
    assert store is not None and archive is not None, "what is wrong with them was reported above"
    sound = not error.problems and parts.plans is not None
    return OperatorConfig(
        store=_store(store),
        archive=ArchiveConfig(archive.url) if sound or "archive" in main.tree else None,
        plans=_plans(parts.plans) if sound and parts.plans else None,
        default_plan=_default_plan(parts.plans) if sound and parts.plans else "",
        problems=error.problems,
    )


@dataclass(frozen=True, slots=True)
class _Reading:
    """What one load has met so far: the mistakes of every file, and the digests of the files."""

    environ: Mapping[str, str]
    problems: list[Problem] = field(default_factory=list)
    files: dict[Path, str] = field(default_factory=dict)
    contents: Mapping[Path, bytes] = field(default_factory=dict)

    def document(self, path: Path) -> Document | None:
        return read_document(path, self.environ, self.problems, self.files, self.contents.get(path))


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the files say, as it is written; None for a part with mistakes. document: the main file's."""

    document: Document
    main: MainFile | None
    plans: PlansFile | None
    models: ModelsFile | None


def _read(path: Path | None, reading: _Reading) -> _Parts | None:
    """Every mistake is in reading afterwards. None where the main file cannot be parsed."""
    path = path or shipped_dir() / "gateway.yaml"
    main = reading.document(path)
    if main is None:
        return None
    plans = _section(main, "plans", path.parent, reading)
    models = _section(main, "models", path.parent, reading)
    context = _context(main, models)
    raw_main = validate(Section(main, main.tree), MainFile, context)
    raw_plans = validate(plans, PlansFile, context) if plans else None
    raw_models = validate(models, ModelsFile, context) if models else None
    check_upstream_keys(main)
    check_counting(main)
    check_listeners(main)
    if plans:
        check_plans(plans)
        # There are mistakes that leave the plans readable: one that is written twice, two default ones.
        if "plans" in main.sections or (plans.document is not main and plans.document.sections):
            raw_plans = None
    if models:
        check_models(models)
    return _Parts(main, raw_main, raw_plans, raw_models)


def _section(main: Document, key: str, directory: Path, reading: _Reading) -> Section | None:
    """What plans: or models: holds, inline or in the file that it names. None when there is nothing to check."""
    value = main.tree.get(key)
    if value is None or (key,) in main.bad:
        return None
    if not isinstance(value, Text):
        return Section(main, {key: value}) if key == "plans" else Section(main, value, (key,))
    if not value.text.strip():
        main.report((key,), f"{key} is empty: name a file such as {key}.yaml or write the mapping itself")
        return None
    file = directory / value.text
    try:
        file.stat()
    except (OSError, ValueError):
        reading.files[file] = UNREADABLE
        main.report((key,), f"{key} names the file {quoted(value.written)}, which is not to be found beside this one")
        return None
    document = reading.document(file)
    return Section(document, document.tree) if document else None


def _context(main: Document, models: Section | None) -> Context:
    upstreams = main.tree.get("upstreams")
    written = models.tree.get("price_unit") if models and isinstance(models.tree, dict) else None
    unit = next((unit for unit in PRICE_UNITS if isinstance(written, Text) and written.text == unit), None)
    # Without any upstream every model's would be unknown: the one mistake is the empty mapping.
    listed = models.tree.get("models") if models and isinstance(models.tree, dict) else None
    return Context(_names(upstreams), _names(listed), unit)


def _names(mapping: object) -> tuple[str, ...] | None:
    return tuple(mapping) if mapping and isinstance(mapping, dict) else None


def _build(parts: _Parts) -> GatewayConfig:
    main, plans, models = parts.main, parts.plans, parts.models
    assert main is not None and plans is not None and models is not None, "without mistakes all of it can be read"
    return GatewayConfig(
        listen=main.listen,
        admin=AdminConfig(listen=main.admin.listen, token=main.admin.token or None),
        store=_store(main.store),
        upstreams={name: _upstream(name, raw) for name, raw in main.upstreams.items()},
        plans=_plans(plans),
        default_plan=_default_plan(plans),
        models={name: _model(name, raw) for name, raw in models.models.items()},
        limits=Limits(main.limits.body, main.limits.response, main.limits.upload),
        passthrough={pattern: _passthrough(pattern, raw) for pattern, raw in main.passthrough.items()},
        archive=ArchiveConfig(main.archive.url),
    )


def _upstream(name: str, raw: RawUpstream) -> Upstream:
    return Upstream(
        name=name,
        base_url=raw.base_url,
        api_key=raw.api_key,
        connect_timeout_ms=raw.connect_timeout,
        idle_timeout_ms=raw.idle_timeout,
        total_timeout_ms=raw.total_timeout,
        stream_usage=raw.stream_usage,
        limit_field=raw.limit_field,
        allow_fields=raw.allow_fields,
        count_output=raw.count_output,
        key_header=raw.key_header,
    )


def _passthrough(pattern: str, raw: RawPassthrough) -> Passthrough:
    prices = Prices(request_femto=raw.request_price)
    price = Model(pattern, raw.upstream, prices, 0, 0, price_version=_price_version(prices))
    return Passthrough(pattern, price, raw.methods)


def _store(raw: RawStore) -> StoreConfig:
    return StoreConfig(url=raw.url, data_dir=raw.data_dir, timeout_ms=raw.timeout, allow_unsafe=raw.allow_unsafe)


def _plans(raw: PlansFile) -> dict[str, Plan]:
    return {name: _plan(name, plan) for name, plan in raw.plans.items()}


def _default_plan(raw: PlansFile) -> str:
    return next(name for name, plan in raw.plans.items() if plan.default)


def _plan(name: str, raw: RawPlan) -> Plan:
    allowances = tuple(_allowance(allowance) for allowance in raw.allowance or ())
    return Plan(name=name, allowances=allowances, rate_ppm=raw.rate, payg=raw.payg, on_lost=raw.on_lost)


def _allowance(raw: RawAllowance) -> Allowance:
    if raw.monthly is not None:
        return Allowance("monthly", raw.monthly, raw.refresh)
    assert raw.per_window is not None, "checks.py admits no allowance without an amount"
    return Allowance("per_window", raw.per_window, raw.refresh)


def _model(name: str, raw: RawModel) -> Model:
    prices = _prices(raw)
    return Model(
        name=name,
        upstream=raw.upstream,
        prices=prices,
        context_window=raw.context_window or 0,
        max_output_tokens=raw.max_output_tokens or 0,
        template_tokens=raw.template_tokens,
        hidden_reasoning=raw.hidden_reasoning,
        price_version=_price_version(prices),
        sent_as=raw.upstream_model or "",
        max_audio_ms=1000 * (raw.max_audio_seconds or 0),
        fallbacks=tuple(raw.fallbacks or ()),
    )


def _prices(raw: RawModel) -> Prices:
    written = _token_figures(raw)
    # checks.py admits the others only beside the input and the output price.
    tokens = TokenPrices(**written) if written else None
    return Prices(
        tokens=tokens,
        tiers=tuple(_tier(tier, tokens) for tier in raw.tiers or ()) if tokens else (),
        request_femto=raw.request_price,
        audio_ms_femto=raw.second_price,
        character_femto=raw.character_price,
        images=MappingProxyType(raw.image_prices or {}),
    )


def _tier(raw: RawTier, base: TokenPrices) -> Tier:
    return Tier(raw.above_input_tokens, replace(base, **_token_figures(raw)))


def _token_figures(raw: RawTokenPrices) -> dict[str, Any]:
    """The prices that are written, as TokenPrices names them."""
    prices = {name: getattr(raw, name) for name in RawTokenPrices.model_fields}
    return {name.replace("_token_price", "_femto"): price for name, price in prices.items() if price is not None}


def _price_version(prices: Prices) -> str:
    return sha256("|".join(prices.figures()).encode()).hexdigest()[:8]
