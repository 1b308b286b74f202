"""Maps from parameters to tensors for families of checkpoints."""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from attnlab._src.nn.weights.recipes import (
    Names,
    Recipe,
    conv1d,
    flat,
    linear,
    part,
    stacked,
    tensor,
)


def bert(
    num_layers: int,
    *,
    prefix: str | None = None,
    first_position: int = 0,
    scan: bool = False,
) -> Names:
    """Map for BERT's encoder, and for models that name their tensors alike.

    For an ``Encoder`` of ``PostNorm`` blocks with ``LayerNorm(epsilon=1e-12)`` and
    ``jax.nn.gelu``, whose ``Embedding`` has ``Learned`` positions, the same norm, and
    ``scale=1``. The vector of token type 0 is added to the positions' vectors; other
    token types, the pooler and task heads are ignored.

    ============  =====================================================================
    BERT          defaults; gelu with ``approximate=False``
    RoBERTa       ``first_position=2``
    BigBird       ``masks.anchor`` of the first and last blocks, and ``masks.blocks`` of
                  each block's neighbours and random blocks. The library transformers
                  draws random blocks in training only: in evaluation all R of them are
                  block 0, which inner blocks so count 1 + R times (a bias of
                  ``log(1 + R)``)
    Longformer    ``first_position=2``; ``masks.longformer(window=w // 2, ...)`` and
                  ``AnchorProjections``
    ============  =====================================================================

    Args:
        num_layers: number of blocks.
        prefix: prefix of all names; if not given, it is found from the checkpoint among
            none, ``bert.``, ``roberta.`` and ``longformer.``.
        first_position: row of position 0 in the checkpoint's position table.
        scan: whether the module's ``Stack`` has ``scan=True``.

    References:
        Devlin et al., "BERT", 2019; Zaheer et al., "Big Bird", 2020; Beltagy, Peters,
        Cohan, "Longformer", 2020.
    """
    if prefix is None:
        make = functools.partial(
            bert, num_layers, first_position=first_position, scan=scan
        )
        return _prefixed(make, ("", "bert.", "roberta.", "longformer."))

    def layer(i: int) -> dict[str, Recipe]:
        at = f"{prefix}encoder.layer.{i}."
        own = f"{at}attention.self."
        anchors = [f"{own}{x}_global" for x in ("query", "key", "value")]
        inner = [f"{own}{x}" for x in ("query", "key", "value")]
        return {
            **_under("attention", _projections(*inner, f"{at}attention.output.dense")),
            **_under("attention.anchors", _projections(*anchors)),
            **_norm("attention_residual.norm", f"{at}attention.output.LayerNorm"),
            **_dense("feed_forward.up", f"{at}intermediate.dense"),
            **_dense("feed_forward.down", f"{at}output.dense"),
            **_norm("feed_forward_residual.norm", f"{at}output.LayerNorm"),
        }

    at = f"{prefix}embeddings."
    positions = Recipe(
        (f"{at}position_embeddings.weight", f"{at}token_type_embeddings.weight"),
        lambda shape: [(shape[0] + first_position, shape[1]), (None, shape[1])],
        lambda shape, table, types: table[first_position:] + types[0],
    )
    return Names(
        {
            "embedding.table.embedding": tensor(f"{at}word_embeddings.weight"),
            "embedding.position.table": positions,
            **_norm("embedding.norm", f"{at}LayerNorm"),
            **_layers("stack.blocks", num_layers, layer, scan),
        },
        within=(prefix,),
        apart=(f"{prefix}pooler.*", f"{at}position_ids", f"{at}token_type_ids"),
        # Names of norms in the oldest checkpoints, such as bert-base-uncased.
        endings=((".gamma", ".weight"), (".beta", ".bias")),
    )


