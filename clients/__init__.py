"""Questions: a client library and commands that know only the contract in proto/."""
