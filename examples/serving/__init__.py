"""A server of Llama models: its model, its files, its text, its pages, its loop and its report."""


class ModelError(Exception):
    """A model that cannot be read or used; the message says why and what to do."""
