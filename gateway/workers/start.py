"""The program of a worker process. It runs the package that its parent runs, whatever the working directory has."""

import sys
from pathlib import Path

_ROOT = str(Path(__file__).parents[2])
if _ROOT not in sys.path:
    sys.path.insert(0, _ROOT)

from gateway.workers.worker import main  # noqa: E402

sys.exit(main())
