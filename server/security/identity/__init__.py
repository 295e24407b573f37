"""Who a caller is: the auth file, tokens, certificates, and the limit of wrong ones."""
