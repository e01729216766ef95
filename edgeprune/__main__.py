"""`python -m edgeprune`."""

from edgeprune.cli.main import main

if __name__ == "__main__":
    main()
