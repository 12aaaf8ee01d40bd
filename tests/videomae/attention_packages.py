"""Stand-ins for the packages of videomae.attention: what their functions look like, every parameter by its name, in its
place and with its default, as in flash_attn 2.8.3.post2, flash_attn_4 4.0.0b36 and xformers 0.0.35.

They compute with plain torch, and refuse what is not asked of them here.
"""

import sys
from dataclasses import replace
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from videomae.attention import BACKENDS


def _heads_first(x):
    return x.transpose(1, 2)


def _plain(q, k, v):
    """[B, M, A, d] as the packages lay it out."""
    assert q.ndim == 4
    assert q.shape[2:] == k.shape[2:] == v.shape[2:]
    assert k.shape[1] == v.shape[1]
    scores = _heads_first(q) @ _heads_first(k).transpose(-2, -1) * q.shape[-1] ** -0.5
    return _heads_first(scores.softmax(-1) @ _heads_first(v)), scores.logsumexp(-1)


def flash_attn_qkvpacked_func(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert (dropout_p, softmax_scale, causal, window_size, softcap) == (0.0, None, False, (-1, -1), 0.0)
    assert alibi_slopes is None
    assert deterministic is torch.are_deterministic_algorithms_enabled()
    assert return_attn_probs is False
    assert qkv.ndim == 5
    assert qkv.shape[2] == 3
    return _plain(*qkv.unbind(2))[0].contiguous()


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert (dropout_p, softmax_scale, causal, window_size, softcap) == (0.0, None, False, (-1, -1), 0.0)
    assert alibi_slopes is None
    assert deterministic is torch.are_deterministic_algorithms_enabled()
    assert return_attn_probs is False
    return _plain(q, k, v)[0].contiguous()


def memory_efficient_attention(
    query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
):  # fmt: skip
    assert (attn_bias, p, scale, op, output_dtype) == (None, 0.0, None, None, None)
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    return _plain(query, key, value)[0].contiguous()


def _flash_attn_fwd(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
    window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
    intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
    block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None,
    q_descale=None, k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None,
    seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
):  # fmt: skip
    given = {**locals()}
    assert {n for n in given if n not in ("q", "k", "v", "return_lse") and given[n] is not None} == {
        *("causal", "num_threads", "num_splits", "disable_scheduler_metadata", "gather_bwd_recompute_p")
    }
    assert causal is False
    assert return_lse is True  # or there is none unless an input wants a gradient
    out, lse = _plain(q, k, v)
    return out.contiguous(), lse.float(), None, None, None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
    num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
    AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
    max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None, score_mod=None,
    score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
    learnable_sink=None,
):  # fmt: skip
    assert (softmax_scale, causal, softcap, window_size_left, window_size_right) == (None, False, 0.0, None, None)
    assert deterministic is torch.are_deterministic_algorithms_enabled()
    assert dq is dk is dv is dlse is None
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert lse.dtype == torch.float32
    assert out.shape == dout.shape == q.shape
    scale = q.shape[-1] ** -0.5
    # from the sums, as the kernel: wrong ones would show
    p = (_heads_first(q) @ _heads_first(k).transpose(-2, -1) * scale - lse[..., None].to(q)).exp()
    dp = _heads_first(dout) @ _heads_first(v).transpose(-2, -1)
    ds = p * (dp - (_heads_first(out) * _heads_first(dout)).sum(-1, keepdim=True)) * scale
    made = (ds @ _heads_first(k), ds.transpose(-2, -1) @ _heads_first(q), p.transpose(-2, -1) @ _heads_first(dout))
    return tuple(_heads_first(x).contiguous() for x in made)


MODULES = {
    "flash-attn": {"flash_attn": (flash_attn_func, flash_attn_qkvpacked_func)},
    "flash-attn-4": {
        "flash_attn": (),
        "flash_attn.cute": (),
        "flash_attn.cute.interface": (_flash_attn_fwd, _flash_attn_bwd),
    },
    "xformers": {"xformers": (), "xformers.ops": (memory_efficient_attention,)},
}


def installed(monkeypatch, *names):
    """Just these packages, as far as their records say."""

    def version(name):
        if name not in names:
            raise metadata.PackageNotFoundError(name)
        return "0"

    monkeypatch.setattr(metadata, "version", version)


def stand_in(monkeypatch, name):
    """A module by the package's name, with functions of its signature, installed; allowed on a CPU."""
    for path, functions in MODULES[name].items():
        module = ModuleType(path)
        module.__spec__, module.__path__ = ModuleSpec(path, None), []
        for function in functions:
            setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, path, module)
        parent, _, child = path.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    installed(monkeypatch, name)
    monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], needs_gpu=False))
