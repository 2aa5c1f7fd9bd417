"""``python -m hf_hardattn``, for launchers that start modules."""

from .cli import main

if __name__ == "__main__":
    main()