def gpt2(num_layers: int, *, prefix: str | None = None, scan: bool = False) -> Names:
    """Map for GPT-2's decoder.

    For a ``Decoder`` of ``PreNorm`` blocks with ``LayerNorm(epsilon=1e-5)`` and
    ``jax.nn.gelu``, whose ``Embedding`` has ``Learned`` positions and ``scale=1``.

    Args:
        num_layers: number of blocks.
        prefix: prefix of all names but the head's; if not given, it is found from the
            checkpoint among none and ``transformer.``.
        scan: whether the module's ``Stack`` has ``scan=True``.

    References:
        Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
    """
    if prefix is None:
        make = functools.partial(gpt2, num_layers, scan=scan)
        return _prefixed(make, ("", "transformer."))

    def layer(i: int) -> dict[str, Recipe]:
        at = f"{prefix}h.{i}."
        fused = {
            f"attention.{name}.{what}": part(recipe, j, 3)
            for what, recipe in (
                ("kernel", conv1d(f"{at}attn.c_attn.weight")),
                ("bias", flat(f"{at}attn.c_attn.bias")),
            )
            for j, name in enumerate(("query", "key", "value"))
        }

        def dense(path: str, name: str, inward: int = 1) -> dict[str, Recipe]:
            return {
                f"{path}.kernel": conv1d(f"{at}{name}.weight", inward),
                f"{path}.bias": flat(f"{at}{name}.bias"),
            }

        return {
            **fused,
            **dense("attention.out", "attn.c_proj", inward=2),
            **_norm("attention_residual.norm", f"{at}ln_1"),
            **dense("feed_forward.up", "mlp.c_fc"),
            **dense("feed_forward.down", "mlp.c_proj"),
            **_norm("feed_forward_residual.norm", f"{at}ln_2"),
        }

    return Names(
        {
            "embedding.table.embedding": tensor(f"{prefix}wte.weight"),
            "embedding.position.table": tensor(f"{prefix}wpe.weight"),
            **_layers("stack.blocks", num_layers, layer, scan),
            **_norm("stack.norm", f"{prefix}ln_f"),
            "head.kernel": linear("lm_head.weight"),
        },
        within=(prefix, "lm_head."),
        # Causal masks.
        apart=(f"{prefix}h.*.attn.bias", f"{prefix}h.*.attn.masked_bias"),
        copies={"lm_head.weight": f"{prefix}wte.weight"},
    )


def mistral(num_layers: int, *, prefix: str | None = None, scan: bool = False) -> Names:
    """Map for Mistral's decoder, and for Llama and Qwen2, whose names are alike.

    For a ``Decoder`` of ``PreNorm`` blocks with ``RMSNorm`` (epsilon of the
    checkpoint's ``config.json``), ``GatedFeedForward(activation=jax.nn.silu,
    use_bias=False)`` and ``Rotary(base=rope_theta)``; attention without biases (Qwen2:
    with biases, but ``out_bias=False``); with ``Embedding(scale=1)`` and, if the output
    does not share its vectors, ``head=nnx.Linear(features, V, use_bias=False)``. The
    window of W keys in the configuration includes the query's own position:
    ``masks.sliding_window(W - 1, 0)``.

    Args:
        num_layers: number of blocks.
        prefix: prefix of all names but the head's; if not given, it is found from the
            checkpoint among ``model.`` and none.
        scan: whether the module's ``Stack`` has ``scan=True``.

    References:
        Jiang et al., "Mistral 7B", 2023.
    """
    if prefix is None:
        make = functools.partial(mistral, num_layers, scan=scan)
        return _prefixed(make, ("model.", ""))

    def layer(i: int) -> dict[str, Recipe]:
        at = f"{prefix}layers.{i}."
        inner = [f"{at}self_attn.{x}_proj" for x in "qkvo"]
        return {
            **_under("attention", _projections(*inner)),
            **_norm("attention_residual.norm", f"{at}input_layernorm"),
            **_dense("feed_forward.gate", f"{at}mlp.gate_proj"),
            **_dense("feed_forward.up", f"{at}mlp.up_proj"),
            **_dense("feed_forward.down", f"{at}mlp.down_proj"),
            **_norm("feed_forward_residual.norm", f"{at}post_attention_layernorm"),
        }

    return Names(
        {
            "embedding.table.embedding": tensor(f"{prefix}embed_tokens.weight"),
            **_layers("stack.blocks", num_layers, layer, scan),
            **_norm("stack.norm", f"{prefix}norm"),
            "head.kernel": linear("lm_head.weight"),
        },
        within=(prefix, "lm_head."),
        # Frequencies of rotary positions: in each layer, or once.
        apart=(f"{prefix}layers.*.self_attn.rotary_emb.*", f"{prefix}rotary_emb.*"),
        copies={"lm_head.weight": f"{prefix}embed_tokens.weight"},
    )


