"""Keeps a turn's hold ahead of what the turn has used."""

import asyncio
import logging
from collections.abc import Callable

from gateway.credits.errors import EngineError, StoreError, StoreUnavailable
from gateway.credits.service import CreditEngine, Reservation, Seen
from gateway.domain.price import FEMTO_PER_NANO
from gateway.http.holding import STORE_WAIT_S, CreditsEnded

log = logging.getLogger(__name__)

#: Between two tries to get more ahead of time, while there is nothing to be had.
_PAUSE_S = 1.0
#: Between two tries of one who waits.
_WAIT_PAUSE_S = 0.15
#: How long one who has used up its hold waits for other requests of the account to end. A listener does not notice.
_OTHERS_WAIT_S = 2.0


class TurnHold:
    """need: what must be held (femto-credits, list price) for what was used by now and so many output tokens more.
    slice_tokens: how much output is held ahead."""

    def __init__(
        self, engine: CreditEngine, reservation: Reservation, need: Callable[[int], int], slice_tokens: int
    ) -> None:
        self._engine = engine
        self._reservation = reservation
        self._need = need
        self._slice = slice_tokens
        self._error: StoreError | None = None
        self._not_before = 0.0
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def cover(self, *, patient: bool) -> None:
        """Wait until everything that was used is held for; where less than half a slice is left, ask for more without
        waiting. patient: also for other requests of the account, which may end. Raises CreditsEnded where there is no
        more, StoreError where the store has not said so in time."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        while self._held < self._need(0):
            await self._wait_for(self._task, began + STORE_WAIT_S)  # it may have asked for too little
            if self._held >= self._need(0):
                break
            before = self._held
            await self._wait_for(self._start(), began + STORE_WAIT_S)
            if self._held > before:
                continue
            waited_s = loop.time() + _WAIT_PAUSE_S - began
            if self._error is not None and waited_s >= STORE_WAIT_S:
                raise self._error
            patience_s = _OTHERS_WAIT_S if patient and self._others_hold else 0.0
            if self._error is None and (self._closed or waited_s >= patience_s):
                raise CreditsEnded
            await asyncio.sleep(_WAIT_PAUSE_S)
        if self._held < self._need(self._slice // 2) and self._task is None and loop.time() >= self._not_before:
            self._start()

    def close(self) -> None:
        """Ask for nothing more."""
        self._closed = True
        if self._task is not None:
            self._task.cancel()

    @property
    def _held(self) -> int:
        return self._reservation.reserved.payg_nano * FEMTO_PER_NANO

    @property
    def _others_hold(self) -> bool:
        held = self._reservation.reserved
        return held.funds.held_nano + held.funds.balance_held_nano > held.held_nano

    async def _wait_for(self, task: "asyncio.Task[None] | None", deadline: float) -> None:
        if task is None:
            return
        left_s = max(0.0, deadline - asyncio.get_running_loop().time())
        done, _ = await asyncio.wait({task}, timeout=left_s)
        if not done:
            raise self._error or StoreUnavailable("no answer in time")

    def _start(self) -> "asyncio.Task[None]":
        self._task = asyncio.get_running_loop().create_task(self._extend())
        return self._task

    async def _extend(self) -> None:
        try:
            await self._engine.extend(self._reservation, self._need(self._slice), self._look())
        except StoreError as error:
            if self._error is None:
                log.warning("%s: the hold cannot be extended yet: %s", self._reservation.id, error)
            self._error = error
        except EngineError as error:
            log.error("%s: the hold cannot be extended: %s", self._reservation.id, error)
            self._closed = True
        else:
            self._error = None
        finally:
            self._task = None
        if self._held < self._need(self._slice // 2):
            self._not_before = asyncio.get_running_loop().time() + _PAUSE_S

    def _look(self) -> Seen:
        return self._reservation.look() if self._reservation.look else self._reservation.seen
