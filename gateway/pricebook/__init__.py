"""The price book: prices that a source lists, compared with models.yaml and written into it."""
