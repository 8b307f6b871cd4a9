"""Who may do what: API keys, signed links, and how many requests a key may send."""
