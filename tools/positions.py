"""Loss by position of trained models over bytes: each as trained, and what deleting its slots changes.

    python tools/positions.py tiny-kvm-sqrt tiny-full --text hamlet_gut.txt --tokens 2048 --documents 12

Documents are pieces of the text, evenly spaced. Differences are paired, document by document: against the first model,
and, where slots are deleted or replaced by full attention (--full), against the same model as trained. Standard errors
are over documents.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from torch import Tensor

from memkit.evals import documents_of, loss_by_position, stretches, without_slots
from memkit.lm import AttentionMixerSpec, ByteTokenizer, load_model, load_model_spec
from memkit.policy import PolicySpec
from memkit.texts import read_text


def policy_of(model: str) -> PolicySpec | None:
    """That of the model's attention layers; None where it has none."""
    mixers = load_model_spec(model).mixers
    return next((mixer.policy for mixer in mixers if isinstance(mixer, AttentionMixerSpec)), None)


def say(label: str, losses: Tensor, edges: list[int], against: Tensor | None = None) -> None:
    """A line per stretch."""
    sign = "" if against is None else "+"
    for part in stretches(losses, edges, against=against):
        print(f"{label:40} {part.first:5}–{part.last:5}  {part.mean:{sign}.4f} ± {part.error:.4f}")


def main() -> None:
    """Print lines per model and stretch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument(
        "--full", action="store_true", help="also each under full attention, for which it was not trained"
    )
    parser.add_argument("--json", type=Path, help="write each model's mean loss at every position")
    given = parser.parse_args()
    documents = documents_of(ByteTokenizer().encode(read_text(given.text)), given.tokens, given.documents)
    edges = [1, *(2**power for power in range(6, 24) if 2**power < given.tokens)]
    print(f"{given.documents} × {given.tokens} bytes of {given.text.name}, nats per byte")
    read: dict[str, Tensor] = {}
    for model in given.models:
        read[model] = loss_by_position(load_model(model), documents)
        say(model, read[model], edges)
        if len(read) > 1:
            first = next(iter(read))
            say(f"{model} − {first}", read[model], edges, read[first])
        own = policy_of(model)
        if own is not None and own.growth.kind != "none":
            deleted = loss_by_position(load_model(model, policy=without_slots(own)), documents)
            say(f"{model}, slots deleted", deleted, edges, read[model])
        if own is not None and given.full:
            say(f"{model}, full", loss_by_position(load_model(model, policy="full"), documents), edges, read[model])
    if given.json is not None:
        lines = {model: [round(loss, 3) for loss in losses.mean(0).tolist()] for model, losses in read.items()}
        settings = {"text": given.text.name, "documents": given.documents, "tokens": given.tokens}
        given.json.write_text(json.dumps({"settings": settings, "losses": lines}), encoding="utf-8")


if __name__ == "__main__":
    main()
