"""Generated from proto/classify.proto by `make proto`."""
