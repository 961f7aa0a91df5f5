"""Training under a policy: what is pruned stays pruned, and quality comes back."""
