"""Bytes to and from the servers that run the models."""
