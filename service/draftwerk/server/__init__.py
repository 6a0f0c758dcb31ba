"""The gRPC service: what proto/draftwerk/v1 describes, around one engine."""
