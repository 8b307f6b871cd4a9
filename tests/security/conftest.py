"""The fixtures of the in-process service."""

from tests.security.front import front, keys
from tests.security.rollouts import http, models
from tests.service import client, kept, make_image, service, service_store, tools

__all__ = ["client", "front", "http", "kept", "keys", "make_image", "models", "service", "service_store", "tools"]
