"""`python -m almrr_pipeline`: the `almrr` command."""

from almrr_pipeline.cli import main

if __name__ == "__main__":
    main()
