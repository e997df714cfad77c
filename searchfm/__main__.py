"""`python -m searchfm` is `searchfm`."""

from searchfm.cli import main

if __name__ == "__main__":
    main()
