"""Ray Serve deployments of MusicGen with HTTP and gRPC ingress."""
