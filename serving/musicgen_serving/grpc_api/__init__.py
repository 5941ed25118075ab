"""The gRPC ingress: conversion between proto messages and service types, statuses with details, the server.

Depends on the service only through `service.MusicService`.
"""
