"""`python -m gptj_q8` is `gptj-q8`."""

from gptj_q8.cli import main

if __name__ == "__main__":
    main()
