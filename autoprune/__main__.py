"""Runs the command line by ``python -m autoprune``, installed or not."""

from autoprune.cli import main

if __name__ == "__main__":
    main()
