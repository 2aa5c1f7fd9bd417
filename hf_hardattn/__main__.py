"""Entry point of ``python -m hf_hardattn``, for launchers that run a module."""

from .cli import main

if __name__ == "__main__":
    main()
