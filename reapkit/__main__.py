"""`python -m reapkit` is the command line."""

from reapkit.cli.main import main

if __name__ == "__main__":
    main()
