"""TorchScript programs: whole networks, with their code, that the user trusts."""
