"""The wire format of the gRPC API: .proto files, and the modules that `generate` makes of them."""
