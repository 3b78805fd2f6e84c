"""A spec's copies are specs of their own."""

from memkit import PolicySpec
from memkit.pieces.chunking import FixedChunkerSpec


def test_a_changed_copy_of_a_built_spec_builds_what_it_says():
    spec = PolicySpec(window={"kind": "block", "chunks": 2})
    assert spec.build().chunk == 256

    assert spec.model_copy(update={"chunker": FixedChunkerSpec(size=8)}).build().chunk == 8
    assert spec.named("other").build().name == "other"
