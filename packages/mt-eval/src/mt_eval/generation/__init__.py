"""Text generation: how a token is chosen, how sequences grow, and the `mt generate` command."""
