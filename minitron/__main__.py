"""`python -m minitron` is the `minitron` command."""

from minitron.cli.main import main

if __name__ == "__main__":
    main()
