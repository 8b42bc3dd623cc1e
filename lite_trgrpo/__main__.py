"""`python -m lite_trgrpo`, the same as the console script."""

from lite_trgrpo.cli import main

if __name__ == "__main__":
    main()
