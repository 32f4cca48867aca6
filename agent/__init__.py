"""A model cache for one node: downloads once, proves every byte, publishes with one rename."""

__version__ = "0.1.0"

USER_AGENT = f"localmodel-agent/{__version__}"
