"""Networks in, engines out. May import torch; the server never imports this."""
