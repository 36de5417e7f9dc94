"""A reverse proxy that meters model APIs against plans and prepaid credits."""

__version__ = "0.1.0"
