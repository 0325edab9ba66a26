"""`python -m reapkit` is the command line."""

from reapkit.cli import main

if __name__ == "__main__":
    main()
