"""Losses are of the model's own logits, whatever it does to them behind its head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaForCausalLM

import memkit
from memkit import hf
from memkit.errors import ModelError
from memkit.evals.reading import losses, read
from memkit.hf.logits import output_head
from memkit.passkey import find_passkeys
from memkit.texts import default_text
from tests.hf.tiny import Letters, randomised, tiny_config

SCALED = [
    (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 8.0}),
    (CohereForCausalLM, CohereConfig, {"logit_scale": 0.0625}),
    (LlamaForCausalLM, None, {"final_logit_softcapping": None}),
]


@pytest.mark.parametrize(("model", "config", "changes"), SCALED)
@torch.no_grad()
def test_losses_are_the_models_own(model: Any, config: Any, changes: dict[str, Any], ids: torch.Tensor):
    tiny = randomised(model(tiny_config(*[each for each in (config,) if each is not None], **changes)))
    logits = tiny(ids).logits
    torch.testing.assert_close(output_head(tiny)(tiny.base_model(ids).last_hidden_state), logits)
    wanted = torch.nn.functional.cross_entropy(logits[0, 49:-1].double(), ids[0, 50:])
    targets = torch.zeros_like(ids, dtype=torch.bool)
    targets[0, 50:] = True
    with hf.attach(tiny, "full"):
        nats, _ = losses(read(tiny, ids), ids, targets)
    torch.testing.assert_close(nats.mean(), wanted, atol=1e-4, rtol=0)
    loaded = hf.LoadedModel(tiny, Letters(), "tiny", 0.0)
    compared = memkit.compare(["full"], model=loaded, tokens=200, skip=50, decoded=2).policies[0]
    text = torch.tensor([Letters()(default_text()[:200])["input_ids"]])
    own = torch.nn.functional.cross_entropy(tiny(text).logits[0, 49:-1].double(), text[0, 50:])
    assert compared.loss == pytest.approx(float(own), abs=1e-4)


@torch.no_grad()
def test_what_is_done_to_logits_and_not_known_is_refused(tiny: Any, monkeypatch: pytest.MonkeyPatch):
    output_head(tiny)
    whole = tiny.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = whole(*args, **kwargs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(tiny, "forward", doubled)
    with pytest.raises(ModelError, match="in a way that is not known"):
        find_passkeys(["full"], model=hf.LoadedModel(tiny, Letters(), "tiny", 0.0), tokens=300, placements=1)
