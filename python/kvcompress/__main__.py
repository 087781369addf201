"""`python -m kvcompress` is the command line."""

from kvcompress.cli import main

main()
