"""Loading weights: where tensors go, and errors, which leave modules unchanged."""

import functools
import json
import os
import pickle
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from attnlab import masks, modifiers, nn
from attnlab.nn import weights

FEATURES, HEADS, HIDDEN, LAYERS, VOCABULARY, LENGTH = 8, 2, 12, 2, 11, 5


def encoder(scan=False, **options):
    """An encoder like BERT."""
    rngs = nnx.Rngs(0)
    embedding = nn.Embedding(
        VOCABULARY,
        FEATURES,
        position=nn.Learned(LENGTH, FEATURES, rngs=rngs),
        norm=nnx.LayerNorm(FEATURES, rngs=rngs),
        rngs=rngs,
    )
    blocks = nn.make_blocks(
        LAYERS,
        features=FEATURES,
        num_heads=HEADS,
        hidden_features=HIDDEN,
        rngs=rngs,
        **options,
    )
    return nn.Encoder(embedding, nn.Stack(blocks, scan=scan))


def checkpoint(prefix=""):
    """Tensors with BERT's names and shapes; no two numbers are equal."""
    shapes = {
        "embeddings.word_embeddings.weight": (VOCABULARY, FEATURES),
        "embeddings.position_embeddings.weight": (LENGTH, FEATURES),
        "embeddings.token_type_embeddings.weight": (2, FEATURES),
        "embeddings.LayerNorm.weight": (FEATURES,),
        "embeddings.LayerNorm.bias": (FEATURES,),
    }
    for i in range(LAYERS):
        at = f"encoder.layer.{i}."
        for name, outputs, inputs in (
            ("attention.self.query", FEATURES, FEATURES),
            ("attention.self.key", FEATURES, FEATURES),
            ("attention.self.value", FEATURES, FEATURES),
            ("attention.output.dense", FEATURES, FEATURES),
            ("intermediate.dense", HIDDEN, FEATURES),
            ("output.dense", FEATURES, HIDDEN),
        ):
            shapes[f"{at}{name}.weight"] = (outputs, inputs)
            shapes[f"{at}{name}.bias"] = (outputs,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{at}{name}.weight"] = shapes[f"{at}{name}.bias"] = (FEATURES,)
    count, made = 0, {}
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        numbers = np.arange(count, count + size, dtype=np.float32)
        made[prefix + name] = numbers.reshape(shape)
        count += size
    return made


def numbers(module):
    """Copies of the parameters, by path."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): np.array(v[...]) for path, v in flat}


def refused(module, source, names, error=ValueError):
    """The message of the error; the module must not change."""
    before = numbers(module)
    with pytest.raises(error) as caught:
        weights.load(module, source, names)
    after = numbers(module)
    assert before.keys() == after.keys()
    for at, array in before.items():
        np.testing.assert_array_equal(array, after[at], err_msg=at)
    return str(caught.value)


def linear(x, tensors, name):
    """Applies PyTorch's ``Linear`` with the tensors of ``name``."""
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


@pytest.mark.parametrize("scan", [False, True])
def test_each_tensor_goes_to_its_place(scan):
    module, tensors = encoder(scan), checkpoint()
    weights.load(module, tensors, weights.bert(LAYERS, scan=scan))
    x = np.random.default_rng(0).normal(size=(3, FEATURES)).astype(np.float32)
    hidden = np.random.default_rng(0).normal(size=(3, HIDDEN)).astype(np.float32)
    for i, block in enumerate(module.stack.each()):
        at = f"encoder.layer.{i}."
        for part in ("query", "key", "value"):
            heads = getattr(block.attention, part)(x)
            expected = linear(x, tensors, f"{at}attention.self.{part}")
            np.testing.assert_allclose(heads.reshape(3, -1), expected, rtol=1e-4)
        out = block.attention.out(x.reshape(3, HEADS, -1))
        expected = linear(x, tensors, f"{at}attention.output.dense")
        np.testing.assert_allclose(out, expected, rtol=1e-4)
        up = block.feed_forward.up(x)
        expected = linear(x, tensors, f"{at}intermediate.dense")
        np.testing.assert_allclose(up, expected, rtol=1e-4)
        down = block.feed_forward.down(hidden)
        expected = linear(hidden, tensors, f"{at}output.dense")
        np.testing.assert_allclose(down, expected, rtol=1e-4)
        for residual, name in (
            (block.attention_residual, "attention.output.LayerNorm"),
            (block.feed_forward_residual, "output.LayerNorm"),
        ):
            scale, bias = residual.norm.scale[...], residual.norm.bias[...]
            np.testing.assert_array_equal(scale, tensors[f"{at}{name}.weight"])
            np.testing.assert_array_equal(bias, tensors[f"{at}{name}.bias"])
    positions = tensors["embeddings.position_embeddings.weight"]
    types = tensors["embeddings.token_type_embeddings.weight"]
    np.testing.assert_array_equal(
        module.embedding.position.table[...], positions + types[0]
    )


def test_a_missing_tensor():
    tensors = checkpoint()
    del tensors["encoder.layer.1.attention.self.key.weight"]
    message = refused(encoder(), tensors, weights.bert(LAYERS))
    assert "stack.blocks.1.attention.key.kernel [8, 2, 4]: expected" in message
    assert "'encoder.layer.1.attention.self.key.weight' of shape [8, 8]" in message
    assert "found none" in message
    assert len(message.splitlines()) == 2


def test_a_wrong_prefix_is_recognised():
    names = weights.bert(LAYERS, prefix="roberta.")
    message = refused(encoder(), checkpoint("bert."), names)
    name = "embeddings.word_embeddings.weight"
    assert f"'roberta.{name}'" in message
    assert f"(is it 'bert.{name}'?)" in message


@pytest.mark.parametrize("prefix", ["", "bert.", "roberta.", "longformer."])
def test_the_prefix_is_that_of_the_checkpoint(prefix):
    module = encoder()
    weights.load(module, checkpoint(prefix), weights.bert(LAYERS))
    layer = nn.MultiHeadAttention(FEATURES, HEADS, rngs=nnx.Rngs(0))
    names = weights.bert(LAYERS).of("stack.blocks.1.attention")
    weights.load(layer, checkpoint(prefix), names)
    query = checkpoint()["encoder.layer.1.attention.self.query.weight"].T
    for found in (layer, module.stack.blocks[1].attention):
        np.testing.assert_array_equal(found.query.kernel[...].reshape(8, 8), query)


def test_what_is_ignored_is_told_once_and_by_name():
    buffers = {
        "bert.embeddings.position_ids": np.arange(LENGTH)[None],
        "bert.embeddings.token_type_ids": np.zeros((1, LENGTH), int),
        "bert.pooler.dense.weight": np.ones((8, 8)),
        "cls.predictions.bias": np.ones(3),
    }
    tensors, names = checkpoint("bert.") | buffers, weights.bert(LAYERS)
    module = encoder()
    with pytest.warns(UserWarning, match="ignored") as told:
        weights.load(module, tensors, names)
    assert [str(w.message) for w in told] == [
        f"ignored, as no parameter takes them: {', '.join(sorted(buffers))}"
    ]
    assert told[0].filename == __file__
    # If the warning is an error, the module is not changed.
    refused(encoder(), tensors, names, UserWarning)
    # Loading a part of a model does not warn of the other parts.
    layer = nn.MultiHeadAttention(FEATURES, HEADS, rngs=nnx.Rngs(0))
    weights.load(layer, tensors, names.of("stack.blocks.0.attention"))


def test_copies_are_compared_and_stand_in_for_each_other():
    def names(path):
        head = {"head.kernel": weights.linear("head.weight")}
        table = {f"{path}table.embedding": weights.tensor("table.weight")}
        return weights.Names(head | table, copies={"head.weight": "table.weight"})

    def module():
        return nn.Embedding(VOCABULARY, FEATURES, rngs=nnx.Rngs(0))

    table = np.arange(VOCABULARY * FEATURES, dtype=np.float32).reshape(VOCABULARY, -1)
    both = {"table.weight": table, "head.weight": table.copy()}
    other = both | {"head.weight": table + 1}
    for tensors in (both, {"table.weight": table}, {"head.weight": table}):
        ours = module()
        weights.load(ours, tensors, names(""))
        np.testing.assert_array_equal(ours.table.embedding[...], table)
    message = refused(module(), other, names(""))
    assert "'head.weight': expected a copy of 'table.weight'" in message
    ours = module()  # a part without the head
    weights.load(ours, other, names("embedding.").of("embedding"))
    np.testing.assert_array_equal(ours.table.embedding[...], table)


def test_copies_of_what_another_part_takes():
    names = weights.t5(1)
    norm = nnx.RMSNorm(FEATURES, rngs=nnx.Rngs(0))
    scale = np.arange(FEATURES, dtype=np.float32)
    tensors = {"encoder.final_layer_norm.weight": scale}
    tensors |= {"encoder.embed_tokens.weight": np.ones((VOCABULARY, FEATURES))}
    for part in (names.of("encoder.stack.norm"), names.of("encoder").of("stack.norm")):
        weights.load(norm, tensors, part)
        np.testing.assert_array_equal(norm.scale[...], scale)


def test_a_wrong_shape():
    tensors = checkpoint()
    name = "encoder.layer.0.output.dense.weight"
    tensors[name] = tensors[name].T
    message = refused(encoder(), tensors, weights.bert(LAYERS))
    assert "stack.blocks.0.feed_forward.down.kernel [12, 8]: expected" in message
    assert f"{name!r} of shape [8, 12], found [12, 8]" in message


def test_a_tensor_left_over():
    tensors = checkpoint() | {"encoder.layer.0.attention.self.distance": np.ones(3)}
    message = refused(encoder(), tensors, weights.bert(LAYERS))
    assert "'encoder.layer.0.attention.self.distance' [3]: no parameter" in message
    # Tensors without the prefix belong to other parts, such as a head.
    others = checkpoint("bert.") | {"cls.predictions.bias": np.ones(3)}
    with pytest.warns(UserWarning, match=r"cls\.predictions\.bias"):
        weights.load(encoder(), others, weights.bert(LAYERS, prefix="bert."))


def test_a_parameter_that_the_module_lacks():
    def attention(*args, **options):
        return nn.MultiHeadAttention(*args, use_bias=False, **options)

    module = encoder(attention=attention)
    message = refused(module, checkpoint(), weights.bert(LAYERS))
    assert (
        "tensor 'encoder.layer.0.attention.self.query.bias' [8]: no parameter takes "
        "it, and the module has no stack.blocks.0.attention.query.bias"
    ) in message


def test_a_parameter_that_the_map_lacks():
    message = refused(encoder(), checkpoint(), weights.bert(LAYERS - 1))
    assert "stack.blocks.1.attention.query.kernel [8, 2, 4]: the map says" in message
    assert "more" in message.splitlines()[-1]


def test_a_part_of_a_model():
    names = weights.bert(LAYERS).of("stack.blocks.1.attention")
    layer = nn.MultiHeadAttention(FEATURES, HEADS, rngs=nnx.Rngs(0))
    tensors = checkpoint()
    weights.load(layer, tensors, names)
    expected = tensors["encoder.layer.1.attention.self.query.weight"].T
    np.testing.assert_array_equal(layer.query.kernel[...].reshape(8, 8), expected)
    near = {"encoder.layer.1.attention.self.query_global.weight": np.ones((8, 8))}
    message = refused(layer, tensors | near, names)
    assert "the module has no anchors.query.kernel" in message
    unknown = {"encoder.layer.1.attention.self.distance": np.ones(3)}
    assert "self.distance' [3]: no parameter" in refused(
        layer, tensors | unknown, names
    )
    with pytest.raises(KeyError, match=r"stack\.blocks\.7"):
        weights.bert(LAYERS).of("stack.blocks.7")


def test_projections_of_anchors():
    own = nn.AnchorProjections(FEATURES, HEADS, 4, positions=1, rngs=nnx.Rngs(0))
    layer = nn.AnchoredAttention(
        FEATURES,
        HEADS,
        anchors=own,
        mask=masks.longformer(window=1, anchors=1),
        rngs=nnx.Rngs(0),
    )
    names = weights.bert(LAYERS).of("stack.blocks.0.attention")
    assert "anchors.query.kernel" in refused(layer, checkpoint(), names)
    rng = np.random.default_rng(0)
    at = "encoder.layer.0.attention.self."
    anchors = {
        f"{at}{x}_global.{what}": rng.normal(size=shape).astype(np.float32)
        for x in ("query", "key", "value")
        for what, shape in (("weight", (8, 8)), ("bias", (8,)))
    }
    weights.load(layer, checkpoint() | anchors, names)
    for part in ("query", "key", "value"):
        kernel = getattr(layer.anchors, part).kernel[...].reshape(8, 8)
        np.testing.assert_array_equal(kernel.T, anchors[f"{at}{part}_global.weight"])


def test_names_of_old_norms():
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): array
        for name, array in checkpoint().items()
    }
    assert old.keys() != checkpoint().keys()
    ours, other = encoder(), encoder()
    weights.load(ours, old, weights.bert(LAYERS))
    weights.load(other, checkpoint(), weights.bert(LAYERS))
    jax.tree.map(np.testing.assert_array_equal, numbers(ours), numbers(other))


