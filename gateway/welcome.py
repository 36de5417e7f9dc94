"""What a start says, and what the first one makes so that there is something to try."""

import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import TypeVar

from gateway.config.model import Address, GatewayConfig
from gateway.credits.api_keys import new_secret
from gateway.credits.errors import Rejected, StoreUnavailable
from gateway.credits.operator import Operator
from gateway.credits.store import Store
from gateway.domain.model import Model

T = TypeVar("T")

#: How long the start waits for a store that was lost again.
START_WAIT_S = 10.0
FIRST_ACCOUNT = "default"
#: The upstream of the shipped configuration, and the variable that its key comes from.
_SHIPPED_UPSTREAM, _SHIPPED_KEY = "ionet", "IONET_API_KEY"


async def first_key(config: GatewayConfig, store: Store, operator: Operator) -> str | None:
    """On the first start of an empty embedded store: an account with a key, whose secret this is. Raises StoreError."""
    if not config.store.embedded:
        return None
    existing = await patiently(store, operator.accounts)
    if existing:
        return None
    secret = new_secret()
    # One that exists now was made by a try whose reply was lost.
    with suppress(Rejected):
        await patiently(store, lambda: operator.create_account(FIRST_ACCOUNT))
    with suppress(Rejected):
        await patiently(store, lambda: operator.create_key(FIRST_ACCOUNT, "first", secret))
    return secret


async def patiently(store: Store, attempt: Callable[[], Awaitable[T]]) -> T:
    """Until the store has answered, or for START_WAIT_S: a busy machine must not keep the gateway from starting.
    Raises StoreError."""
    deadline = time.monotonic() + START_WAIT_S
    while True:
        try:
            return await attempt()
        except StoreUnavailable:
            if time.monotonic() >= deadline or not await store.wait_connected(START_WAIT_S):
                raise


def welcome(config: GatewayConfig, address: Address, admin: Address, secret: str | None) -> str:
    """What is printed once both listeners are open. secret: of the first key, if this start has made it."""
    base = f"http://{_reachable(address)}/v1"
    lines = []
    if config.demo:
        shipped = f" (as shipped: {_SHIPPED_KEY})" if _SHIPPED_UPSTREAM in config.upstreams else ""
        lines += [
            f"DEMO MODEL: no upstream has a key ({', '.join(config.upstreams)}), so a small built-in model answers, at",
            f"the same prices. Real models answer once an upstream's api_key has a value{shipped}.",
            "",
        ]
    lines += [f"metrics   http://{_reachable(admin)}/metrics", f"base URL  {base}"]
    if secret is None:
        made = f", or for the first account, {FIRST_ACCOUNT}" if config.store.embedded else ""
        lines.append(
            "key       make one with: quota-gateway keys create ACCOUNT, after accounts create ACCOUNT"
            f"{made} (same --config)"
        )
        return "\n".join(lines)
    model = next(filter(_answers, config.models.values()), None)
    lines.append(f"key       {secret}   (account {FIRST_ACCOUNT}, plan {config.default_plan}; shown only once)")
    if model is not None:
        body = f'{{"model": "{model.name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
        lines += [
            "try it    " + f"curl -i {base}/chat/completions \\",
            f"            -H 'Authorization: Bearer {secret}' -H 'Content-Type: application/json' \\",
            f"            -d '{body}'",
        ]
    return "\n".join(lines)


def _reachable(address: Address) -> Address:
    """An address that a client on this machine can use."""
    return Address("127.0.0.1", address.port) if address.host in ("0.0.0.0", "::") else address  # noqa: S104


def _answers(model: Model) -> bool:
    """Whether it makes text: others cost nothing but their input."""
    return model.prices.tokens is not None and model.prices.tokens.output_femto > 0
