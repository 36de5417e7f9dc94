"""What keeps an upstream from answering.

UpstreamError
├── UpstreamUnavailable   no connection, or it broke
│   ├── NoConnection      nothing was sent
│   └── HungUp            the connection ended before any byte of an answer
└── UpstreamTimeout       the request was sent and no answer came, or it did not go on, in time
    └── DeadlinePassed    the answer took longer than the gateway lets any take
"""


class UpstreamError(Exception):
    """Base of what keeps an upstream from answering."""


class UpstreamUnavailable(UpstreamError):
    """No connection, or it broke before the answer was whole."""


class NoConnection(UpstreamUnavailable):
    """Nobody takes a connection there: nothing was sent."""


class HungUp(UpstreamUnavailable):
    """The connection ended after the request was sent and before any byte of an answer."""


class UpstreamTimeout(UpstreamError):
    """The request was sent and the answer did not come, or did not go on, in time."""


class DeadlinePassed(UpstreamTimeout):
    """The answer took longer than the gateway lets any take; the upstream itself did not fail."""
