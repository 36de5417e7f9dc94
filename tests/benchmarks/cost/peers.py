"""Other proxies beside ours, where they are installed. None of them is needed.

hardcap    ``python -m venv peers/hardcap``, ``peers/hardcap/bin/pip install hardcap``
LiteLLM    ``python -m venv peers/litellm``, ``peers/litellm/bin/pip install 'litellm[proxy]'``
nginx      Debian's package nginx

``QUOTA_GATEWAY_PEERS`` names the directory with the two environments (default: ``peers`` beside this checkout's files).
nginx and LiteLLM do not meter here: they only pass on. hardcap meters in a store of its own, whose CPU is not counted,
as ours is not.
"""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tests.benchmarks.cost.load import Target
from tests.benchmarks.cost.proxies import Proxy, children_of
from tests.servers import valkey_server

PEERS = Path(os.environ.get("QUOTA_GATEWAY_PEERS", "peers"))
_START_S = 120

_NGINX = """
worker_processes 1; daemon off; pid {directory}/pid; error_log {directory}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {directory}/body; proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;
  upstream model {{ server {upstream}; keepalive 256; }}
  server {{
    listen 127.0.0.1:{port}; client_max_body_size 64m; keepalive_requests 10000000;
    location / {{
      proxy_pass http://model; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""


@contextmanager
def nginx(upstream: str) -> Iterator[Proxy]:
    """One worker that passes everything on, without buffering."""
    port = _free_port()
    place = upstream.removeprefix("http://").removesuffix("/v1")
    with tempfile.TemporaryDirectory(prefix="qg-nginx-") as directory:
        config = Path(directory) / "nginx.conf"
        config.write_text(_NGINX.format(directory=directory, upstream=place, port=port))
        with _running(["nginx", "-c", str(config), "-e", f"{directory}/error.log"], port) as pid:
            yield Proxy("nginx", Target(f"http://127.0.0.1:{port}/v1"), (pid, *children_of(pid)))


@contextmanager
def litellm(upstream: str) -> Iterator[Proxy]:
    """Its proxy with one model and no database: it knows one key and meters nothing."""
    port, key = _free_port(), f"sk-{secrets.token_hex(24)}"
    with tempfile.TemporaryDirectory(prefix="qg-litellm-") as directory:
        config = Path(directory) / "config.yaml"
        config.write_text(
            "model_list:\n  - model_name: bench\n    litellm_params:\n"
            f"      {{model: openai/bench, api_base: '{upstream}', api_key: none}}\n"
            f"general_settings: {{master_key: {key}}}\n"
        )
        command = [str(PEERS / "litellm/bin/litellm"), "--config", str(config), "--port", str(port)]
        with _running([*command, "--host", "127.0.0.1"], port) as pid:
            yield Proxy("LiteLLM", Target(f"http://127.0.0.1:{port}/v1", key), (pid, *children_of(pid)))


@contextmanager
def hardcap(upstream: str) -> Iterator[Proxy]:
    """Its defaults, with one tenant whose budget is never spent."""
    port = _free_port()
    with tempfile.TemporaryDirectory(prefix="qg-hardcap-") as directory, valkey_server() as store:
        config = Path(directory) / "config.yaml"
        config.write_text(
            f"redis_url: '{store.url}'\n"
            f"upstreams: {{model: {{kind: openai, base_url: '{upstream.removesuffix('/v1')}'}}}}\n"
            "routes: {bench: {targets: [{upstream: model, model: bench}]}}\n"
            "tenants: {somebody: {api_keys: [sk-bench], budget: {window_s: 86400, total: 1000000000000}}}\n"
        )
        command = [str(PEERS / "hardcap/bin/hardcap"), "serve", "-c", str(config), "--host", "127.0.0.1"]
        with _running([*command, "--port", str(port)], port) as pid:
            yield Proxy("hardcap", Target(f"http://127.0.0.1:{port}/v1", "sk-bench"), (pid,))


def installed() -> list[Callable[[str], AbstractContextManager[Proxy]]]:
    """Those that are here."""
    programs = {
        nginx: shutil.which("nginx"),
        hardcap: shutil.which(PEERS / "hardcap/bin/hardcap"),
        litellm: shutil.which(PEERS / "litellm/bin/litellm"),
    }
    return [proxy for proxy, program in programs.items() if program]


@contextmanager
def _running(command: list[str], port: int) -> Iterator[int]:
    """The process's id, once it listens."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _START_S
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} does not start")
            time.sleep(0.1)
        yield process.pid
    finally:
        process.terminate()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
