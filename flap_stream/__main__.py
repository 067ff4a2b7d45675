"""`python -m flap_stream` is the command `flap-stream`."""

import sys

from flap_stream.commands import interruption


def main() -> int:
    """The command line as a process of its own, from its first moment to its last."""
    interruption.arm()
    try:
        from flap_stream.cli import main as command

        return command()
    finally:
        interruption.disarm()


if __name__ == "__main__":
    sys.exit(main())
