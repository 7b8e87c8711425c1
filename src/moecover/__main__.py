"""`python -m moecover` is the `moecover` command."""

from moecover.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
