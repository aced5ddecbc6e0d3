"""`python -m aliked` is the command `aliked`."""

from aliked.commands import main

if __name__ == "__main__":
    main()
