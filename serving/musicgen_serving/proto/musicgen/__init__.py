"""Generated code; see `musicgen_serving.proto.generate`."""
