"""The fixtures of the in-process service."""

from tests.security.front import front, kept, keys
from tests.security.rollouts import http, models
from tests.service import client, make_image, service, service_store, tools

__all__ = ["client", "front", "http", "kept", "keys", "make_image", "models", "service", "service_store", "tools"]
