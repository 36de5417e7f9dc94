"""How far each rule of counting is from the truth: ``python -m tests.benchmarks.counting_error [--prompts N]``.

Streams prompts through a real llama.cpp server and prints, for each rule, counted tokens / tokens by the server's own
usage at the stream's end: the least, the median and the most. Below 1 a stream is handed out more than is held for it;
above 1 it holds more than it needs. The figures in README.md come from here. This server does not report its usage on
every chunk: there ``usage`` is what it falls back to, ``chunks``.
"""

import argparse
import asyncio
import random
from statistics import median

import aiohttp

from gateway.apis.chat_stream import ChatStream
from gateway.config.model import CountOutput
from gateway.domain.request import Ask, Bound
from tests.upstreams.llama import CONTEXT_TOKENS, MODEL_NAME, PARALLEL, running_llama

RULES: tuple[CountOutput, ...] = ("chunks", "bytes", "usage")
_WORDS = "why does the quick brown fox jump over a lazy dog naïve 東京 42 {} \n".split(" ")


async def _count(session: aiohttp.ClientSession, url: str, prompt: str, max_tokens: int) -> dict[CountOutput, float]:
    bound = Bound(CONTEXT_TOKENS, 1, max_tokens)
    streams = {rule: ChatStream(Ask("chat", MODEL_NAME, None, stream=True), bound, rule) for rule in RULES}
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "temperature": 1.5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with session.post(f"{url}/chat/completions", json=body) as answer:
        counted = dict.fromkeys(RULES, 0)
        async for line in answer.content:
            for rule, stream in streams.items():
                stream.feed(line)
                if stream.usage is None:  # at the end, but before the server tells the truth
                    counted[rule] = stream.counted
    usage = streams["chunks"].usage
    assert usage is not None
    return {rule: counted[rule] / usage.output_tokens for rule in RULES}


async def _measure(url: str, prompts: int) -> list[dict[CountOutput, float]]:
    pick = random.Random(1)
    gate = asyncio.Semaphore(PARALLEL)

    async def one() -> dict[CountOutput, float]:
        prompt, max_tokens = " ".join(pick.choices(_WORDS, k=pick.randint(1, 60))), pick.randint(16, 600)
        async with gate:
            return await _count(session, url, prompt, max_tokens)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        return await asyncio.gather(*(one() for _ in range(prompts)))


def _main() -> None:
    parser = argparse.ArgumentParser(description="counted tokens by rule, against a real server's usage")
    parser.add_argument("--prompts", type=int, default=100)
    prompts = parser.parse_args().prompts
    with running_llama() as url:
        measured = asyncio.run(_measure(url, prompts))
    print(f"{'rule':8}{'min':>8}{'median':>8}{'max':>8}   of {prompts} streams")
    for rule in RULES:
        ratios = [one[rule] for one in measured]
        print(f"{rule:8}{min(ratios):8.3f}{median(ratios):8.3f}{max(ratios):8.3f}")


if __name__ == "__main__":
    _main()
