"""`python -m dldr_ext`: the same as `dldr`."""

from .cli import main

if __name__ == "__main__":
    main()
