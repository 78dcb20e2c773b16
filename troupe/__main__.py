"""`python -m troupe`: the command `troupe`."""

from troupe.imports import main

main()
