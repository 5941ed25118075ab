"""The HTTP ingress: a FastAPI application over `service.MusicService`."""

from musicgen_serving.http_api.app import create_app

__all__ = ["create_app"]
