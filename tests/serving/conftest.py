"""The fixtures of the in-process service."""

from tests.service import client, kept, make_image, service, service_store, tools

__all__ = ["client", "kept", "make_image", "service", "service_store", "tools"]
