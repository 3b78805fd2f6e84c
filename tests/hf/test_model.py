import copy
import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, EncoderDecoderCache
from transformers.cache_utils import Cache

from memkit import InputError, MemoryStateError, ModelError, load_model
from memkit.hf import MemkitConfig, MemkitForCausalLM
from memkit.hf.names import CACHE, returned_cache
from memkit.hf.names import NAMES as NAMES_OF_CACHE
from memkit.lm import MemoryLM
from tests.hf.tiny import tiny_config

NAMES = ["tiny-kvm-rwkv7", "tiny-ovq", "tiny-full"]
PROMPTS = [[7, 1, 200, 13, 5, 5, 90], [3], [44, 45, 46]]


def made(name) -> MemoryLM:
    # Windows of 8 at most: generated tokens leave them, so the memory is in use.
    overrides: dict[str, Any] = {"width": 32, "depth": 2, "heads": 2, "rotary.width": 8}
    if "kvm" in name:
        changes = {"chunker.size": 4, "growth.factor": 2, "growth.floor": 4}
        overrides["layers.default.policy"] = {"from": "kvm-sqrt-16", **changes}
    if "ovq" in name:
        overrides["layers.default.policy"] = {"from": "ovq-1024", "chunker.size": 4}
    model = load_model(name, overrides)
    torch.manual_seed(5)
    with torch.no_grad():  # away from the initialisation, where every block adds nothing
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=NAMES)
def wrapped(request) -> MemkitForCausalLM:
    return MemkitForCausalLM.wrap(made(request.param), pad_token_id=0)


@pytest.fixture
def hybrid() -> MemkitForCausalLM:
    return MemkitForCausalLM.wrap(made("tiny-kvm-rwkv7"), pad_token_id=0)


def padded(left=True) -> dict[str, torch.Tensor]:
    longest = max(len(prompt) for prompt in PROMPTS)
    ids, mask = torch.full((3, longest), 99), torch.zeros(3, longest, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        where = slice(longest - len(prompt), None) if left else slice(len(prompt))
        ids[row, where], mask[row, where] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_logits_are_the_models_own_however_split(wrapped):
    ids = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(0))
    expected, _ = wrapped.model(ids)
    assert torch.equal(wrapped(ids).logits, expected)
    assert returned_cache(wrapped(ids, use_cache=False)) is None
    close(wrapped(ids, logits_to_keep=1).logits, expected[:, -1:])
    assert torch.equal(wrapped(ids, return_dict=False)[0], expected)
    cache, parts = None, []
    for part in ids.split([13, 1, 26], dim=1):
        output = wrapped(part, **{CACHE: cache})
        cache = returned_cache(output)
        parts.append(output.logits)
    close(torch.cat(parts, dim=1), expected)
    assert cache is not None
    assert cache.get_seq_length() == 40
    assert cache.layers[0].memory.seen.tolist() == [40, 40]


@torch.no_grad()
def test_padding_anywhere_changes_nothing(wrapped):
    following = torch.tensor([[9, 9], [9, 8], [7, 8]])
    mask = torch.tensor([[1, 1], [0, 1], [1, 0]])
    for left in (True, False):
        batch = padded(left)
        first = wrapped(**batch)
        given = torch.cat((batch["attention_mask"], mask), dim=1)
        cache = returned_cache(first)
        second = wrapped(following, attention_mask=given, **{CACHE: cache})
        for row, prompt in enumerate(PROMPTS):
            expected = wrapped(torch.tensor([prompt + following[row][mask[row].bool()].tolist()])).logits[0]
            close(first.logits[row][batch["attention_mask"][row].bool()], expected[: len(prompt)])
            close(second.logits[row][mask[row].bool()], expected[len(prompt) :])
        assert not first.logits[batch["attention_mask"] == 0].any()


