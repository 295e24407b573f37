"""Identity of callers: the auth file, tokens, certificates, and the limit of wrong ones."""
