"""Modules with the weights of Hugging Face models give the same results as these.

The models are made from their config classes with random weights, and saved by
``save_pretrained``; nothing is downloaded.
"""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab import masks, modifiers, nn, scores
from attnlab.nn import weights
from tests.grid import few

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")
transformers = pytest.importorskip("transformers")

FEATURES, HEADS, HIDDEN, LAYERS, VOCABULARY = 32, 4, 48, 2, 61

# Both models, in float32, are compared with the torch model in float64. The error of
# the torch model is that of rounding in this computation (it is larger where logits are
# large, as in T5, which does not scale them). Ours rounds at other places, and may be
# ALLOWED times as large. AT_LEAST, relative to the largest number, is allowed in any
# case: torch's error may be small by chance.
ALLOWED, AT_LEAST = 4.0, 1e-6


def made(build, folder):
    """Builds and saves a model, with noise on all weights, also norms and biases."""
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # all but Marian's sinusoids
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    return model.eval()


def tokens_of(length, *, least=3):
    """Two examples, the second one padded, without special tokens."""
    rng = np.random.default_rng(length)
    tokens = rng.integers(10, VOCABULARY, (2, length))
    lengths = np.array([length, max(2 * length // 3, min(length, least))])
    return tokens, lengths, np.arange(length) < lengths[:, None]


def torched(*arrays):
    return tuple(torch.from_numpy(np.asarray(a, np.int64)) for a in arrays)


def first(model, *inputs, **named):
    """The first output of a model: hidden states or logits."""
    return model(*inputs, **named)[0]


def error(ours, model, real, *inputs, call=first, **named):
    """The largest error of real tokens over the allowed error; it must be below 1."""

    @torch.no_grad()
    def run(model):
        return call(model, *inputs, **named).double().numpy()[real]

    rounded, exact = run(model), run(copy.deepcopy(model).double())
    rounding = np.abs(rounded - exact).max()
    allowed = max(ALLOWED * rounding, AT_LEAST * np.abs(exact).max())
    return np.abs(np.asarray(ours, np.float64)[real] - exact).max() / allowed


def standard(**options):
    return dict(
        num_layers=LAYERS,
        features=FEATURES,
        num_heads=HEADS,
        hidden_features=HIDDEN,
        rngs=nnx.Rngs(0),
        **options,
    )


def feed_forward(activation, kind=nn.FeedForward, **options):
    return functools.partial(kind, activation=activation, **options)


exact_gelu = functools.partial(jax.nn.gelu, approximate=False)


# Encoders.


def bert_options(**options):
    return dict(
        vocab_size=VOCABULARY,
        hidden_size=FEATURES,
        num_attention_heads=HEADS,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
        **options,
    )


def encoder(positions, activation=exact_gelu, scan=False, **options):
    norm = functools.partial(nnx.LayerNorm, epsilon=1e-12)
    embedding = nn.Embedding(
        VOCABULARY,
        FEATURES,
        position=nn.Learned(positions, FEATURES, rngs=nnx.Rngs(0)),
        norm=norm(FEATURES, rngs=nnx.Rngs(0)),
        scale=1,
        rngs=nnx.Rngs(0),
    )
    options = standard(norm=norm, feed_forward=feed_forward(activation), **options)
    blocks = nn.make_blocks(options.pop("num_layers"), **options)
    return nn.Encoder(embedding, nn.Stack(blocks, scan=scan))


def unpooled(kind, config):
    """A model without pooling layer, which attnlab does not have."""
    return kind(config, add_pooling_layer=False)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(**bert_options(max_position_embeddings=40))
    return made(lambda: unpooled(transformers.BertModel, config), folder), folder


@pytest.mark.parametrize(
    ("length", "scan"),
    few([(3, False), (3, True), (40, False), (40, True)], (40, True)),
)
def test_bert(bert, length, scan):
    model, folder = bert
    ours = encoder(40, scan=scan)
    weights.load(ours, folder, weights.bert(LAYERS, scan=scan))
    tokens, lengths, real = tokens_of(length)
    result = ours(tokens, mask=masks.lengths(key=lengths))
    assert error(result, model, real, *torched(tokens, real)) < 1


def test_one_attention_layer(bert):
    model, folder = bert
    ours = nn.MultiHeadAttention(FEATURES, HEADS, rngs=nnx.Rngs(0))
    weights.load(ours, folder, weights.bert(LAYERS).of("stack.blocks.1.attention"))
    x = np.random.default_rng(0).normal(size=(2, 9, FEATURES)).astype(np.float32)

    def call(layer, x):
        x = x.to(layer.output.dense.weight.dtype)
        return layer.output.dense(layer.self(x)[0])

    layer, real = model.encoder.layer[1].attention, np.ones((2, 9), bool)
    assert error(ours(x), layer, real, torch.from_numpy(x), call=call) < 1


BLOCK, DRAWN = 4, 2  # BigBird's block size, and its random blocks for each row


@pytest.fixture(scope="module")
def big_bird(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big_bird")
    options = bert_options(max_position_embeddings=96, hidden_act="gelu_new")
    options |= dict(block_size=BLOCK, num_random_blocks=DRAWN)
    config = transformers.BigBirdConfig(attention_type="block_sparse", **options)
    return made(lambda: unpooled(transformers.BigBirdModel, config), folder), folder


def block_mask(count, drawn):
    """BigBird's mask: first and last block, neighbours, drawn blocks of each head."""
    heads = drawn.shape[0]
    window = np.arange(count)[:, None] + np.arange(-1, 2)
    window[(window < 0) | (window >= count)] = -1
    rows = np.concatenate([np.broadcast_to(window, (heads, count, 3)), drawn], -1)
    ends = [*range(BLOCK), *range((count - 1) * BLOCK, count * BLOCK)]
    return masks.anchor(ends) | masks.blocks(rows, BLOCK)


def big_bird_like(folder, **options):
    ours = encoder(96, functools.partial(jax.nn.gelu, approximate=True), **options)
    weights.load(ours, folder, weights.bert(LAYERS))
    return ours


def recorded(model, monkeypatch):
    """What layers will draw, one after another, once they have drawn it."""
    kind = type(model.encoder.layer[0].attention.self)
    name, drawn = "_bigbird_block_rand_mask_with_head", []
    draw = getattr(kind, name)

    def record(self, *args, **options):
        result = draw(self, *args, **options)
        drawn.append(np.stack(result))
        return result

    monkeypatch.setattr(kind, name, record)
    return drawn


# 37 is the least length with a sparse mask; 61 is padded to whole blocks.
@pytest.mark.parametrize("length", few([37, 61, 96], 61))
def test_big_bird_draws_blocks_for_each_layer_and_head(big_bird, length, monkeypatch):
    model, folder = big_bird
    tokens, lengths, real = tokens_of(length)
    drawn = recorded(model, monkeypatch)
    training = copy.deepcopy(model).train()  # draws only when training
    inputs = torched(tokens, real)
    with torch.no_grad():
        training(*inputs)
    count = -(-length // BLOCK)
    # The first and last rows see all keys, and have no drawn blocks.
    layouts = [np.pad(d, ((0, 0), (1, 1), (0, 0)), constant_values=-1) for d in drawn]
    assert [layout.shape for layout in layouts] == LAYERS * [(HEADS, count, DRAWN)]
    assert any((layouts[0][0] != layouts[0][h]).any() for h in range(HEADS))
    mask = masks.lengths(key=lengths)
    ours = big_bird_like(folder, mask=[block_mask(count, d) for d in layouts])
    assert error(ours(tokens, mask=mask), training, real, *inputs) < 1
    none = [block_mask(count, np.full_like(d, -1)) for d in layouts]
    without = big_bird_like(folder, mask=none)
    assert error(without(tokens, mask=mask), training, real, *inputs) > 100


@pytest.mark.parametrize("length", [61])
def test_big_bird_in_evaluation_counts_the_first_block_several_times(big_bird, length):
    model, folder = big_bird
    tokens, lengths, real = tokens_of(length)
    count = -(-length // BLOCK)
    block = np.arange(length) // BLOCK
    inner = (block > 0) & (block < count - 1)
    again = np.where(inner[:, None] & (block == 0), np.log(1.0 + DRAWN), 0.0)
    attention = functools.partial(
        nn.MultiHeadAttention, modifiers=[modifiers.bias(again.astype(np.float32))]
    )
    mask = block_mask(count, np.full((HEADS, count, 1), -1))
    ours = big_bird_like(folder, mask=mask, attention=attention)
    result = ours(tokens, mask=masks.lengths(key=lengths))
    assert error(result, model, real, *torched(tokens, real)) < 1


def test_big_bird_is_dense_where_it_is_short(tmp_path):
    options = bert_options(max_position_embeddings=96, hidden_act="gelu_new")
    options |= dict(block_size=BLOCK, num_random_blocks=DRAWN)
    config = transformers.BigBirdConfig(**options)
    model = made(lambda: unpooled(transformers.BigBirdModel, config), tmp_path)
    tokens, lengths, real = tokens_of(3)
    ours = big_bird_like(tmp_path)
    result = ours(tokens, mask=masks.lengths(key=lengths))
    assert error(result, model, real, *torched(tokens, real)) < 1


WINDOWS, FIRST = [4, 8], 2  # by layer; the row of Longformer's first position


@pytest.fixture(scope="module")
def longformer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("longformer")
    options = bert_options(max_position_embeddings=64 + FIRST, layer_norm_eps=1e-12)
    config = transformers.LongformerConfig(
        attention_window=WINDOWS, pad_token_id=FIRST - 1, **options
    )
    return made(lambda: unpooled(transformers.LongformerModel, config), folder), folder


def longformer_like(folder, slots, windows=WINDOWS):
    def attention(features, heads, *, rngs, **options):
        size = features // heads
        own = nn.AnchorProjections(features, heads, size, positions=slots, rngs=rngs)
        return nn.AnchoredAttention(features, heads, anchors=own, rngs=rngs, **options)

    seen = [masks.longformer(window=w // 2, anchors=slots) for w in windows]
    ours = encoder(64, mask=seen, attention=attention)
    weights.load(ours, folder, weights.bert(LAYERS, first_position=FIRST))
    return ours


@pytest.mark.parametrize(
    ("length", "slots"),
    few([(3, [0]), (7, [0, 2]), (32, [0, 3]), (61, [0, 1, 20, 50])], (32, [0, 3])),
)
def test_longformer(longformer, length, slots):
    model, folder = longformer
    tokens, lengths, real = tokens_of(length)
    anchors = np.isin(np.arange(length), slots) & np.ones((2, 1), bool)
    their_tokens, attended, anchored = torched(tokens, real, anchors)
    their_tokens = torch.where(attended > 0, their_tokens, FIRST - 1)
    inputs = (model, real, their_tokens, attended, anchored)
    mask = masks.lengths(key=lengths)
    ours = longformer_like(folder, slots)(tokens, mask=mask)
    assert error(ours, *inputs) < 1
    if length > max(WINDOWS):
        wider = longformer_like(folder, slots, [w + 2 for w in WINDOWS])
        assert error(wider(tokens, mask=mask), *inputs) > 100


# Decoders.


def decoder(embedding, *, head=None, **options):
    options = standard(residual=nn.PreNorm, **options)
    last = options["norm"](FEATURES, rngs=nnx.Rngs(0))
    options = {"mask": masks.causal()} | options
    blocks = nn.make_blocks(options.pop("num_layers"), **options)
    return nn.Decoder(embedding, nn.Stack(blocks, norm=last), head)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=FEATURES,
        n_head=HEADS,
        n_inner=HIDDEN,
        n_layer=LAYERS,
        n_positions=40,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="eager",
    )
    return made(lambda: transformers.GPT2LMHeadModel(config), folder), folder


def gpt2_like(folder):
    position = nn.Learned(40, FEATURES, rngs=nnx.Rngs(0))
    ours = decoder(
        nn.Embedding(
            VOCABULARY, FEATURES, position=position, scale=1, rngs=nnx.Rngs(0)
        ),
        norm=functools.partial(nnx.LayerNorm, epsilon=1e-5),
        feed_forward=feed_forward(functools.partial(jax.nn.gelu, approximate=True)),
    )
    weights.load(ours, folder, weights.gpt2(LAYERS))
    return ours


@pytest.mark.parametrize("length", few([3, 40], 40))
def test_gpt2(gpt2, length):
    model, folder = gpt2
    tokens, lengths, real = tokens_of(length)
    ids, attended = torched(tokens, real)
    ours = gpt2_like(folder)(tokens, mask=masks.lengths(key=lengths))
    assert error(ours, model, real, ids, attention_mask=attended) < 1


WINDOW = 8  # Mistral's window, the query's own position included


@pytest.fixture(scope="module", params=[False, True], ids=["head", "tied"])
def mistral(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    config = transformers.MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=FEATURES,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=12,
        sliding_window=WINDOW,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=request.param,
        attn_implementation="eager",
    )
    config.rope_parameters["rope_theta"] = 1000.0
    return made(lambda: transformers.MistralForCausalLM(config), folder), folder


def mistral_like(folder, config, window=WINDOW):
    head = nnx.Linear(FEATURES, VOCABULARY, use_bias=False, rngs=nnx.Rngs(0))
    ours = decoder(
        nn.Embedding(VOCABULARY, FEATURES, scale=1, rngs=nnx.Rngs(0)),
        head=None if config.tie_word_embeddings else head,
        num_key_heads=2,
        mask=masks.sliding_window(window - 1, 0),
        position=lambda: nn.Rotary(base=1000.0),
        norm=functools.partial(nnx.RMSNorm, epsilon=1e-5),
        attention=functools.partial(
            nn.MultiHeadAttention, head_size=12, use_bias=False
        ),
        feed_forward=feed_forward(jax.nn.silu, nn.GatedFeedForward, use_bias=False),
    )
    weights.load(ours, folder, weights.mistral(LAYERS))
    return ours


@pytest.mark.parametrize("length", few([5, WINDOW, 40], 40))
def test_mistral(mistral, length):
    model, folder = mistral
    # Torch returns NaN for a query whose window holds only padding.
    tokens, lengths, real = tokens_of(length, least=length - 5)
    ids, attended = torched(tokens, real)
    mask = masks.lengths(key=lengths)
    ours = mistral_like(folder, model.config)(tokens, mask=mask)
    assert error(ours, model, real, ids, attention_mask=attended) < 1
    if length > WINDOW:
        wider = mistral_like(folder, model.config, WINDOW + 1)(tokens, mask=mask)
        assert error(wider, model, real, ids, attention_mask=attended) > 100


# Encoder and decoder.

BUCKETS, FARTHEST = 8, 20  # T5's buckets of offsets


@pytest.fixture(scope="module", params=["1.0", "1.1"])
def t5(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    new = request.param == "1.1"
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=FEATURES,
        d_kv=12,
        d_ff=HIDDEN,
        num_layers=LAYERS,
        num_heads=HEADS,
        relative_attention_num_buckets=BUCKETS,
        relative_attention_max_distance=FARTHEST,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu" if new else "relu",
        tie_word_embeddings=not new,
        attn_implementation="eager",
    )

    def build():
        model = transformers.T5ForConditionalGeneration(config)
        if new:
            # tie_word_embeddings=False only means that logits are not divided; the
            # class still ties the weights, which T5 1.1 does not.
            model.lm_head = torch.nn.Linear(FEATURES, VOCABULARY, bias=False)
        return model

    return made(build, folder), folder, new


def t5_like(folder, new):
    embedding = nn.Embedding(VOCABULARY, FEATURES, scale=1, rngs=nnx.Rngs(0))
    head = nnx.Linear(FEATURES, VOCABULARY, use_bias=False, rngs=nnx.Rngs(0))
    activation, kind = (
        (functools.partial(jax.nn.gelu, approximate=True), nn.GatedFeedForward)
        if new
        else (jax.nn.relu, nn.FeedForward)
    )

    def side(bidirectional):
        # One bias for all layers.
        bias = nn.RelativeBias(
            HEADS,
            buckets=BUCKETS,
            max_distance=FARTHEST,
            bidirectional=bidirectional,
            rngs=nnx.Rngs(0),
        )
        return decoder(
            embedding,
            head=head if new and not bidirectional else None,
            position=lambda: bias,
            mask=masks.full() if bidirectional else masks.causal(),
            cross_attention=not bidirectional,
            norm=functools.partial(nnx.RMSNorm, epsilon=1e-6),
            attention=functools.partial(
                nn.MultiHeadAttention,
                score=scores.dot(),
                head_size=12,
                use_bias=False,
            ),
            feed_forward=feed_forward(activation, kind, use_bias=False),
        )

    ours = nn.EncoderDecoder(nn.Encoder(embedding, side(True).stack), side(False))
    weights.load(ours, folder, weights.t5(LAYERS, tied=not new, gated=new))
    return ours


def translation_error(ours, model, source, target):
    """``error`` of an encoder-decoder's logits, for given source and target lengths."""
    tokens, lengths, real = tokens_of(source)
    targets, target_lengths, target_real = tokens_of(target)
    logits = ours(
        jnp.asarray(tokens),
        jnp.asarray(targets),
        source_mask=masks.lengths(key=lengths),
        target_mask=masks.lengths(key=target_lengths),
        memory_mask=masks.lengths(key=lengths),
    )
    ids, attended, target_ids, target_attended = torched(
        tokens, real, targets, target_real
    )
    inputs = dict(input_ids=ids, attention_mask=attended)
    inputs |= dict(decoder_input_ids=target_ids, decoder_attention_mask=target_attended)
    return error(logits, model, target_real, **inputs)


@pytest.mark.parametrize(("source", "target"), few([(3, 5), (50, 40)], (50, 40)))
def test_t5(t5, source, target):
    model, folder, new = t5
    assert translation_error(t5_like(folder, new), model, source, target) < 1


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    folder = tmp_path_factory.mktemp("marian")
    config = transformers.MarianConfig(
        vocab_size=VOCABULARY,
        d_model=FEATURES,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=HIDDEN,
        decoder_ffn_dim=HIDDEN,
        activation_function="swish",
        scale_embedding=True,
        dropout=0.0,
        max_position_embeddings=64,
        pad_token_id=0,
        decoder_start_token_id=0,
        attn_implementation="eager",
    )

    def build():
        model = transformers.MarianMTModel(config)
        model.final_logits_bias.normal_()
        return model

    return made(build, folder), folder


def marian_like(source, scan=False, logits_bias=True):
    embedding = nn.Embedding(
        VOCABULARY,
        FEATURES,
        position=nn.Sinusoidal(interleaved=False),
        logits_bias=logits_bias,
        rngs=nnx.Rngs(0),
    )
    options = standard(
        embedding=embedding,
        norm=functools.partial(nnx.LayerNorm, epsilon=1e-5),
        feed_forward=feed_forward(jax.nn.silu),
        scan=scan,
    )
    ours = nn.EncoderDecoder(
        nn.Encoder.standard(VOCABULARY, **options),
        nn.Decoder.standard(VOCABULARY, cross_attention=True, **options),
    )
    weights.load(ours, source, weights.marian(LAYERS, scan=scan))
    return ours


@pytest.mark.parametrize(
    ("source", "target", "scan"),
    few([(3, 5, False), (3, 5, True), (50, 40, False), (50, 40, True)], (50, 40, True)),
)
def test_marian(marian, source, target, scan):
    model, folder = marian
    ours = marian_like(folder, scan)
    assert translation_error(ours, model, source, target) < 1


# Further tensors of published checkpoints, and their formats.


def same(ours, other):
    jax.tree.map(
        np.testing.assert_array_equal,
        *(nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (ours, other)),
    )


def telling(make, *args, ignored):
    """What ``make`` returns; it must warn once, with the names in ``ignored``."""
    with pytest.warns(UserWarning, match="ignored") as told:
        made = make(*args)
    (warning,) = told
    assert str(warning.message).split(": ")[1].split(", ") == sorted(ignored)
    return made


def without(tensors, *names):
    return {name: t for name, t in tensors.items() if name not in names}


def shortened(tensors, prefix):
    return {name.removeprefix(prefix): t for name, t in tensors.items()}


def buffers(prefix, length):
    """Buffers of embeddings, which older versions of transformers saved."""
    ids = torch.arange(length)[None]
    at = f"{prefix}embeddings."
    return {f"{at}position_ids": ids, f"{at}token_type_ids": torch.zeros_like(ids)}


def test_bert_with_heads(bert):
    config = transformers.BertConfig(**bert_options(max_position_embeddings=40))
    model = transformers.BertForPreTraining(config)
    model.bert.load_state_dict(bert[0].state_dict(), strict=False)
    # All parameters, also those that the head shares with the embeddings.
    tensors = dict(model.named_parameters(remove_duplicate=False))
    ours, other = encoder(40), encoder(40)
    weights.load(ours, bert[1], weights.bert(LAYERS))
    besides = {n for n in tensors if n.startswith(("cls.", "bert.pooler."))}
    assert len(besides) == 11
    more = buffers("bert.", 40)
    args = (other, tensors | more, weights.bert(LAYERS))
    telling(weights.load, *args, ignored=besides | more.keys())
    same(ours, other)


def test_bert_in_bfloat16(bert):
    tensors = copy.deepcopy(bert[0]).bfloat16().state_dict()
    ours = encoder(40)
    weights.load(ours, tensors, weights.bert(LAYERS))
    table = tensors["embeddings.word_embeddings.weight"]
    assert table.dtype == torch.bfloat16
    found = ours.embedding.table.embedding[...]
    np.testing.assert_array_equal(found, table.float().numpy())


def test_longformer_with_its_pooler_and_buffers(longformer):
    _, folder = longformer
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.LongformerForMaskedLM(config)
    model.longformer.load_state_dict(longformer[0].state_dict())
    more = buffers("longformer.", 66)
    tensors = dict(model.state_dict()) | more
    heads = {name for name in tensors if name.startswith("lm_head.")}
    made = telling(longformer_like, tensors, [0], ignored=heads | more.keys())
    same(made, longformer_like(folder, [0]))


def test_big_bird_with_its_pooler(big_bird):
    _, folder = big_bird
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.BigBirdModel(config)
    model.load_state_dict(big_bird[0].state_dict(), strict=False)
    tensors, more = dict(model.state_dict()), buffers("", 96)
    ignored = {"pooler.weight", "pooler.bias", *more}
    made = telling(big_bird_like, tensors | more, ignored=ignored)
    same(made, big_bird_like(folder))


TIED = "lm_head.weight"


def test_gpt2_with_and_without_its_head(gpt2):
    model, folder = gpt2
    ours, tensors = gpt2_like(folder), dict(model.state_dict())
    assert TIED in tensors
    table = "transformer.wte.weight"
    shorter = without(shortened(tensors, "transformer."), TIED)
    for written in (tensors, without(tensors, TIED), without(tensors, table), shorter):
        same(ours, gpt2_like(written))
    causal = torch.ones(1, 1, 40, 40).tril()
    more = {f"h.{i}.attn.bias": causal for i in range(LAYERS)}
    more |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(LAYERS)}
    same(ours, telling(gpt2_like, shorter | more, ignored=more))
    with pytest.raises(ValueError, match="copy of 'transformer.wte.weight'"):
        gpt2_like(tensors | {TIED: tensors[TIED] + 1})


def test_mistral_with_and_without_its_head(mistral):
    model, folder = mistral
    ours, tensors = mistral_like(folder, model.config), dict(model.state_dict())
    shorter = shortened(tensors, "model.")
    spellings = [tensors, shorter]
    if tied := model.config.tie_word_embeddings:
        spellings += [without(s, TIED) for s in spellings]
        spellings += [without(tensors, "model.embed_tokens.weight")]
    for written in spellings:
        same(ours, mistral_like(written, model.config))
    frequencies = ["model.rotary_emb.inv_freq"]
    frequencies += [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in (0, 1)]
    more = dict.fromkeys(frequencies, torch.ones(6))
    same(ours, telling(mistral_like, tensors | more, model.config, ignored=more))
    other = tensors | {TIED: tensors[TIED] + 1}
    if tied:
        with pytest.raises(ValueError, match="copy of 'model.embed_tokens.weight'"):
            mistral_like(other, model.config)
    else:
        mistral_like(other, model.config)
        with pytest.raises(ValueError, match="'model.embed_tokens.weight' of shape"):
            mistral_like(without(tensors, "model.embed_tokens.weight"), model.config)


def test_t5_as_published(t5):
    model, folder, new = t5
    ours, tensors = t5_like(folder, new), dict(model.state_dict())
    copies = [f"{side}.embed_tokens.weight" for side in ("encoder", "decoder")]
    assert {*copies, TIED, "shared.weight"} <= tensors.keys()
    longer = {f"transformer.{name}": t for name, t in tensors.items()}
    longer[TIED] = longer.pop(f"transformer.{TIED}")
    spellings = [tensors, without(tensors, *copies), longer]
    spellings += [without(tensors, "shared.weight", copies[1])]
    if not new:
        spellings += [
            without(tensors, TIED),
            without(tensors, "shared.weight", *copies),
        ]
    for written in spellings:
        same(ours, t5_like(written, new))
    # transformers ignores it, too: no layer uses this trained tensor.
    unread = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    assert unread in model._keys_to_ignore_on_load_unexpected
    tensors[unread] = torch.ones(BUCKETS, HEADS)
    same(ours, telling(t5_like, tensors, new, ignored=[unread]))
    names = weights.t5(LAYERS, tied=not new, gated=new)
    alone = copy.deepcopy(ours.encoder)
    telling(weights.load, alone, tensors, names.of("encoder"), ignored=[unread])
    same(ours.encoder, alone)
    for name in copies if new else [*copies, TIED]:
        with pytest.raises(ValueError, match=f"'{name}': expected a copy of 'shared"):
            t5_like(tensors | {name: tensors[name] + 1}, new)


def test_marian_as_published(marian):
    model, folder = marian
    ours, tensors = marian_like(folder), dict(model.state_dict())
    sinusoids = {n for n in tensors if n.endswith("embed_positions.weight")}
    assert len(sinusoids) == 2
    same(ours, telling(marian_like, tensors, ignored=sinusoids))
    table = "model.shared.weight"
    copies = {n for n in tensors if n.endswith(("embed_tokens.weight", TIED))}
    assert len(copies) == 3
    rest = without(tensors, *sinusoids)
    for written in (without(rest, *copies), without(rest, table)):
        same(ours, marian_like(written))
    for name in copies:
        with pytest.raises(ValueError, match=f"copy of '{table}'"):
            marian_like(rest | {name: rest[name] + 1})
    bare = without(shortened(rest, "model."), TIED, "final_logits_bias")
    bare = marian_like(bare, logits_bias=False)
    same(ours.encoder.stack, bare.encoder.stack)
