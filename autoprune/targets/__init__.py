"""What export targets are made of, each known by its plugin alone."""
