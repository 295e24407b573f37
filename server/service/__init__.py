"""The RPCs: messages in, messages out, one table from errors to statuses."""
