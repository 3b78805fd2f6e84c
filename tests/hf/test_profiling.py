"""Head profiles of stock models: measured, and put on each layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import memkit
from memkit import hf
from memkit.errors import ModelError
from memkit.hf import ablation, asking, profiling
from memkit.hf.decoder import facts_of, find_decoder
from memkit.hf.logits import output_head
from memkit.hf.names import CACHE, returned_cache
from memkit.hf.probe import probe
from memkit.memory import HeadsMemory
from memkit.pieces.admission import mean_of_neighbours
from memkit.pieces.evidence import Evidence
from memkit.profiles import HeadProfile
from memkit.texts import default_text
from tests.hf.tiny import randomised, tiny_config

SMALL = {"chunker.size": 8, "growth.slots": 24, "observe.queries": 8}
TOKENS = 600


class Words:
    """A tokenizer: a character each."""

    def __call__(self, text: str, verbose: bool = True, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 200 for letter in text]}


def loaded(model: Any) -> hf.LoadedModel:
    return hf.LoadedModel(model, Words(), "tiny", 0.0)


def text(seed: int) -> str:
    random = torch.Generator().manual_seed(seed)
    return "".join(chr(40 + letter) for letter in torch.randint(80, (2 * TOKENS,), generator=random).tolist())


def test_heads_whose_rows_are_worth_nothing_get_least(tiny: Any):
    with torch.no_grad():  # the second key/value head of layer 0 has no values, so no output to lose
        tiny.model.layers[0].self_attn.v_proj.weight[8:] = 0
    measured = hf.measure_profile(loaded(tiny), [text(0), text(1)], tokens=TOKENS, rows=(64, 128))
    ratios = torch.tensor(measured.profile.ratios)
    assert ratios.sum() == ratios.numel()
    assert ratios[0, 1] == ratios.min() == profiling.LEAST
    assert measured.each.shape == (2, 2, 2)
    assert -1 <= measured.stability <= 1
    assert tiny.config._attn_implementation != profiling.NAME
    assert measured.profile.fits(facts_of(tiny.config))


def test_shares_come_from_the_largest_scores():
    scores = torch.zeros(2, 1, 100)
    scores[0, 0] = torch.arange(100).flip(0) / 100  # the newest are worth least
    ratios = profiling._ratios(scores, 40)  # 4 sinks, 5 newest, 31 others: 15 for each head, 32 for whoever needs them
    assert ratios.flatten().tolist() == pytest.approx([(15 + 32) / 31, 15 / 31])


def test_measuring_says_what_does_not_fit(tiny: Any):
    with pytest.raises(memkit.InputError, match="600 tokens at least, got one of 5"):
        hf.measure_profile(loaded(tiny), ["short"], tokens=TOKENS, rows=(64,))
    with pytest.raises(memkit.InputError, match="one text at least"):
        hf.measure_profile(loaded(tiny), [], tokens=TOKENS, rows=(64,))
    with pytest.raises(memkit.ModelError, match="one policy at a time"), hf.attach(tiny, "full"):
        hf.measure_profile(loaded(tiny), [text(0)], tokens=TOKENS, rows=(64,))


@pytest.mark.parametrize(("readers", "groups"), [("next", 1), ("repeat", 1), ("mixed", 2)])
def test_who_says_what_rows_are_worth(readers: Any, groups: int, monkeypatch: pytest.MonkeyPatch):
    model = randomised(LlamaForCausalLM(tiny_config(max_position_embeddings=2048)))
    asked: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    worth = profiling.row_worth

    def row_worth(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> Any:
        asked.append((queries, keys, values))
        return worth(queries, keys, values, scale)

    monkeypatch.setattr(profiling, "row_worth", row_worth)
    measured = hf.measure_profile(loaded(model), [text(0)], tokens=TOKENS, rows=(64, 128), readers=readers)
    assert measured.profile.readers == readers
    assert len(asked) == 2 * groups
    first = profiling.connecting_ids(Words())
    ids = Words()(text(0))["input_ids"][:TOKENS]
    with torch.no_grad():  # what is asked of is the first reading, whoever asks
        hidden = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[0]
    layer: Any = model.model.layers[0]
    values = layer.self_attn.v_proj(layer.input_layernorm(hidden)).unflatten(-1, (2, -1)).transpose(1, 2)
    for _, keys, found in asked[:groups]:
        assert keys.shape[2] == TOKENS
        torch.testing.assert_close(found, values, atol=1e-5, rtol=1e-5)
    if readers != "next":  # by the newest tokens of a text that is read twice
        again = asked[groups - 1][0]
        assert again.shape[2] == 512
        turned = model.model.rotary_emb(hidden, torch.tensor([[2 * TOKENS + len(first) - 1]]))
        last = layer.self_attn.q_proj(layer.input_layernorm(hidden))[:, -1:].unflatten(-1, (4, -1)).transpose(1, 2)
        expected = apply_rotary_pos_emb(last, last, *turned)[0]
        torch.testing.assert_close(again[:, :, -1:], expected, atol=1e-5, rtol=1e-4)


def test_a_text_that_cannot_be_read_twice_is_refused(tiny: Any):
    with pytest.raises(memkit.InputError, match=r"repeat take 12\d\d positions, and the model knows 512"):
        hf.measure_profile(loaded(tiny), [text(0)], tokens=TOKENS, rows=(64,), readers="repeat")
    with pytest.raises(memkit.InputError, match="readers must be"):
        hf.measure_profile(loaded(tiny), [text(0)], tokens=TOKENS, rows=(64,), readers="all")  # type: ignore[arg-type]


@torch.no_grad()
def test_a_model_reads_with_each_layers_ratios(tmp_path: Path, ids: torch.Tensor):
    model = randomised(memkit_model())
    path = tmp_path / "profile.yaml"
    ratios = ((0.5, 2.0), (1.0, 0.5))
    path.write_text(HeadProfile(model=facts_of(model.config), ratios=ratios).to_yaml())
    spec = memkit.load_policy("untrained-observed", SMALL | {"heads.profile": str(path)})
    with hf.attach(model, spec):
        whole = model(ids)
        parts, cache = [], None
        for begin, end in ((0, 37), (37, 38), (38, 70), (70, 90)):
            output = model(ids[:, begin:end], **({} if cache is None else {CACHE: cache}))
            cache = returned_cache(output)
            parts.append(output.logits)
        beams = model.generate(ids[:1], num_beams=2, max_new_tokens=20, do_sample=False)
    memories = hf.memories(cache)
    assert all(isinstance(memory, HeadsMemory) for memory in memories)
    assert [memory.slots[0].tolist() for memory in memories] == [[4 + 10, 4 + 40], [24, 4 + 10]]
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, atol=2e-4, rtol=2e-4)
    assert beams.shape == (1, 110)
    with pytest.raises(memkit.PolicyError, match="another model"), hf.attach(randomised(memkit_model(64)), spec):
        pass


@torch.no_grad()
@pytest.mark.parametrize("as_path", [str, Path])
def test_attach_takes_the_profile_beside_the_policy(tmp_path: Path, ids: torch.Tensor, as_path: Callable[[Path], Any]):
    model = randomised(memkit_model())
    path = tmp_path / "profile.yaml"
    path.write_text(HeadProfile(model=facts_of(model.config), ratios=((0.5, 2.0), (1.0, 0.5))).to_yaml())
    even = memkit.load_policy("untrained-observed", SMALL | {"heads": {"ratios": [1.0]}})
    said = memkit.load_policy("untrained-observed", SMALL | {"heads": {"profile": str(path)}})
    with hf.attach(model, said):
        wanted = model(ids).logits
    with hf.attach(model, {"default": even}, profile=as_path(path)):
        torch.testing.assert_close(model(ids).logits, wanted, atol=0, rtol=0)
    with hf.attach(model, lambda layer: "full" if layer == 0 else even, profile=as_path(path)) as attached:
        memories = hf.memories(returned_cache(attached(ids)))
    assert isinstance(memories[1], HeadsMemory)
    assert memories[1].slots[0].tolist() == [4 + 20, 4 + 10]


def test_a_profile_that_cannot_be_put_in_is_refused(tmp_path: Path):
    model = memkit_model()
    with pytest.raises(memkit.InputError, match=r"profile shares slots among heads, and full has none"):
        hf.attach(model, "full", profile="auto")
    with pytest.raises(memkit.PolicyError, match=r"smollm2-135m.* is of a model of 30 layers"):
        hf.attach(model, "untrained-observed", profile="smollm2-135m")
    with pytest.raises(memkit.PolicyError, match=r"none.yaml: no such file"):
        hf.attach(model, "untrained-observed", profile=tmp_path / "none.yaml")


def memkit_model(wide: int = 32) -> Any:
    return LlamaForCausalLM(tiny_config(hidden_size=wide))


@torch.no_grad()
def test_the_shipped_model_finds_its_shipped_profile(smollm: hf.LoadedModel):
    handle = hf.attach(smollm.model, "untrained-observed")
    handle.detach()
    assert sum(layer.head_ratios is not None for layer in handle.policies.values()) > 10
    slots = [layer.head_policies or ((3, layer),) for layer in handle.policies.values()]
    total = sum(heads * policy.slots_after(10_000) for layer in slots for heads, policy in layer)
    assert abs(total - 90 * 384) <= 45  # but for rounding, as many as with even shares


def test_layers_that_slide_have_no_part_in_a_profile(monkeypatch):
    config = tiny_config(
        Gemma3TextConfig, sliding_window=16, head_dim=8, layer_types=["sliding_attention", "full_attention"]
    )
    model = randomised(Gemma3ForCausalLM(config))
    loaded = hf.LoadedModel(model, Words(), "tiny", 0.0)
    text = default_text()
    seen: list[torch.Tensor] = []
    whole = profiling.row_worth

    def noted(readers, keys, values, *rest):
        seen.append(values)
        return whole(readers, keys, values, *rest)

    monkeypatch.setattr(profiling, "row_worth", noted)
    measured = hf.measure_profile(loaded, [text], tokens=600, rows=[64])
    sliding, attending = measured.profile.ratios
    assert sliding == (1.0, 1.0)
    assert sum(attending) == pytest.approx(2)
    assert len(set(attending)) == 2
    stock: list[torch.Tensor] = []
    values: Any = model.get_submodule("model.layers.1.self_attn.v_proj")
    hook = values.register_forward_hook(lambda _module, _given, output: stock.append(output))
    with torch.no_grad():
        model(torch.tensor([Words()(text[:600])["input_ids"]]))
    hook.remove()
    torch.testing.assert_close(seen[0], stock[0].unflatten(-1, (2, -1)).transpose(1, 2), atol=1e-4, rtol=1e-4)


def test_a_model_without_rows_to_share_is_refused():
    config = tiny_config(MistralConfig, sliding_window=100)
    loaded = hf.LoadedModel(randomised(MistralForCausalLM(config)), Words(), "tiny", 0.0)
    with pytest.raises(ModelError, match="no layer of this model attends to everything"):
        hf.measure_profile(loaded, [default_text()], tokens=600, rows=[64])


def test_a_blind_head_costs_what_a_window_costs():
    """In a model of one head, blind is to read by a sliding window and sinks: attached, it says the same."""
    model = randomised(LlamaForCausalLM(tiny_config(num_hidden_layers=1, num_key_value_heads=1, num_attention_heads=1)))
    ids = torch.tensor([Words()(text(0))["input_ids"][:400]])
    decoder = find_decoder(model)

    def loss() -> float:
        with torch.no_grad():
            logits = model(ids).logits[0, 299:-1]
        return float(torch.nn.functional.cross_entropy(logits, ids[0, 300:]))

    whole = loss()
    with hf.attach(model, ablation.BLIND):
        blind = loss()
    (cost,) = ablation.head_costs(decoder.module, output_head(model), ids[0].tolist(), 300, probe(decoder), [(0, 0)])
    assert abs(blind - whole) > 1e-3
    assert cost == pytest.approx(blind - whole, abs=2e-5)
    assert model.config._attn_implementation != ablation.NAME


def test_layers_before_a_blind_head_need_not_read_again(tiny: Any, monkeypatch: pytest.MonkeyPatch):
    decoder, ids = find_decoder(tiny), Words()(text(0))["input_ids"][:400]
    given = (decoder.module, output_head(tiny), ids, 300, probe(decoder), [(0, 0), (0, 1), (1, 0), (1, 1)])
    read: list[int] = []
    hooks = [layer.mlp.register_forward_hook(lambda *_: read.append(1)) for layer in tiny.model.layers]
    skipping, readings = ablation.head_costs(*given), len(read)
    monkeypatch.setattr(ablation, "_answer_again", lambda *_: None)
    assert ablation.head_costs(*given) == skipping
    assert readings == 2 * 3 + 2  # of two layers: as they are, and with each of the first one's heads blind
    assert len(read) - readings == 2 * 5
    assert len(set(skipping)) == 4
    for hook in hooks:
        hook.remove()
    assert all("forward" not in vars(layer) for layer in tiny.model.layers)


def test_what_no_later_layer_uses_is_worth_nothing(tiny: Any):
    with torch.no_grad():  # the second key/value head of layer 0 has outputs, and nobody reads them
        tiny.model.layers[0].self_attn.o_proj.weight[:, 16:] = 0
    settings: dict[str, Any] = {"tokens": TOKENS, "rows": (64, 128)}
    seen: list[tuple[str, int, int]] = []
    by_errors = hf.measure_profile(loaded(tiny), [text(0)], **settings)
    weighed = hf.measure_profile(
        loaded(tiny), [text(0)], **settings, ablate=True, progress=lambda *step: seen.append(step)
    )
    before, after = (torch.tensor(each.profile.ratios) for each in (by_errors, weighed))
    assert before[0, 1] > profiling.LEAST
    assert after[0, 1] == after.min() < before[0, 1]
    assert after.sum() == after.numel()
    assert "blind" in weighed.profile.measured["by"]
    assert seen == [("head profile", step + 1, 6) for step in range(6)]  # two layers, and their four heads


@pytest.mark.parametrize("ablate", [False, True])
def test_of_several_lengths_the_ratios_are_the_mean(tiny: Any, ablate: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(profiling, "ABLATED", 256)  # the same tokens of either
    settings: dict[str, Any] = {"rows": (64, 128), "ablate": ablate}
    seen: list[tuple[str, int, int]] = []
    short, long = (
        hf.measure_profile(loaded(tiny), [text(0)], tokens=each, **settings) for each in (TOKENS - 64, TOKENS)
    )
    both = hf.measure_profile(
        loaded(tiny), [text(0)], tokens=[TOKENS - 64, TOKENS], **settings, progress=lambda *step: seen.append(step)
    )
    assert ablate or not torch.equal(short.each, long.each)  # with costs one head has all but the least
    torch.testing.assert_close(both.each, (short.each + long.each) / 2)
    assert both.profile.measured["tokens"] == [TOKENS - 64, TOKENS]
    assert seen[-1] == ("head profile", 4 + 4 * ablate, 4 + 4 * ablate)  # two layers, twice; and their four heads
    with pytest.raises(memkit.InputError, match="one length at least"):
        hf.measure_profile(loaded(tiny), [text(0)], tokens=[], **settings)


def test_a_head_counts_by_what_it_costs_and_its_rows_by_their_errors():
    scores = torch.tensor([[[9.0, 9, 9, 9, 1, 2, 2], [9.0, 9, 9, 9, 1, 0, 0]]])
    worth = profiling._weighed(scores, torch.tensor([[0.9, 0.0]])).square()
    torch.testing.assert_close(worth[0, 0, 4:], torch.tensor([0.1, 0.4, 0.4]))
    torch.testing.assert_close(worth[0, 1, 4:], torch.tensor([profiling.LEAST_COST, 0, 0]))


def test_rows_go_where_one_more_gains_most():
    ranks = torch.tensor([[[50.0, 60.0], [5.0, 30.0]]])
    demand = torch.tensor([[[1.0, 1.0], [2.0, 4.0]]])
    needs = asking.Needs(ranks, demand)
    rows = 48  # 4 sinks, 6 newest; 38 for each head, 9.5 in any case
    first, second = (needs.ratios(rows, 0.25)[0] * 38).tolist()
    # The second head has its first row in any case, and its other one with 31; with 61 the first head has both.
    assert first + second == pytest.approx(76)
    assert second == pytest.approx(31)
    assert first == pytest.approx(45)
    none = asking.Needs(ranks, torch.zeros_like(demand))
    assert none.ratios(rows, 0.25)[0].tolist() == pytest.approx([1, 1])


def test_what_an_answer_demands_is_what_its_outputs_would_miss():
    random = torch.Generator().manual_seed(0)
    queries, keys, values = (
        torch.randn(1, heads, count, 8, generator=random, dtype=torch.float64)
        for heads, count in ((4, 3), (2, 20), (2, 20))
    )
    found = asking._demand(queries, keys, values, 0.4)
    expected = torch.zeros(2, 20, dtype=torch.float64)
    for head in range(4):
        for nth in range(3):
            seen = 18 + nth
            shares = (0.4 * keys[0, head // 2, :seen] @ queries[0, head, nth]).softmax(0)
            output = shares @ values[0, head // 2, :seen]
            for row in range(seen):
                missed = shares[row] ** 2 * (values[0, head // 2, row] - output).square().sum()
                expected[head // 2, row] += missed / output.square().sum()
    torch.testing.assert_close(found, expected)


def test_rows_rank_as_a_memory_ranks_them():
    random = torch.Generator().manual_seed(1)
    tokens = 2 * asking.CHUNK
    queries, keys, values = (torch.randn(1, heads, tokens, 8, generator=random) for heads in (4, 2, 2))
    spec = memkit.load_policy("untrained-recall", {"rotary.kind": "keep", "heads": {}})
    assert (spec.chunker.size, spec.observe.apart) == (asking.CHUNK, asking.APART)  # pyright: ignore
    _, memory = memkit.attend(spec, queries, keys, values, scale=0.4)
    told = Evidence.of(memory.window.last(tokens)["evidence"]).error
    worth = mean_of_neighbours(told.sqrt(), 3)[0]
    worth[:, : asking.SINKS] = torch.inf
    expected = worth.argsort(dim=-1, descending=True).argsort(dim=-1) - asking.SINKS
    assert torch.equal(asking._ranks(queries, keys, values, 0.4, tokens), expected)


def test_a_profile_by_answers_and_its_mean_with_another(tmp_path: Path):
    model = randomised(LlamaForCausalLM(tiny_config(max_position_embeddings=4096)))
    seen: list[tuple[str, int, int]] = []
    settings: dict[str, Any] = {"tokens": 1200, "rows": (64,), "readers": "asked"}
    documents = [text(0) + text(1), text(1) + text(0)]
    measured = hf.measure_profile(loaded(model), documents, **settings, progress=lambda *step: seen.append(step))
    ratios = torch.tensor(measured.profile.ratios)
    assert measured.profile.readers == "asked"
    assert ratios.mean() == 1
    assert ratios.min() >= profiling.LEAST_WEIGHED
    assert seen[-1][1] == seen[-1][2] == len(seen) == 2 * 2 * len(asking.FACTS)  # documents, layers
    path = tmp_path / "other.yaml"
    other = HeadProfile(model=facts_of(model.config), ratios=((0.5, 2.0), (1.0, 0.5)))
    path.write_text(other.to_yaml())
    mean = hf.measure_profile(loaded(model), documents, **settings, beside=str(path)).profile
    assert mean.measured["beside"] == str(path)
    both = (measured.each.mean(0) + torch.tensor(other.ratios)) / 2
    torch.testing.assert_close(torch.tensor(mean.ratios), both, atol=profiling.STEP, rtol=0)
    with pytest.raises(memkit.InputError, match="leave ablate out"):
        hf.measure_profile(loaded(model), documents, **settings, ablate=True)
    with pytest.raises(memkit.InputError, match="raise tokens"):
        hf.measure_profile(loaded(model), documents, tokens=512, rows=(64,), readers="asked")
