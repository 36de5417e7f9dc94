"""What one configuration has that another has not, in words, and what of it a running gateway can take over."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from gateway.config.model import ArchiveConfig, GatewayConfig, StoreConfig


@dataclass(frozen=True, slots=True)
class Changes:
    """applied: such as ``plans.pro added`` or ``default_plan changed``. needs_restart: fields that stay as they are.
    removed_plans: names."""

    applied: tuple[str, ...]
    needs_restart: tuple[str, ...]
    removed_plans: tuple[str, ...]


def changes(running: GatewayConfig, read: GatewayConfig) -> Changes:
    """What is new in read."""
    return Changes(
        applied=(*_entries(running, read), *_values(running, read)),
        needs_restart=tuple(_fixed(running, read)),
        removed_plans=tuple(name for name in running.plans if name not in read.plans),
    )


def taken_over(running: GatewayConfig, read: GatewayConfig) -> GatewayConfig:
    """read, but for what cannot change while the gateway runs."""
    return replace(
        read,
        listen=running.listen,
        admin=replace(read.admin, listen=running.admin.listen),
        store=running.store,
        archive=running.archive,
    )


def _entries(running: GatewayConfig, read: GatewayConfig) -> Iterator[str]:
    sections: tuple[tuple[str, Mapping[str, Any], Mapping[str, Any]], ...] = (
        ("upstreams", running.upstreams, read.upstreams),
        ("plans", running.plans, read.plans),
        ("models", running.models, read.models),
        ("passthrough", running.passthrough, read.passthrough),
    )
    for section, old, new in sections:
        yield from (f"{section}.{name} removed" for name in old if name not in new)
        yield from (f"{section}.{name} added" for name in new if name not in old)
        yield from (f"{section}.{name} changed" for name in new if name in old and old[name] != new[name])


def _values(running: GatewayConfig, read: GatewayConfig) -> Iterator[str]:
    if running.default_plan != read.default_plan:
        yield "default_plan changed"
    if running.limits != read.limits:
        yield "limits changed"
    if running.admin.token != read.admin.token:
        yield "admin.token changed"


def _fixed(running: GatewayConfig, read: GatewayConfig) -> Iterator[str]:
    if running.listen != read.listen:
        yield "listen"
    if running.admin.listen != read.admin.listen:
        yield "admin.listen"
    yield from _fields("store", running.store, read.store)
    yield from _fields("archive", running.archive, read.archive)


def _fields(section: str, old: StoreConfig | ArchiveConfig, new: StoreConfig | ArchiveConfig) -> Iterator[str]:
    for field in fields(old):
        if getattr(old, field.name) != getattr(new, field.name):
            yield f"{section}.{field.name.removesuffix('_ms')}"