def test_generate_is_memkits_own(wrapped):
    expected = wrapped.model.generate(PROMPTS, max_new_tokens=20)
    found = wrapped.generate(**padded(), max_new_tokens=20, do_sample=False)
    assert torch.equal(found[:, 7:], expected)
    alone = wrapped.generate(torch.tensor([PROMPTS[2]]), max_new_tokens=20, do_sample=False)
    assert torch.equal(alone[0, 3:], expected[2])
    for options in ({"use_cache": False}, {"prefill_chunk_size": 3}):
        assert torch.equal(wrapped.generate(**padded(), max_new_tokens=20, do_sample=False, **options), found)


def alone(model, row: int, **options: Any) -> torch.Tensor:
    """What is generated for one prompt without company or padding."""
    prompt = torch.tensor([PROMPTS[row]])
    return model.generate(prompt, do_sample=False, **options)[:, prompt.shape[1] :]


@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"prefill_chunk_size": 2}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=str,
)
@pytest.mark.parametrize("where", ["right", "middle", "pad ids"])
def test_generate_continues_padded_rows_as_the_rows_alone(wrapped, where, options):
    batch = padded(left=False)
    if where == "middle":  # tokens, padding, tokens, padding
        order = torch.tensor([0, 3, 4, 1, 2, 5, 6])
        batch = {name: tensor[:, order] for name, tensor in batch.items()}
        # The rows stay what they are: their tokens keep their order.
        for row, prompt in enumerate(PROMPTS):
            batch["input_ids"][row, batch["attention_mask"][row].bool()] = torch.tensor(prompt)
    elif where == "pad ids":  # transformers itself makes the mask, of what is not the padding's id
        batch = {"input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)}
    options = {"max_new_tokens": 12, **options}
    found = wrapped.generate(**batch, do_sample=False, **options)[:, 7:]
    expected = torch.cat([alone(wrapped, row, **options) for row in range(3)])
    assert torch.equal(found, expected)


@torch.no_grad()
def test_generate_continues_rows_that_bring_nothing_new(wrapped):
    # Row 1's last token came with the call before; between the two, rows were copied, chosen and repeated.
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    ids = torch.tensor([PROMPTS[2], [3, 99, 99]])
    cache = returned_cache(wrapped(ids, attention_mask=mask))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache = copy.deepcopy(cache)
    more = torch.tensor([[99, 99], [8, 9]])
    mask = torch.cat((mask.flip(0), torch.tensor([[0, 0], [1, 1]])), dim=1)
    options = {"max_new_tokens": 8, "do_sample": False}
    whole = torch.cat((ids.flip(0), more), dim=1)
    found = wrapped.generate(whole, attention_mask=mask, **{CACHE: cache}, **options)[:, 5:]
    for row, prompt in enumerate(([3], [*PROMPTS[2], 8, 9])):
        expected = wrapped.generate(torch.tensor([prompt]), **options)[0, len(prompt) :]
        assert torch.equal(found[row], expected)


@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 2}, {"num_beams": 2}, {"max_new_tokens": 1}], ids=str)
def test_generate_refuses_a_row_without_a_token(hybrid, options):
    batch = padded(left=False)
    batch["attention_mask"][1] = 0
    with pytest.raises(InputError, match=r"generate needs a token in every row.* without one; leave these out"):
        hybrid.generate(**batch, **{"max_new_tokens": 3, "do_sample": False, **options})
    batch["input_ids"][1] = 0
    with pytest.raises(InputError, match="generate needs a token in every row"):
        hybrid.generate(batch["input_ids"], **{"max_new_tokens": 3, "do_sample": False, **options})


@torch.no_grad()
def test_logits_are_carried_over_padding_only_where_asked(wrapped):
    batch = padded(left=False)
    plain, carried = wrapped(**batch).logits, wrapped(**batch, carry_logits=True).logits
    there = batch["attention_mask"].bool()
    assert torch.equal(carried[there], plain[there])
    assert not plain[~there].any()
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(carried[row, len(prompt) :], plain[row, len(prompt) - 1].expand(7 - len(prompt), -1))
    left = padded()
    assert not wrapped(**left, carry_logits=True).logits[left["attention_mask"] == 0].any()


