"""The `moecover` command, also as `python -m moecover`."""

from __future__ import annotations

import gc


def run() -> int:
    """Run the command as a process of its own; an interrupt while it is still being imported ends it quietly too.

    The garbage collector walks the millions of objects that importing torch and transformers makes, again and again and
    once more at exit: a fifth of a short run. It is called less often here, and the last walk is left out.
    """
    gc.set_threshold(100_000, 50, 100)
    try:
        from moecover.cli import main

        return main()
    except KeyboardInterrupt:
        return 130
    finally:
        gc.freeze()


if __name__ == "__main__":
    raise SystemExit(run())
