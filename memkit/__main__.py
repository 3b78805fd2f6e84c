"""`python -m memkit`, which launchers of several processes can run too."""

from memkit.cli import app

__all__: list[str] = []

if __name__ == "__main__":
    app()
