"""`python -m t2app` is the command line."""

from t2app.cli import main

if __name__ == "__main__":
    main()
