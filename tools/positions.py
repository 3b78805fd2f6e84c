"""Loss by position of a trained model over bytes, with its slots, with them deleted, and under full attention.

    python tools/positions.py tiny-kvm-sqrt --text hamlet_gut.txt --tokens 2048 --documents 12

Documents are pieces of the text, evenly spaced. Differences are paired: document by document, against the model's own
policy; the standard error is over documents.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from memkit.evals import documents_of, loss_by_position, stretches, without_slots
from memkit.lm import AttentionMixerSpec, ByteTokenizer, load_model, load_model_spec
from memkit.texts import read_text


def main() -> None:
    """Print a line per policy and stretch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=12)
    given = parser.parse_args()
    own = next(mixer.policy for mixer in load_model_spec(given.model).mixers if isinstance(mixer, AttentionMixerSpec))
    documents = documents_of(ByteTokenizer().encode(read_text(given.text)), given.tokens, given.documents)
    edges = [1, *(2**power for power in range(6, 24) if 2**power < given.tokens)]
    base = loss_by_position(load_model(given.model), documents)
    print(f"{given.model}, {given.documents} × {given.tokens} bytes of {given.text.name}, nats per byte")
    for part in stretches(base, edges):
        print(f"as trained     {part.first:5}–{part.last:5}  {part.mean:.4f} ± {part.error:.4f}")
    for label, policy in (("slots deleted", without_slots(own)), ("full", "full")):
        other = loss_by_position(load_model(given.model, policy=policy), documents)
        for part in stretches(other, edges, against=base):
            print(f"{label:13}  {part.first:5}–{part.last:5}  {part.mean:+.4f} ± {part.error:.4f}")


if __name__ == "__main__":
    main()
