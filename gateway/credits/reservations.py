"""What is known in this process of a request that holds credits."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.domain.decision import Reserved
from gateway.domain.plan import Plan
from gateway.domain.value import value

#: A reservation of a gateway that died ends this long after its last renewal.
LEASE_MS = 60_000


@value(frozen=True, slots=True)
class Seen:
    """What a request has cost so far (list price, femto-credits), and the ledger's note, were that to be charged."""

    cost_femto: int = 0
    note: str = ""


NOTHING_SEEN = Seen()


@dataclass(slots=True, eq=False)
class Reservation:
    """A live hold, with what was pinned when it was made. reserved: as it is now; the engine's ``extend`` renews it.

    look: tells what the request has cost by now, for the renewals of its lease; None where that shows only at its end.
    """

    account: str
    plan: Plan
    model: str
    key_id: str
    created_ms: int
    reserved: Reserved
    seen: Seen = NOTHING_SEEN
    look: Callable[[], Seen] | None = None
    renewed_at: float = field(default_factory=time.monotonic)

    @property
    def id(self) -> str:
        """The reservation's id."""
        return self.reserved.reservation_id


@value(frozen=True, slots=True)
class Refused:
    """No decision about credits was possible: the key is not (or no longer) valid."""
