"""The endpoints that are metered, a module each: how a request is read, what is forwarded, how an answer is billed."""
