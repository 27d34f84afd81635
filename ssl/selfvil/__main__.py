"""`python -m selfvil`: the same as the command `selfvil`."""

from selfvil.cli import main

main()
