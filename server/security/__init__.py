"""Identity and permission: principals, their tokens and certificates, and what they may do."""
