"""The fixtures of the in-process service."""

from tests.service import client, make_image, service, service_store, tools

__all__ = ["client", "make_image", "service", "service_store", "tools"]
