"""The wire format of the gRPC API: .proto files, and the modules generated from them by `generate`."""
