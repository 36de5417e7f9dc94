"""Usage as upstreams report it, and the tokens to charge for it: never below zero, never above the bound.

A room per API reads what its upstreams say: ``choices`` (chat and text completions), ``responses``, ``messages``,
``embeddings``, ``ranks``. ``figures`` and ``shown`` are what they have in common, ``billing`` what is charged. Where
the figures of one report disagree, each room says which counts.
"""

from gateway.upstream.usage.billing import Answer, billed, billed_without_usage, exceeds
from gateway.upstream.usage.choices import read_usage
from gateway.upstream.usage.embeddings import read_embeddings_usage
from gateway.upstream.usage.figures import Usage, count
from gateway.upstream.usage.messages import read_message_usage
from gateway.upstream.usage.ranks import read_ranks
from gateway.upstream.usage.responses import read_response_usage

__all__ = [
    "Answer",
    "Usage",
    "billed",
    "billed_without_usage",
    "count",
    "exceeds",
    "read_embeddings_usage",
    "read_message_usage",
    "read_ranks",
    "read_response_usage",
    "read_usage",
]
