"""`python -m minitron.cli` is the `minitron` command; `torchrun -m minitron.cli train BUILD` starts many of them."""

from minitron.cli.main import main

if __name__ == "__main__":
    main()
