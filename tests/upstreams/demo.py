"""The built-in demo model as an upstream in a process of its own.

``python -m tests.upstreams.demo --port N --model NAME …``; ``running_demo([NAME, …])`` starts one.
"""

import argparse
import asyncio
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from gateway.demo.upstream import DemoUpstream
from tests.upstreams.process import READY, ServerProcess, server_process


@contextmanager
def running_demo(models: Sequence[str], port: int = 0) -> Iterator[ServerProcess]:
    """The demo model under the names in models. Raises RuntimeError if it does not get ready."""
    with server_process("tests.upstreams.demo", f"--port={port}", *(f"--model={name}" for name in models)) as server:
        yield server


async def _serve(port: int, models: Sequence[str]) -> None:
    async with DemoUpstream(models, port) as upstream:
        print(f"{READY}{upstream.base_url}", flush=True)
        parent = os.getppid()
        while os.getppid() == parent:  # a test run that dies by SIGKILL leaves no server behind
            await asyncio.sleep(0.5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="the demo model under the names given")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--model", action="append", required=True, help="a name that it answers to; may come again")
    arguments = parser.parse_args()
    asyncio.run(_serve(arguments.port, arguments.model))