def test_stop_ids_and_drawing(hybrid):
    expected = hybrid.model.generate(PROMPTS, max_new_tokens=9)
    stop = int(expected[0, 4])
    found = hybrid.generate(**padded(), max_new_tokens=9, do_sample=False, eos_token_id=stop, pad_token_id=255)
    own = hybrid.model.generate(PROMPTS, max_new_tokens=9, stop_ids=[stop], pad_id=255)
    assert torch.equal(found[:, 7:], own)
    torch.manual_seed(0)
    drawn = hybrid.generate(torch.tensor([[1, 2]]), max_new_tokens=4, do_sample=True, num_return_sequences=20)
    assert len(drawn[:, 2].unique()) > 3


def test_beams_are_those_of_reading_everything_anew(wrapped):
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    expected = wrapped.generate(**padded(), **options, use_cache=False)
    assert torch.equal(wrapped.generate(**padded(), **options), expected)


@torch.no_grad()
def test_caches_are_continued_copied_and_filled(hybrid):
    ids = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(0))
    expected = hybrid.generate(ids, max_new_tokens=6, do_sample=False)
    cache = returned_cache(hybrid(ids[:, :20]))
    for past in (copy.deepcopy(cache), cache):
        assert torch.equal(hybrid.generate(ids, max_new_tokens=6, do_sample=False, **{CACHE: past}), expected)
    empty = DynamicCache()
    parts = [hybrid(part, **{CACHE: empty}).logits for part in ids.split(11, dim=1)]
    close(torch.cat(parts, dim=1), hybrid(ids).logits)


def test_loss_and_gradients_are_the_models_own(wrapped):
    batch = padded()
    for mask, lengths in ((None, None), (batch["attention_mask"], torch.tensor([7, 1, 3]))):
        ids = batch["input_ids"]
        right = padded(left=False)["input_ids"] if lengths is not None else ids
        wrapped.zero_grad()
        expected = wrapped.model.loss(right, lengths=lengths)
        expected.backward()
        gradient = wrapped.model.embedding.weight.grad.clone()
        wrapped.zero_grad()
        loss = wrapped(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        close(loss, expected)
        close(wrapped.model.embedding.weight.grad, gradient)


@pytest.mark.parametrize("name", NAMES_OF_CACHE)
@torch.no_grad()
def test_the_cache_may_be_given_by_either_name(hybrid, name):
    ids = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(0))
    cache = returned_cache(hybrid(ids[:, :20]))
    output = hybrid(ids[:, 20:], **{name: cache})
    close(output.logits, hybrid(ids).logits[:, 20:])
    assert returned_cache(output) is cache
    assert output.keys() - set(hybrid.config.keys_to_ignore_at_inference) == {"logits"}
    with pytest.raises(InputError, match="one cache, got both cache and past_key_values"):
        hybrid(ids, cache=cache, past_key_values=cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_through_transformers(wrapped, tmp_path, dtype):
    wrapped = wrapped.to(dtype)
    wrapped.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, MemkitConfig)
    assert config.model_spec == wrapped.model.spec
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (
        (256, 32, 2, 2)
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert isinstance(loaded, MemkitForCausalLM)
    assert not loaded.training
    theirs = wrapped.state_dict()
    assert loaded.state_dict().keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in loaded.state_dict().items())
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, wrapped(ids).logits)


def test_files_that_lack_weights_are_refused(hybrid, tmp_path):
    hybrid.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.blocks.1.mixer.attention.query.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="the files lack weights of a Linear"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_fresh_model_starts_as_memkits_does():
    spec = made("tiny-full").spec
    torch.manual_seed(1)
    expected = MemoryLM(spec)
    torch.manual_seed(1)
    found = AutoModelForCausalLM.from_config(MemkitConfig(spec)).model
    assert all(torch.equal(one, other) for one, other in zip(found.parameters(), expected.parameters(), strict=True))


def test_config_is_plain_data_and_checked():
    spec = made("tiny-ovq").spec
    config = MemkitConfig(spec, eos_token_id=3)
    assert MemkitConfig(**json.loads(config.to_json_string())).model_spec == spec
    assert MemkitConfig(config.spec).model_spec == spec
    with pytest.raises(ValueError, match="depht"):
        MemkitConfig({**spec.model_dump(mode="json"), "depht": 3})
    with pytest.raises(ModelError, match="declares no model"):
        _ = MemkitConfig().model_spec