def test_types_and_places_stay():
    module = nn.MultiHeadAttention(
        FEATURES, HEADS, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
    )
    place = jax.devices()[1]
    nnx.update(module, jax.device_put(nnx.state(module, nnx.Param), place))
    names = weights.bert(LAYERS).of("stack.blocks.0.attention")
    weights.load(module, checkpoint(), names)
    assert module.query.kernel[...].dtype == jnp.bfloat16
    assert module.query.kernel[...].devices() == {place}


def test_a_module_without_arrays_gets_them():
    module = nnx.eval_shape(encoder)
    weights.load(module, checkpoint(), weights.bert(LAYERS))
    other = encoder()
    weights.load(other, checkpoint(), weights.bert(LAYERS))
    jax.tree.map(np.testing.assert_array_equal, numbers(module), numbers(other))
    assert module(jnp.zeros((1, 3), int)).shape == (1, 3, FEATURES)


def masked():
    """An encoder whose masks, modifiers and generators hold arrays."""
    documents = masks.documents(np.array([0, 0, 1]))
    bias = modifiers.bias(np.eye(3, dtype=np.float32))
    attention = functools.partial(nn.MultiHeadAttention, modifiers=[bias])
    return encoder(scan=True, mask=documents, attention=attention, dropout_rate=0.5)


