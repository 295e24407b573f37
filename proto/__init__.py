"""The contract: what clients and server say to each other. Stubs are made by `make proto`."""
