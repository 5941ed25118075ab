"""The gRPC edge: proto messages to requests and events and back, statuses with details, the server.

Knows the service only as `service.MusicService`.
"""
