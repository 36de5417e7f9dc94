"""The HTTP side: the only server in the gateway, and the only place that knows status codes."""
