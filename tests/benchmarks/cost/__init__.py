"""What the gateway costs beside a proxy that does nothing: ``python -m tests.benchmarks.cost``."""
