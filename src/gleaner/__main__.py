import sys

from gleaner.cli import main

sys.exit(main(sys.argv[1:]))
