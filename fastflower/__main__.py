"""`python -m fastflower` and `torchrun -m fastflower` are the `fastflower` command."""

from fastflower.cli import main

if __name__ == "__main__":
    main()
