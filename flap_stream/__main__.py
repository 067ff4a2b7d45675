"""`python -m flap_stream` is the command `flap-stream`."""

import sys

from flap_stream.cli import main

if __name__ == "__main__":
    sys.exit(main())
