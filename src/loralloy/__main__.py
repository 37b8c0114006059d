"""`python -m loralloy` is the command `loralloy`."""

from .cli import main

if __name__ == "__main__":
    main()
