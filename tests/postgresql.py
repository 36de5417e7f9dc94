"""A private PostgreSQL cluster for a test: on a unix socket only, in a directory of its own, ended with the block."""

import os
import pwd
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_TIMEOUT_S = 60


@contextmanager
def postgresql_cluster() -> Iterator[str]:
    """The directory of a running cluster's socket; its superuser postgres needs no password. Skips the test where
    PostgreSQL is not installed, unless QUOTA_GATEWAY_REQUIRE_POSTGRES is set."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not programs:
        if os.environ.get("QUOTA_GATEWAY_REQUIRE_POSTGRES"):
            pytest.fail("PostgreSQL is not installed")
        pytest.skip("PostgreSQL is not installed")
    initdb, pg_ctl = programs[-1], programs[-1].with_name("pg_ctl")
    # It refuses to run as root.
    user = pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())
    with tempfile.TemporaryDirectory(prefix="qg-pg-") as directory:
        os.chown(directory, user.pw_uid, user.pw_gid)

        def run(*command: str | Path) -> None:
            subprocess.run(
                command,
                cwd=directory,
                user=user.pw_uid if os.geteuid() == 0 else None,
                group=user.pw_gid if os.geteuid() == 0 else None,
                extra_groups=[] if os.geteuid() == 0 else None,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                # A file, not a pipe: the server inherits it and outlives the command.
                stdout=log,
                stderr=log,
                timeout=_TIMEOUT_S,
                check=True,
            )

        with (Path(directory) / "commands.log").open("w") as log:
            data = Path(directory) / "data"
            run(initdb, "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
            options = f"-c listen_addresses='' -c unix_socket_directories='{directory}' -c fsync=off"
            run(pg_ctl, "-D", data, "-w", "-l", data / "server.log", "-o", options, "start")
            try:
                yield directory
            finally:
                run(pg_ctl, "-D", data, "-w", "-m", "immediate", "stop")
