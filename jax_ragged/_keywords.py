"""Answers keywords that other libraries have with the name that this package has.

`teaches` wraps a function and looks at keywords that its signature lacks, and at no others. The
signature, as `inspect.signature` and type checkers see it, is the function's own.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# Our arguments, and the names that other libraries have for the same.
_SAME = {
    "query": "q queries query_states queries_states",
    "key": "k keys key_states k_cache key_cache k_pages key_pages cached_key",
    "value": "v values value_states v_cache value_cache v_pages value_pages cached_value",
    "lengths": (
        "length lens seq_lens seqlens seq_len seq_lengths sequence_lengths sequence_end kv_lens "
        "kv_len kv_lengths lengths_kv kv_seq_lens kv_seqlens kv_seq_lengths seq_lens_k seqused_k "
        "cache_seqlens cache_lens cache_lengths context_lens context_len context_lengths "
        "key_value_seq_lengths kv_seq_len"
    ),
    "starts": "start start_idx seq_starts sequence_start kv_starts window_start cache_leftpad",
    "softmax_scale": "scale sm_scale scaling scale_factor attn_scale qk_scale softmax_factor",
    "logits_soft_cap": (
        "soft_cap softcap softcapping logit_cap logits_cap logit_soft_cap attn_soft_cap "
        "attn_softcap attn_logits_soft_cap attn_logit_softcapping logits_softcap"
    ),
    "block_size": "block_k block_kv block_size_k bkv kv_block_size block_sizes",
    "mask_value": "mask_val neg_inf",
    "implementation": "impl backend platform",
    "partition": "partition_spec pspec sharding shardings in_specs out_specs",
    "out_dtype": "dtype out_type output_dtype preferred_element_type",
    "page_table": (
        "page_tables pages page_indices page_ids block_table block_tables block_indices "
        "kv_page_indices"
    ),
    "key_scale": "k_scale k_scales key_scales k_descale k_scales_pages",
    "value_scale": "v_scale v_scales value_scales v_descale v_scales_pages",
    "cache_layout": "layout kv_layout tensor_layout qkv_layout input_layout",
    "sinks": "sink s_aux softmax_aux attention_sinks attention_sink learnable_sink",
    "axis": "axis_name axis_names dim",
}
# Names of things that are said in another way here, and the argument of ours that says them.
_OTHERWISE: dict[str, tuple[str, str]] = {
    name: (ours, how)
    for names, ours, how in (
        (
            "mask attn_mask attention_mask key_mask kv_mask key_padding_mask padding_mask",
            "lengths",
            "Pass where each row's window ends: lengths=mask.sum(axis=-1) for a boolean mask "
            "[B, S] that is True for the first positions of a row; for others, "
            "jax_ragged.windows_from_mask(mask) returns lengths and starts.",
        ),
        (
            "is_causal causal use_causal_mask",
            "lengths",
            "Pass a window for each query, lengths [B, Q]: the position of the query, plus 1.",
        ),
        (
            "sliding_window sliding_window_size window window_size local_window_size "
            "attention_window left_window",
            "starts",
            "Pass the first position of each window: starts=lengths - window.",
        ),
        (
            "bias ab attn_bias attention_bias alibi alibi_slopes rel_pos_bias",
            "query",
            "A bias that is linear in the position, such as ALiBi's, is one more column of query "
            "and key; no other bias is taken.",
        ),
        (
            "cu_seqlens cu_seqlens_q cu_seqlens_k cu_q_lens q_lens query_start_loc max_seqlen "
            "cum_seqlens_q cum_seqlens_k max_seqlen_q max_seqlen_k max_seq_len max_context_len "
            "num_seqs query_seq_lengths seq_lens_q",
            "query",
            "Pass the queries of a row as query [B, Q, Hq, D], and 0 as the length of a query "
            "that is not there.",
        ),
        (
            "kv_cache kv_pages kv",
            "key",
            "Pass keys and values as two arrays, key= and value=.",
        ),
        (
            "num_heads num_kv_heads num_q_heads num_query_heads head_dim enable_gqa page_size "
            "num_key_value_heads",
            "key",
            "Leave it out: it is read from the shapes of query, key and value.",
        ),
        (
            "dropout dropout_p dropout_prob dropout_rate dropout_rng dropout_seed deterministic",
            "query",
            "There is no dropout; leave it out.",
        ),
        (
            "return_lse return_softmax_lse return_residual return_residuals save_residuals "
            "return_statistics return_attn_probs",
            "query",
            "The statistics are always returned: the log-sum-exp of the logits is "
            "max_logits + log(denominator).",
        ),
        (
            "normalize_output normalize",
            "query",
            "out is always normalised; out * denominator[..., None] is not.",
        ),
        (
            "mesh",
            "partition",
            "Pass partition=NamedSharding(mesh, PartitionSpec(batch axes, head axes)), or call "
            "under jax.set_mesh(mesh).",
        ),
        (
            "segment_ids",
            "lengths",
            "Pass each sequence as a row of its own, or give each query its window with starts and "
            "lengths [B, Q].",
        ),
        (
            "precision",
            "query",
            "Products always accumulate in float32, or in float64 for float64; leave it out.",
        ),
        (
            "interpret interpret_mode",
            "implementation",
            "Call under jax.experimental.pallas.tpu.force_tpu_interpret_mode().",
        ),
    )
    for name in names.split()
}
_OURS = {name: ours for ours, names in _SAME.items() for name in names.split()}


def _advice(name: str, parameters: Mapping[str, object], beyond: Mapping[str, str]) -> str | None:
    """A sentence about a keyword that is not among the parameters, or None to let Python speak."""
    if name in _OTHERWISE:
        ours, advice = _OTHERWISE[name]
        return f"{name}: {advice}" if ours in parameters else None
    ours = _OURS.get(name, name)
    if ours in parameters:
        return f"{name} is called {ours} here."
    if ours in beyond:
        return f"{name}: {beyond[ours]}"
    close = difflib.get_close_matches(name, parameters, n=1)
    return f"{name}: Did you mean {close[0]}?" if close else None


def teaches(
    beyond: Mapping[str, str] | None = None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function answer keywords of other libraries with advice, in Python's TypeError.

    Args:
      beyond: for arguments of this package that the function lacks, the sentence to answer with.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters = inspect.signature(function).parameters
        known = frozenset(parameters)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if not known.issuperset(kwargs):
                unknown = [name for name in kwargs if name not in known]
                answers = [_advice(name, parameters, beyond or {}) for name in unknown]
                if any(answers):
                    raise TypeError(
                        f"{function.__name__}() got an unexpected keyword argument "
                        f"{unknown[0]!r}. {' '.join(filter(None, answers))}"
                    )
            return function(*args, **kwargs)

        return call

    return decorate
