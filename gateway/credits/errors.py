"""What can go wrong between the gateway and its store.

StoreError
├── StoreUnavailable     no answer: down, stopped, too slow, or the reply was lost
│   └── ReplyLost        the command was written; whether it ran is unknown
├── StoreRefused         the store answered with an error
└── StoreUnsuitable      the store's settings would lose credits
EngineError
├── UnknownAccount
├── UnknownPlan          the account's plan is not in the configuration
├── UnknownReservation
├── OperationConflict    an operation id was used before for something else
└── Rejected             an operation that cannot be done, with the reason
"""


class StoreError(Exception):
    """Base of everything that concerns the store."""


class StoreUnavailable(StoreError):
    """The store gave no answer."""


class ReplyLost(StoreUnavailable):
    """The connection ended between a command and its reply."""


class StoreRefused(StoreError):
    """The store answered with an error; its text starts with the error's code."""


class StoreUnsuitable(StoreError):
    """The store's settings would lose credits."""


class EngineError(Exception):
    """Base of what an operator's call can be refused for; the text is for people."""


class UnknownAccount(EngineError):
    """No such account."""

    def __init__(self, account: str) -> None:
        super().__init__(f"there is no account {account!r}")


class UnknownPlan(EngineError):
    """The plan is not in the configuration."""

    def __init__(self, plan: str) -> None:
        super().__init__(f"plan {plan!r} is not in the configuration")
        self.plan = plan


class UnknownReservation(EngineError):
    """No such reservation, or its record's retention (24 h after its end) is over."""

    def __init__(self, reservation: str) -> None:
        super().__init__(f"there is no reservation {reservation!r}")


class OperationConflict(EngineError):
    """The operation id was used before with other parameters."""

    def __init__(self, operation: str) -> None:
        super().__init__(f"operation id {operation!r} was used before for something else; nothing was done")


class Rejected(EngineError):
    """The operation cannot be done; nothing was changed."""