@pytest.mark.parametrize(
    ("past", "message"),
    [
        ((), "must be a transformers Cache, got a tuple; leave it out"),
        (((torch.zeros(1), torch.zeros(1)),), "must be a transformers Cache, got a tuple"),
        ([], "must be a transformers Cache, got a list"),
        ("cache", "must be a transformers Cache, got a str"),
        (EncoderDecoderCache(DynamicCache(), DynamicCache()), "got a EncoderDecoderCache of 0 tokens"),
    ],
)
@torch.no_grad()
def test_what_is_no_cache_of_ours_is_refused_in_one_line(hybrid, past, message):
    with pytest.raises(InputError, match=f"{CACHE} {message}|from this model, {message}") as caught:
        hybrid(torch.tensor([[1, 2, 3]]), **{CACHE: past})
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_an_empty_cache_is_filled_whatever_it_was_made_for(hybrid):
    ids = torch.tensor([[1, 2, 3, 4]])
    for cache in (Cache(layers=[]), DynamicCache(config=tiny_config())):
        parts = [hybrid(part, **{CACHE: cache}).logits for part in ids.split(3, dim=1)]
        close(torch.cat(parts, dim=1), hybrid(ids).logits)


class Interrupted(Exception):
    pass


def interrupt(*_: Any) -> None:
    raise Interrupted


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("place", ["model.blocks.1", "model.head_norm", "model.head"])
def test_a_call_that_was_interrupted_is_no_call_to_continue(wrapped, place, gradients):
    ids = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(gradients):
        cache = returned_cache(wrapped(ids[:, :20]))
        kept = copy.deepcopy(cache) if not gradients else None
        hook = wrapped.get_submodule(place).register_forward_pre_hook(interrupt)
        with pytest.raises(Interrupted):
            wrapped(ids[:, 20:21], **{CACHE: cache})
        hook.remove()
        # With gradients nothing is taken over, nor is it by a block of RWKV-7: the call may be tried again.
        rwkv = cache.layers[0].memory.memories[0] is None
        if place != "model.head" and (gradients or (rwkv and place == "model.blocks.1")):
            close(wrapped(ids[:, 20:], **{CACHE: cache}).logits, wrapped(ids).logits[:, 20:])
            return
        with pytest.raises(MemoryStateError, match=r"last call was interrupted.*read the text anew") as caught:
            wrapped(ids[:, 20:21], **{CACHE: cache})
        assert "\n" not in str(caught.value)
        if kept is not None:
            close(wrapped(ids[:, 20:], **{CACHE: kept}).logits, wrapped(ids).logits[:, 20:])


def test_what_is_refused(hybrid):
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(InputError, match="has no position_ids; leave it out"):
        hybrid(ids, position_ids=torch.tensor([[4, 5, 6]]))
    with pytest.raises(InputError, match="has no output_attentions"):
        hybrid(ids, output_attentions=True)
    with pytest.raises(InputError, match=r"attention_mask must cover.*\(1, 3\).*got \(1, 1, 3, 3\)"):
        hybrid(ids, attention_mask=torch.ones(1, 1, 3, 3))
    with pytest.raises(MemoryStateError, match=r"must mark the tokens already read, \[3\] per row, got \[2\]"):
        hybrid(ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]), **{CACHE: returned_cache(hybrid(ids))})
    with pytest.raises(InputError, match="got a StaticCache"):
        hybrid.generate(ids, max_new_tokens=2, cache_implementation="static")
    assert hybrid.generate(ids, max_new_tokens=2).shape == (1, 5)  # what transformers keeps of it is not in the way
    # By transformers itself where it asks a cache beforehand, which came with 5.24.
    with pytest.raises(ValueError, match=r"cannot forget its newest tokens|requires a cache that can be cropped"):
        hybrid.generate(ids, max_new_tokens=8, prompt_lookup_num_tokens=2, do_sample=False)
    with pytest.raises(ModelError, match="the vocabulary is declared, 256"):
        hybrid.resize_token_embeddings(300)