def test_an_empty_module_has_all_but_its_parameters():
    names = weights.bert(LAYERS, scan=True)
    with pytest.raises(ValueError, match="has no values") as caught:
        weights.load(nnx.eval_shape(masked), checkpoint(), names)
    assert "blocks.attention.mask.query_ids [2, 3]: has no" in str(caught.value)
    assert "modifiers.0.array [2, 3, 3]: has no values; make" in str(caught.value)
    module, other = weights.empty(masked), masked()
    held = nnx.state(module, nnx.Param)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(held))
    for ours in (module, other):
        weights.load(ours, checkpoint(), names)
    assert nnx.graphdef(module) == nnx.graphdef(other)
    rest = (nnx.state(m, nnx.Not(nnx.RngKey)) for m in (module, other))
    jax.tree.map(np.testing.assert_array_equal, *rest)
    tokens = jnp.zeros((1, 3), int)
    module.eval(), other.eval()
    np.testing.assert_array_equal(module(tokens), other(tokens))


def test_parts_of_fused_tensors():
    layer = nn.MultiHeadAttention(FEATURES, HEADS, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    fused = {
        "h.0.attn.c_attn.weight": rng.normal(size=(8, 24)).astype(np.float32),
        "h.0.attn.c_attn.bias": rng.normal(size=24).astype(np.float32),
        "h.0.attn.c_proj.weight": rng.normal(size=(8, 8)).astype(np.float32),
        "h.0.attn.c_proj.bias": rng.normal(size=8).astype(np.float32),
        # A buffer with the causal mask.
        "h.0.attn.bias": np.ones((1, 1, 5, 5)),
    }
    names = weights.gpt2(1).of("stack.blocks.0.attention")
    with pytest.warns(UserWarning, match=r"them: h\.0\.attn\.bias$"):
        weights.load(layer, fused, names)
    x = rng.normal(size=(3, 8)).astype(np.float32)
    whole = x @ fused["h.0.attn.c_attn.weight"] + fused["h.0.attn.c_attn.bias"]
    ours = [f(x).reshape(3, 8) for f in (layer.query, layer.key, layer.value)]
    np.testing.assert_allclose(np.concatenate(ours, -1), whole, atol=1e-5)
    # Joined along the outputs, the first axis of PyTorch's Linear.
    one = weights.part(weights.linear("qkv"), 1, 3, axis=0)
    assert list(one.shapes((8, 2, 4))) == [(24, 8)]
    array = rng.normal(size=(24, 8))
    made = one.make((8, 2, 4), array)
    np.testing.assert_array_equal(made.reshape(8, 8), array[8:16].T)
    fused["h.0.attn.c_attn.weight"] = np.ones((8, 23))
    assert "of shape [8, 24], found [8, 23]" in refused(layer, fused, names)


# Files.


@pytest.fixture
def save():
    return pytest.importorskip("safetensors.numpy").save_file


def same_as_checkpoint(source):
    ours, other = encoder(), encoder()
    weights.load(ours, source, weights.bert(LAYERS))
    weights.load(other, checkpoint(), weights.bert(LAYERS))
    jax.tree.map(np.testing.assert_array_equal, numbers(ours), numbers(other))


def test_a_file_and_its_folder(save, tmp_path):
    save(checkpoint(), tmp_path / "model.safetensors")
    same_as_checkpoint(tmp_path / "model.safetensors")
    same_as_checkpoint(tmp_path)
    same_as_checkpoint(str(tmp_path))


def test_shards(save, tmp_path):
    tensors, where = checkpoint(), {}
    for i, shard in enumerate(("a.safetensors", "b.safetensors")):
        own = {n: t for j, (n, t) in enumerate(tensors.items()) if j % 2 == i}
        save(own, tmp_path / shard)
        where |= dict.fromkeys(own, shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    same_as_checkpoint(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    message = refused(encoder(), tmp_path, weights.bert(LAYERS), FileNotFoundError)
    assert "b.safetensors" in message


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff{",
        b"[]",
        b"{}",
        b'{"weight_map": {}}',
        b'{"weight_map": ["model.safetensors"]}',
        b'{"weight_map": {"a": 3}}',
        b'{"weight_map": {"a": null}}',
        b"[" * 100_000,
    ],
    ids=range(9),
)
def test_a_damaged_index(save, content, tmp_path):
    (tmp_path / INDEX).write_bytes(content)
    message = refused(encoder(), tmp_path, weights.bert(LAYERS))
    assert message.startswith(f"{tmp_path / INDEX}: expected ")
    assert len(message) < 400


@pytest.mark.parametrize(
    "shard",
    ["../a.safetensors", "b/../../a.safetensors", "/a.safetensors", "", "..",
     "..\\a.safetensors", "C:\\a.safetensors", "C:a.safetensors"],
)  # fmt: skip
def test_shards_stay_in_their_folder(save, shard, tmp_path):
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    save(checkpoint(), tmp_path / "a.safetensors")
    if shard == "/a.safetensors":
        shard = str(tmp_path / "a.safetensors")
    where = dict.fromkeys(checkpoint(), shard)
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    message = refused(encoder(), folder, weights.bert(LAYERS))
    assert message.startswith(f"{folder / INDEX}: expected for 'embeddings.")
    assert message.endswith(f"the name of a file in this folder, got {shard!r}")


def test_links_and_folders_of_shards(save, tmp_path):
    # As in the cache of Hugging Face, where the files are links.
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    save(checkpoint(), tmp_path / "a")
    os.symlink("../../a", folder / "b" / "a.safetensors")
    where = dict.fromkeys(checkpoint(), "b/a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    same_as_checkpoint(folder)
    where["embeddings.LayerNorm.scale"] = "b/a.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    message = refused(encoder(), folder, weights.bert(LAYERS))
    assert f"{folder / 'b' / 'a.safetensors'}: expected a tensor" in message
    where["embeddings.LayerNorm.scale"] = "b.bin"
    (folder / INDEX).write_text(json.dumps({"weight_map": where}))
    message = refused(encoder(), folder, weights.bert(LAYERS))
    assert f"{folder / 'b.bin'}: expected a .safetensors file; pickles are" in message


def test_an_index_says_which_of_two_tensors_is_meant(save, tmp_path):
    tensors = checkpoint()
    save(tensors, tmp_path / "a.safetensors")
    other = {n: t + 1 for n, t in tensors.items()} | {"pooler.bias": np.ones(8)}
    save(other, tmp_path / "b.safetensors")
    where = dict.fromkeys(tensors, "a.safetensors") | {"pooler.bias": "b.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": where}))
    with pytest.warns(UserWarning, match=r"them: pooler\.bias$"):
        same_as_checkpoint(tmp_path)


@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_a_truncated_file(save, cut, tmp_path):
    file = tmp_path / "model.safetensors"
    save(checkpoint(), file)
    file.write_bytes(file.read_bytes()[:cut])
    for source in (file, tmp_path):
        message = refused(encoder(), source, weights.bert(LAYERS))
        assert message.startswith(f"{file}: expected a safetensors file; a download")


def test_foreign_files_and_sources(save, tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert f"{file}: expected a safetensors" in refused(
        encoder(), file, weights.bert(LAYERS)
    )
    # A dtype that NumPy does not have.
    save({n: t.astype(np.int8) for n, t in checkpoint().items()}, file)
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header, data = file.read_bytes()[8 : 8 + size], file.read_bytes()[8 + size :]
    header = header.replace(b'"I8"', b'"F8_E4M3"')
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    message = refused(encoder(), file, weights.bert(LAYERS))
    assert message.startswith(f"{file}: tensor 'embeddings.")
    assert "cannot be read; convert it to float32" in message
    # The file of another model.
    save({"a": np.ones(3)}, file)
    message = refused(encoder(), tmp_path, weights.bert(LAYERS))
    assert message.startswith(f"{tmp_path}: weights do not fit:\n")
    message = refused(encoder(), [("a", 1)], weights.bert(LAYERS), TypeError)
    assert "source: expected a path or arrays by name, got list" in message


def test_tensors_of_torch():
    torch = pytest.importorskip("torch")
    name = "embeddings.word_embeddings.weight"
    for kind in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        tensors = {n: torch.from_numpy(t).to(kind) for n, t in checkpoint().items()}
        tensors[name] = torch.nn.Parameter(tensors[name])
        module = encoder()
        weights.load(module, tensors, weights.bert(LAYERS))
        expected = tensors[name].detach().float().numpy()
        np.testing.assert_array_equal(module.embedding.table.embedding[...], expected)


def test_bfloat16(save, tmp_path):
    small = {n: t.astype(ml_dtypes.bfloat16) for n, t in checkpoint().items()}
    save(small, tmp_path / "model.safetensors")
    module = encoder()
    weights.load(module, tmp_path, weights.bert(LAYERS))
    found = module.embedding.table.embedding[...]
    assert found.dtype == jnp.float32
    expected = small["embeddings.word_embeddings.weight"].astype(np.float32)
    np.testing.assert_array_equal(found, expected)


class Malice:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "model.ckpt"])
def test_pickles_are_refused(name, tmp_path):
    pytest.importorskip("safetensors")
    trace = tmp_path / "trace"
    (tmp_path / name).write_bytes(pickle.dumps(Malice(str(trace))))
    for source, error in ((tmp_path / name, ValueError), (tmp_path, FileNotFoundError)):
        message = refused(encoder(), source, weights.bert(LAYERS), error)
        assert name in message
        assert "pickles are never read" in message
        assert "save_pretrained" in message
    # Renamed to .safetensors it is refused, and not unpickled either.
    disguised = tmp_path / "model.safetensors"
    (tmp_path / name).rename(disguised)
    message = refused(encoder(), disguised, weights.bert(LAYERS))
    assert f"{disguised}: expected a safetensors file" in message
    assert not trace.exists()


def test_missing_files(tmp_path):
    pytest.importorskip("safetensors")
    names = weights.bert(LAYERS)
    message = refused(encoder(), tmp_path / "no.safetensors", names, FileNotFoundError)
    assert "no.safetensors: no such file" in message
    (tmp_path / "config.json").touch()
    message = refused(encoder(), tmp_path, names, FileNotFoundError)
    assert "expected model.safetensors or" in message
    assert "found ['config.json']" in message
    assert "pickle" not in message


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    message = refused(encoder(), tmp_path, weights.bert(LAYERS), ImportError)
    assert 'pip install "attnlab[weights]"' in message
