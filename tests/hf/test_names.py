import dataclasses

import pytest

from memkit.errors import InputError, ModelError
from memkit.hf.names import CACHE, NAMES, cache_argument, returned_cache, take_cache, with_cache


def older(ids, past_key_values=None): ...


def newer(ids, cache=None): ...


def both(ids, past_key_values=None, cache=None): ...


def neither(ids, **kwargs): ...


def test_the_name_is_the_signatures():
    assert [cache_argument(forward) for forward in (older, newer, both)] == ["past_key_values", "cache", "cache"]
    with pytest.raises(ModelError, match="neither must have a cache, named cache or past_key_values, got none"):
        cache_argument(neither)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_returned_is_found_by_the_outputs_fields(name):
    output = dataclasses.make_dataclass("Output", ["logits", name])(1, 2)
    assert returned_cache(output) == 2
    assert returned_cache(dataclasses.replace(output, **{name: None})) is None
    with pytest.raises(ModelError, match="Output must have a cache"):
        returned_cache(dataclasses.make_dataclass("Output", ["logits"])(1))


def test_a_cache_is_taken_by_whichever_name():
    for name in NAMES:
        for others in ({}, dict.fromkeys(NAMES)):
            arguments = {"use_cache": True, **others, name: 5}
            assert take_cache(arguments) == 5
            assert arguments == {"use_cache": True}
    assert take_cache({"use_cache": True}) is None
    with pytest.raises(InputError, match="one cache, got both"):
        take_cache(dict.fromkeys(NAMES, 5))


def test_the_installed_release_agrees_with_itself(tiny):
    assert CACHE in NAMES
    for module in (tiny, tiny.model):
        assert with_cache(module, 5) == {CACHE: 5}
