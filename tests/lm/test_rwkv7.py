import importlib.util

import pytest
import torch

from memkit.lm.rwkv7 import scan, scan_in_chunks

ROWS, HEADS, WIDTH = 2, 3, 5


def inputs(tokens, dtype=torch.float64, device="cpu", slowest=False, width=WIDTH):
    generator = torch.Generator().manual_seed(tokens)

    def random():
        return torch.randn(ROWS, HEADS, tokens, width, generator=generator, dtype=torch.float64)

    r, k, v, rate = random(), random(), random(), torch.sigmoid(random())
    log_w = -torch.exp(-torch.nn.functional.softplus(-random() * 3) - 0.5)
    if slowest:
        log_w = torch.full_like(log_w, -(torch.tensor(-0.5).exp().item()))  # the fastest decay there is
    direction = torch.nn.functional.normalize(random(), dim=-1)
    return [each.to(device, dtype) for each in (r, log_w, k, v, -direction, direction * rate)]


def token_by_token(r, log_w, k, v, a, b, state=None):
    """The recurrence as written."""
    state = r.new_zeros(*r.shape[:2], r.shape[-1], v.shape[-1]) if state is None else state
    outputs = []
    for t in range(r.shape[2]):
        removed = torch.einsum("bhk,bhkv->bhv", a[:, :, t], state)
        state = log_w[:, :, t].exp().unsqueeze(-1) * state
        state = state + torch.einsum("bhk,bhv->bhkv", b[:, :, t], removed)
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, :, t], v[:, :, t])
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, r[:, :, t]))
    return torch.stack(outputs, dim=2), state


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_chunks_equal_tokens(tokens, chunk):
    given = inputs(tokens)
    expected, state = token_by_token(*given)
    found, after = scan_in_chunks(*given, chunk=chunk)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(after, state, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("fastest", [False, True])
def test_float32_is_enough_for_a_chunk(fastest):
    given = inputs(200, slowest=fastest)
    expected, _ = token_by_token(*given)
    found, _ = scan(*(each.float() for each in given), None)
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=1e-4)


def test_split_equals_whole_with_gradients():
    leaves = [each.requires_grad_() for each in inputs(50)]
    whole, end = scan(*leaves, None)
    state, parts = None, []
    for begin, stop in ((0, 20), (20, 21), (21, 50)):
        out, state = scan(*(leaf[:, :, begin:stop] for leaf in leaves), state)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 2), whole)
    torch.testing.assert_close(state, end)
    one = torch.autograd.grad(whole.square().sum() + end.sum(), leaves)
    other = torch.autograd.grad(torch.cat(parts, 2).square().sum() + state.sum(), leaves)
    by_tokens, last = token_by_token(*leaves)
    third = torch.autograd.grad(by_tokens.square().sum() + last.sum(), leaves)
    for grads in zip(one, other, third, strict=True):
        torch.testing.assert_close(grads[0], grads[1], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(grads[0], grads[2], atol=1e-9, rtol=1e-9)


def test_no_tokens_leave_the_state_alone():
    state = torch.randn(ROWS, HEADS, WIDTH, WIDTH)
    out, after = scan(*inputs(0, torch.float32), state)
    assert out.shape == (ROWS, HEADS, 0, WIDTH)
    assert after is state


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("fla") is None,
    reason="needs CUDA and flash-linear-attention",
)
def test_the_cuda_kernel_agrees():
    given = inputs(150, torch.float32, "cuda", width=64)
    expected, state = scan_in_chunks(*given)
    found, after = scan(*given, None)
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(after, state, atol=2e-2, rtol=2e-2)
