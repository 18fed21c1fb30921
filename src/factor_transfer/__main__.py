"""`python -m factor_transfer` is `factor-transfer`."""

from factor_transfer.cli import main

if __name__ == "__main__":
    main()
