"""The public surface: exactly these names, each documented."""

import inspect

import pytest

import attnlab
import attnlab.nn

SURFACE = {
    attnlab: {
        "AttentionResult", "Modifier", "Score", "attention", "attention_with_stats",
        "cost", "dot_product_attention", "explain", "masks", "modifiers", "scores",
    },
    attnlab.scores: {
        "Score", "ScoreCost", "additive", "bilinear", "concat", "cosine", "cost", "dot",
        "mlp", "projected_keys", "scaled_dot",
    },
    attnlab.modifiers: {
        "Modifier", "alibi", "alibi_slopes", "bias", "clipped_relative",
        "relative_bias", "soft_cap",
    },
    attnlab.masks: {
        "Mask", "anchor", "as_mask", "big_bird", "blocks", "causal", "chunked", "dense",
        "dilated_window", "documents", "full", "lengths", "longformer", "per_head",
        "predicate", "prefix", "random_blocks", "sliding_window", "streaming",
    },
    attnlab.nn: {
        "Alibi", "Alignment", "AnchorProjections", "AttentiveDecoder",
        "BahdanauDecoder", "Bidirectional", "Block", "BlockState", "Cache", "Cell",
        "ClippedRelative", "Decoded", "Decoder", "DecoderState", "Embedding", "Encoded",
        "Encoder", "EncoderDecoder", "FeedForward", "GRU", "GatedFeedForward",
        "KeyValue", "LSTM", "LSTMState", "Learned", "LuongDecoder",
        "MaskedLanguageModel", "MaxoutReadout", "MultiHeadAttention", "NoResidual",
        "PlainDecoder", "Positions", "PostNorm", "PreNorm", "PredictiveAlignment",
        "Readout", "Recurrent", "RecurrentDecoder", "RecurrentEncoder",
        "RecurrentEncoderDecoder", "RecurrentLanguageModel",
        "RecurrentLanguageModelState", "RecurrentState", "RelativeBias", "Residual",
        "Rotary", "Sinusoidal", "Stack", "StackedCells", "attention_fn", "beam_search",
        "full_cache", "greedy", "make_blocks", "restrict", "ring_cache", "sample",
        "sinusoids", "streaming_cache", "weights",
    },
}  # fmt: skip


def public(module):
    rooms = {"bench", "implementations", "nn", "ops", "prng", "pytrees", "types"}
    own = {"base", "bias", "data", "inner", "intervals", "pairwise", "patterns"}
    own |= {"geometry", "layouts", "liveness", "planning", "relative", "structural"}
    own |= {"anchors", "attention", "blocks", "cache", "decoding", "drop_in"}
    own |= {"layers", "parameters", "positions", "projected", "stack", "transformer"}
    own |= {"embedding", "standard"}
    own |= {"alignment", "bahdanau", "cells", "luong", "projection", "readouts"}
    own |= {"recurrent", "recurrent_decoders", "recurrent_lm", "seq2seq"}
    found = {n for n in vars(module) if not n.startswith("_")}
    if module is attnlab:
        return found - rooms
    modules = {n for n in found if inspect.ismodule(getattr(module, n))}
    return found - (modules & own)


@pytest.mark.parametrize("module", SURFACE, ids=lambda m: m.__name__)
def test_names(module):
    assert public(module) == SURFACE[module]


@pytest.mark.parametrize("module", SURFACE, ids=lambda m: m.__name__)
def test_every_name_is_documented(module):
    for name in SURFACE[module]:
        text = inspect.getdoc(getattr(module, name))
        assert text, f"{module.__name__}.{name} has no docstring"
        assert text.splitlines()[0].endswith((".", "?")), f"{module.__name__}.{name}"


@pytest.mark.parametrize("module", SURFACE, ids=lambda m: m.__name__)
def test_signatures_name_rng_not_key(module):
    """A PRNG argument is ``rng``; ``key`` is what a query is compared with."""
    for name in SURFACE[module]:
        thing = getattr(module, name)
        for function in (thing, getattr(thing, "init", None)):
            if inspect.isfunction(function) or inspect.ismethod(function):
                assert "rng_key" not in inspect.signature(function).parameters