def t5(
    num_layers: int,
    *,
    prefix: str | None = None,
    tied: bool = True,
    gated: bool = False,
    scan: bool = False,
) -> Names:
    """Map for T5's encoder-decoder.

    For an ``EncoderDecoder`` of ``PreNorm`` blocks with ``RMSNorm(epsilon=1e-6)``,
    linear layers without bias, ``score=scores.dot()``, ``Embedding(scale=1)``,
    ``FeedForward`` and ``RelativeBias`` (``bidirectional=False`` in the decoder). The
    checkpoint has one table of relative biases for the encoder and one for the decoder;
    each layer gets a copy. To train them as one, give all layers of the encoder, or of
    the decoder, the same ``RelativeBias``.

    Args:
        num_layers: number of blocks of the encoder, and of the decoder.
        prefix: prefix of all names but the head's; if not given, it is found from the
            checkpoint among none and ``transformer.``.
        tied: whether the logits are products with the tokens' vectors. T5 then divides
            them by ``sqrt(features)``; this factor is put into the scale of the
            decoder's last norm. If False (T5 1.1, Flan-T5):
            ``head=nnx.Linear(features, V, use_bias=False)``.
        gated: whether feed-forward layers are ``GatedFeedForward`` (T5 1.1, Flan-T5,
            with ``jax.nn.gelu``).
        scan: whether the module's ``Stack`` has ``scan=True``.

    References:
        Raffel et al., "Exploring the Limits of Transfer Learning", 2020.
    """
    if prefix is None:
        make = functools.partial(t5, num_layers, tied=tied, gated=gated, scan=scan)
        return _prefixed(make, ("", "transformer."))

    def attention(at: str) -> dict[str, Recipe]:
        return _projections(*(f"{at}.{x}" for x in "qkvo"))

    up = "wi_1" if gated else "wi"

    def layer(side: str, i: int) -> dict[str, Recipe]:
        blocks = f"{prefix}{side}.block"
        at = f"{blocks}.{i}.layer"
        last = 2 if side == "decoder" else 1
        inner = f"{at}.{last}.DenseReluDense"
        table = f"{blocks}.0.layer.0.SelfAttention.relative_attention_bias.weight"
        result = {
            **_under("attention", attention(f"{at}.0.SelfAttention")),
            "attention.position.table": linear(table),
            **_norm("attention_residual.norm", f"{at}.0.layer_norm"),
            **_norm("feed_forward_residual.norm", f"{at}.{last}.layer_norm"),
            "feed_forward.up.kernel": linear(f"{inner}.{up}.weight"),
            "feed_forward.gate.kernel": linear(f"{inner}.wi_0.weight"),
            "feed_forward.down.kernel": linear(f"{inner}.wo.weight"),
        }
        if side == "decoder":
            result |= _under("cross_attention", attention(f"{at}.1.EncDecAttention"))
            result |= _norm("cross_residual.norm", f"{at}.1.layer_norm")
        return result

    recipes: dict[str, Recipe] = {}
    for side in ("encoder", "decoder"):
        recipes |= _layers(
            f"{side}.stack.blocks", num_layers, lambda i, s=side: layer(s, i), scan
        )
        recipes |= _norm(f"{side}.stack.norm", f"{prefix}{side}.final_layer_norm")
        recipes[f"{side}.embedding.table.embedding"] = tensor(f"{prefix}shared.weight")
    if tied:
        recipes["decoder.stack.norm.scale"] = Recipe(
            (f"{prefix}decoder.final_layer_norm.weight",),
            lambda shape: [shape],
            lambda shape, scale: scale / np.sqrt(shape[0]).astype(scale.dtype),
        )
    recipes["decoder.head.kernel"] = linear("lm_head.weight")
    copies = [f"{prefix}{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
    cross = f"{prefix}decoder.block.0.layer.1.EncDecAttention"
    return Names(
        recipes,
        within=(prefix, "lm_head."),
        # In the published T5 1.0: trained, but not used by the model.
        apart=(f"{cross}.relative_attention_bias.weight",),
        copies=dict.fromkeys(
            [*copies, *(["lm_head.weight"] if tied else [])], f"{prefix}shared.weight"
        ),
    )


def marian(num_layers: int, *, prefix: str | None = None, scan: bool = False) -> Names:
    """Map for Marian's encoder-decoder (OPUS-MT).

    For an ``EncoderDecoder`` of ``PostNorm`` blocks with ``LayerNorm(epsilon=1e-5)``
    and ``jax.nn.silu``, whose shared ``Embedding`` has
    ``Sinusoidal(interleaved=False)`` and ``logits_bias=True``.

    Args:
        num_layers: number of blocks of the encoder, and of the decoder.
        prefix: prefix of all names but those of the logits; if not given, it is found
            from the checkpoint among ``model.`` and none.
        scan: whether the module's ``Stack`` has ``scan=True``.

    References:
        Junczys-Dowmunt et al., "Marian: Fast Neural Machine Translation in C++", 2018.
    """
    if prefix is None:
        make = functools.partial(marian, num_layers, scan=scan)
        return _prefixed(make, ("model.", ""))

    def attention(at: str) -> dict[str, Recipe]:
        return _projections(*(f"{at}.{x}_proj" for x in ("q", "k", "v", "out")))

    def layer(side: str, i: int) -> dict[str, Recipe]:
        at = f"{prefix}{side}.layers.{i}"
        result = {
            **_under("attention", attention(f"{at}.self_attn")),
            **_norm("attention_residual.norm", f"{at}.self_attn_layer_norm"),
            **_dense("feed_forward.up", f"{at}.fc1"),
            **_dense("feed_forward.down", f"{at}.fc2"),
            **_norm("feed_forward_residual.norm", f"{at}.final_layer_norm"),
        }
        if side == "decoder":
            result |= _under("cross_attention", attention(f"{at}.encoder_attn"))
            result |= _norm("cross_residual.norm", f"{at}.encoder_attn_layer_norm")
        return result

    bias = Recipe(
        ("final_logits_bias",),
        lambda shape: [(1, *shape)],
        lambda shape, array: array[0],
    )
    recipes: dict[str, Recipe] = {}
    for side in ("encoder", "decoder"):
        recipes |= _layers(
            f"{side}.stack.blocks", num_layers, lambda i, s=side: layer(s, i), scan
        )
        recipes[f"{side}.embedding.table.embedding"] = tensor(f"{prefix}shared.weight")
        recipes[f"{side}.embedding.bias"] = bias
    copies = [f"{prefix}{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
    return Names(
        recipes,
        within=(prefix, "lm_head.", "final_logits_bias"),
        # Sinusoids.
        apart=(f"{prefix}*.embed_positions.weight",),
        copies=dict.fromkeys([*copies, "lm_head.weight"], f"{prefix}shared.weight"),
    )


def _prefixed(make: Callable[..., Names], prefixes: Sequence[str]) -> Names:
    """A family's map with the first prefix; ``prefixed`` has those with the others."""
    first, *others = (make(prefix=prefix) for prefix in prefixes)
    return first._replace(prefixed=tuple(others))


def _layers(
    path: str, count: int, layer: Callable[[int], dict[str, Recipe]], scan: bool
) -> dict[str, Recipe]:
    each = [layer(i) for i in range(count)]
    if scan:
        return _under(path, {at: stacked([e[at] for e in each]) for at in each[0]})
    return {
        key: recipe
        for i, parts in enumerate(each)
        for key, recipe in _under(f"{path}.{i}", parts).items()
    }


def _under(path: str, parts: Mapping[str, Recipe]) -> dict[str, Recipe]:
    return {f"{path}.{at}": recipe for at, recipe in parts.items()}


def _projections(*names: str) -> dict[str, Recipe]:
    """Recipes of query, key, value and, if there is a fourth name, output."""
    result: dict[str, Recipe] = {}
    for path, name in zip(("query", "key", "value", "out"), names, strict=False):
        result |= _dense(path, name, inward=2 if path == "out" else 1)
    return result


def _dense(path: str, name: str, inward: int = 1) -> dict[str, Recipe]:
    return {
        f"{path}.kernel": linear(f"{name}.weight", inward),
        f"{path}.bias": flat(f"{name}.bias"),
    }


def _norm(path: str, name: str) -> dict[str, Recipe]:
    return {
        f"{path}.scale": tensor(f"{name}.weight"),
        f"{path}.bias": tensor(f"{name}.bias"),
    }
