"""Run every attention layer of a stock Hugging Face decoder on a memory policy.

Three seams that transformers and torch offer carry it:

- the attention registry of transformers gets one more attention function, `memkit`, which calls `attend`.
  It has no mask function, so that no `[tokens, tokens]` mask is built;
- a transformers `Cache` is a list of layers of any kind: ours hold one `Memory` each;
- a forward pre-hook on the decoder puts such a cache in, reads off the attention mask which tokens are there, sets the
  positions, and hands the lot to every layer as one keyword argument. Forward hooks note when a call ran to its end.

Nothing else is patched, but that the model refuses continuous batching, which would put in attention of its own.
What the model's attention does is asked of the model itself (`probe`). Once detached, hooks and setting are gone; the
function stays in the registry, where nothing else names it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from memkit.budgets import Budget
from memkit.errors import ModelError
from memkit.hf.attention import Prefill
from memkit.hf.cache import named
from memkit.hf.calls import Calls
from memkit.hf.decoder import NAME, Decoder, find_decoder
from memkit.hf.hooks import Life, allow_batches, end, forbid_batches, hook, put_right, unhook
from memkit.layers import AnyLayers, LayerFunction

__all__ = ["Attached", "attach", "check_free", "detach"]


def attach(
    model: Any,
    policy: AnyLayers | LayerFunction,
    *,
    prefill: Prefill = "policy",
    profile: str | Path | None = None,
    rows: int | None = None,
    share: float | None = None,
    bytes: int | None = None,
    croppable: bool = False,
    connecting: Sequence[int] | None = None,
    boundaries: Collection[int] | None = None,
) -> Attached:
    """Every attention layer of `model` remembers as `policy` says, until the `with` block ends or `detach` is called.

    ```python
    with memkit.hf.attach(model, "untrained-kvm-sqrt"):
        model.generate(**tokenizer("Once upon a time", return_tensors="pt"), max_new_tokens=50)

    handle = memkit.hf.attach(model, {"default": "untrained-observed", "at": {"0,1,-1": "full"}})
    handle.detach()
    ```

    `model(...)` prefills, and continues with any number of tokens when its cache is passed on (`past_key_values`, from
    transformers 5.24 on `cache`); however a text is split, the result is the same. `model.generate(...)` works as
    usual: greedy, sampling, beams, assisted by another model or by the prompt. Gradients flow. `memories(cache)` gives
    each layer's memory. Groups of query heads share their key/value head's memory. Once detached, be it by an error,
    the model is as it was; a cache made before is of no use then. A copy made meanwhile is under the policy as long as
    the model is.

    Rows of unequal length are padded, on the left, on the right or anywhere, with a 2D `attention_mask` over this
    call's tokens or over all so far: a row's tokens are read as if they stood alone, and the next call continues each
    row at its own position. Texts packed into one row, their positions starting again, are read as rows of their own.
    `generate` reads the last column of the logits, so it needs padding on the left
    (`tokenizer.padding_side = "left"`), as pipelines set it.

    Args:
        model: a Hugging Face decoder, with a head or without; a model of text and images, of which the text is meant;
            or a wrapper with `get_base_model`, as peft's.
        policy: one for all layers that attend to everything, or a mapping, the path of its YAML file, or a function of
            the layer's number (`memkit.layers`). Where it says `heads: {profile: auto}` and a head profile of this
            model is shipped, it is put in.
        prefill: `policy`: bounded from the first chunk on. `full`: the first call of a cache, the prompt, is read
            exactly, and all that is older than the window then leaves at once (`memkit.compress`); from there on the
            policy goes on. What rows are worth is asked as `observe.readers` says. Rows must then be of equal length in
            the first call. With `repeat` or `mixed` the prompt is read twice, in one call, and only the first reading
            stays.
        profile: how every policy that grows shares its slots among heads: the name of a shipped head profile, a YAML
            file's path, or `auto`; None: as each policy says itself (`heads`).
        rows: slots and window of each head, on average, put into every policy with a fixed number of slots or a sliding
            window; others stay as they are. Where they are fewer than the policy's own, one whose slots compete by what
            is observed has a smaller window, which so has no larger a share. One of rows, share and bytes at most.
        share: with `prefill="full"`, the same as a share of the tokens of each cache's prompt.
        bytes: as many rows as take no more bytes for one text, however long it gets, for policies that stop growing.
        croppable: whether the newest 64 tokens of a cache may be taken back (`cache.crop(-n)`) from its first call on,
            but for a prompt that is read in full; it holds a second memory and these tokens for it. Assisted decoding
            announces it for the model that chooses; the model that assists it needs this where it is attached.
        connecting: ids of tokens that stand between a text and its second reading, as `connecting_ids(tokenizer)`
            gives; None: none.
        boundaries: token ids that are the last of their chunk (ends of sentences, of messages), for policies with
            `chunker: boundaries`. Calls must then give `input_ids`.

    Raises:
        ModelError: no such model, one that is attached already, or one whose attention does what no memory can (soft
            caps, sinks in the softmax, an own attention function, an encoder, …); a policy with learned parts, or one
            that un-rotates keys where it is not known how they were rotated.
        PolicyError: a policy that is not there or not right, a layer that is not there.
        InputError: a budget or a profile that no policy has a use for, a budget that is too small; and later, by calls
            that the engine cannot serve (4D masks, positions of one's own, …).
    """
    decoder = find_decoder(model)
    put_right(decoder.owner)
    check_free(decoder)
    budget = Budget.of(rows, share, bytes, prefill)
    return Attached(decoder, Calls(decoder, policy, prefill, budget, profile, croppable, connecting, boundaries))


def detach(model: Any) -> None:
    """Leave an attached model as it was, for whoever has lost the handle that `attach` gave; no error where it is none.

    model: as for `attach`. Raises `ModelError` where it is no Hugging Face decoder.
    """
    end(find_decoder(model).owner)


class Attached:
    """A model that is attached; a context manager, and a handle with `detach`.

    model: what was given; policies: of each attention layer, by its number, with the rows that a budget gives them (a
    share's are those of each cache); rows: these, None without a budget, or where they are a share.
    """

    def __init__(self, decoder: Decoder, calls: Calls) -> None:
        self._decoder, self._life = decoder, Life(decoder.module.config._attn_implementation)
        self.model, self.policies = decoder.given, calls.policies
        self.rows = calls.rows
        decoder.module.set_attn_implementation(NAME)
        forbid_batches(decoder.owner, self._life)
        for module in decoder.outer:
            hook(module, self._life, calls.before_outer, calls.after_outer)
        hook(decoder.module, self._life, calls.before_decoder, calls.after_decoder)

    @property
    def attached(self) -> bool:
        """Whether it still is."""
        return not self._life.over

    def detach(self) -> None:
        """Leave the model as it was. Once is enough; more is no error."""
        if self._life.over:
            return
        self._life.over = True
        unhook([*self._decoder.outer, self._decoder.module], self._life)
        allow_batches(self._decoder.owner)
        self._decoder.module.set_attn_implementation(self._life.implementation)

    def __enter__(self) -> Any:
        if self._life.over:
            raise ModelError("this handle was detached; attach the model anew")
        return self.model

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def __repr__(self) -> str:
        names = ", ".join(dict.fromkeys(named(policy) for policy in self.policies.values()))
        return f"Attached({type(self.model).__name__}, {names}{'' if self.attached else ', detached'})"


def check_free(decoder: Decoder) -> None:
    """Raise `ModelError` where a model is attached already."""
    if decoder.module.config._attn_implementation == NAME:
        raise ModelError(
            "a model (or a config shared by two) carries one policy at a time, got a second attach; "
            "leave the first `with` block, or detach its handle, before"
        )
