"""Looks at everything that serving needs: store, clocks, durability, archive, upstreams. Changes nothing."""

import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Literal

from gateway.config.model import GatewayConfig
from gateway.credits.archive import Archive, ArchiveError
from gateway.credits.auditor import Auditor
from gateway.credits.errors import StoreError
from gateway.credits.store import Store
from gateway.sessions import borrowed_store
from gateway.upstream.client import UpstreamClient, UpstreamError

#: How servers without a list of models say so.
_NO_LIST = (404, 405)


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's report. state: ``note`` for what is as it may be, but worth knowing."""

    component: str
    state: Literal["ok", "note", "FAIL"]
    detail: str

    @property
    def ok(self) -> bool:
        """Whether serving can do with it."""
        return self.state != "FAIL"


def _finding(component: str, ok: bool, detail: str) -> Finding:
    return Finding(component, "ok" if ok else "FAIL", detail)


async def diagnose(config: GatewayConfig) -> list[Finding]:
    """Look at everything that serving needs. Raises nothing: what fails is a finding."""
    findings = []
    store = None
    async with AsyncExitStack() as stack:
        try:
            store = await stack.enter_async_context(borrowed_store(config.store))
            findings += await _store(config, store)
        except Exception as error:
            findings.append(_finding("store", False, str(error)))
        findings.append(await _archive(config, store))
    return findings + await _upstreams(config)


async def _store(config: GatewayConfig, store: Store) -> list[Finding]:
    seconds, micros = await store.call("TIME")
    skew_ms = abs(time.time() * 1000 - int(seconds) * 1000 - int(micros) / 1000)
    shown = f"embedded in {config.store.data_dir.resolve()}" if config.store.embedded else config.store.shown_url
    findings = [
        _finding("store", True, f"{shown} answers"),
        _finding("clocks", skew_ms < 60_000, f"store and gateway differ by {skew_ms:.0f} ms (a refresh needs < 60000)"),
    ]
    with suppress(StoreError):
        settings = await store.settings()
        durable = settings.get("appendonly") == "yes"
        shown = ", ".join(f"{name} {value}" for name, value in settings.items())
        findings.append(_finding("durability", durable, shown if durable else f"{shown}: a crash loses credits"))
    return findings


async def _archive(config: GatewayConfig, store: Store | None) -> Finding:
    """Whether the archive can be had, and whether it is that of the store, where there is one."""
    name = config.archive.shown_url
    if name == "sqlite":
        name = f"sqlite in {config.store.data_dir.resolve()}"
    try:
        archive = Archive(config.archive.url, config.store.data_dir)
        try:
            found = await archive.find()
            in_use = store is not None and await Auditor(store, archive).check_archive()
        finally:
            await archive.close()
    except (ArchiveError, StoreError) as error:
        return _finding("archive", False, f"{name}: {error}")
    if in_use:
        return _finding("archive", True, f"{name} has this store's ledger")
    if found is None:
        return Finding("archive", "note", f"{name} is not there yet: serve makes it")
    return Finding("archive", "note", f"{name} can be opened; whether it is this store's shows when a gateway has run")


async def _upstreams(config: GatewayConfig) -> list[Finding]:
    if config.demo:
        text = "demo mode: with the environment of this shell no upstream has a key, and the demo model answers"
        return [_finding("upstreams", True, text)]
    client = UpstreamClient()
    try:
        return [await _upstream(config, client, name) for name in config.upstreams]
    finally:
        await client.close()


async def _upstream(config: GatewayConfig, client: UpstreamClient, name: str) -> Finding:
    component = f"upstream {name}"
    try:
        async with client.send(config.upstreams[name], "GET", "/models", {}) as answer:
            said = f"GET /models answers {answer.status}"
            if answer.status in _NO_LIST:
                return Finding(component, "note", f"{said}: it can be reached; if it has a list, check base_url")
            return _finding(component, answer.status == 200, said)
    except UpstreamError as error:
        return _finding(component, False, str(error))
