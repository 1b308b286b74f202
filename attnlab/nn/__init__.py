"""Flax (NNX) modules, thin over the pure functions; each part is an object you pass."""

from attnlab._src.nn.anchors import AnchoredAttention as AnchoredAttention
from attnlab._src.nn.anchors import AnchorProjections as AnchorProjections
from attnlab._src.nn.angles import sinusoids as sinusoids
from attnlab._src.nn.attention import MultiHeadAttention as MultiHeadAttention
from attnlab._src.nn.beams import beam_search as beam_search
from attnlab._src.nn.blocks import Block as Block
from attnlab._src.nn.blocks import BlockState as BlockState
from attnlab._src.nn.cache import Cache as Cache
from attnlab._src.nn.cache import CachePolicy as CachePolicy
from attnlab._src.nn.cache import KeyValue as KeyValue
from attnlab._src.nn.cache import full_cache as full_cache
from attnlab._src.nn.cache import ring_cache as ring_cache
from attnlab._src.nn.cache import streaming_cache as streaming_cache
from attnlab._src.nn.choosing import restrict as restrict
from attnlab._src.nn.decoding import Decoded as Decoded
from attnlab._src.nn.decoding import greedy as greedy
from attnlab._src.nn.decoding import sample as sample
from attnlab._src.nn.drop_in import attention_fn as attention_fn
from attnlab._src.nn.embedding import Embedding as Embedding
from attnlab._src.nn.indexed import IndexedAttention as IndexedAttention
from attnlab._src.nn.indexed import IndexedKeyValue as IndexedKeyValue
from attnlab._src.nn.indexed import IndexLoss as IndexLoss
from attnlab._src.nn.layers import FeedForward as FeedForward
from attnlab._src.nn.layers import GatedFeedForward as GatedFeedForward
from attnlab._src.nn.layers import NoResidual as NoResidual
from attnlab._src.nn.layers import PostNorm as PostNorm
from attnlab._src.nn.layers import PreNorm as PreNorm
from attnlab._src.nn.layers import Residual as Residual
from attnlab._src.nn.positions import Alibi as Alibi
from attnlab._src.nn.positions import ClippedRelative as ClippedRelative
from attnlab._src.nn.positions import Learned as Learned
from attnlab._src.nn.positions import Positions as Positions
from attnlab._src.nn.positions import RelativeBias as RelativeBias
from attnlab._src.nn.positions import Rotary as Rotary
from attnlab._src.nn.positions import Sinusoidal as Sinusoidal
from attnlab._src.nn.projection import Projections as Projections
from attnlab._src.nn.recurrent.alignment import Alignment as Alignment
from attnlab._src.nn.recurrent.alignment import (
    PredictiveAlignment as PredictiveAlignment,
)
from attnlab._src.nn.recurrent.bahdanau import BahdanauDecoder as BahdanauDecoder
from attnlab._src.nn.recurrent.cells import GRU as GRU
from attnlab._src.nn.recurrent.cells import LSTM as LSTM
from attnlab._src.nn.recurrent.cells import Cell as Cell
from attnlab._src.nn.recurrent.cells import LSTMState as LSTMState
from attnlab._src.nn.recurrent.cells import StackedCells as StackedCells
from attnlab._src.nn.recurrent.decoders import AttentiveDecoder as AttentiveDecoder
from attnlab._src.nn.recurrent.decoders import PlainDecoder as PlainDecoder
from attnlab._src.nn.recurrent.decoders import RecurrentDecoder as RecurrentDecoder
from attnlab._src.nn.recurrent.decoders import RecurrentState as RecurrentState
from attnlab._src.nn.recurrent.encoder_decoder import (
    RecurrentEncoderDecoder as RecurrentEncoderDecoder,
)
from attnlab._src.nn.recurrent.language_model import (
    RecurrentLanguageModel as RecurrentLanguageModel,
)
from attnlab._src.nn.recurrent.language_model import (
    RecurrentLanguageModelState as RecurrentLanguageModelState,
)
from attnlab._src.nn.recurrent.layers import Bidirectional as Bidirectional
from attnlab._src.nn.recurrent.layers import Encoded as Encoded
from attnlab._src.nn.recurrent.layers import Recurrent as Recurrent
from attnlab._src.nn.recurrent.layers import RecurrentEncoder as RecurrentEncoder
from attnlab._src.nn.recurrent.luong import LuongDecoder as LuongDecoder
from attnlab._src.nn.recurrent.readouts import MaxoutReadout as MaxoutReadout
from attnlab._src.nn.recurrent.readouts import Readout as Readout
from attnlab._src.nn.selecting import MixtureOfBlocks as MixtureOfBlocks
from attnlab._src.nn.selecting import NativeSparseAttention as NativeSparseAttention
from attnlab._src.nn.stack import Stack as Stack
from attnlab._src.nn.standard import make_blocks as make_blocks
from attnlab._src.nn.transformer import Decoder as Decoder
from attnlab._src.nn.transformer import DecoderState as DecoderState
from attnlab._src.nn.transformer import Encoder as Encoder
from attnlab._src.nn.transformer import EncoderDecoder as EncoderDecoder
from attnlab._src.nn.transformer import MaskedLanguageModel as MaskedLanguageModel
from attnlab.nn import weights as weights

__all__ = [
    "GRU",
    "LSTM",
    "Alibi",
    "Alignment",
    "AnchorProjections",
    "AnchoredAttention",
    "AttentiveDecoder",
    "BahdanauDecoder",
    "Bidirectional",
    "Block",
    "BlockState",
    "Cache",
    "CachePolicy",
    "Cell",
    "ClippedRelative",
    "Decoded",
    "Decoder",
    "DecoderState",
    "Embedding",
    "Encoded",
    "Encoder",
    "EncoderDecoder",
    "FeedForward",
    "GatedFeedForward",
    "IndexLoss",
    "IndexedAttention",
    "IndexedKeyValue",
    "KeyValue",
    "LSTMState",
    "Learned",
    "LuongDecoder",
    "MaskedLanguageModel",
    "MaxoutReadout",
    "MixtureOfBlocks",
    "MultiHeadAttention",
    "NativeSparseAttention",
    "NoResidual",
    "PlainDecoder",
    "Positions",
    "PostNorm",
    "PreNorm",
    "PredictiveAlignment",
    "Projections",
    "Readout",
    "Recurrent",
    "RecurrentDecoder",
    "RecurrentEncoder",
    "RecurrentEncoderDecoder",
    "RecurrentLanguageModel",
    "RecurrentLanguageModelState",
    "RecurrentState",
    "RelativeBias",
    "Residual",
    "Rotary",
    "Sinusoidal",
    "Stack",
    "StackedCells",
    "attention_fn",
    "beam_search",
    "full_cache",
    "greedy",
    "make_blocks",
    "restrict",
    "ring_cache",
    "sample",
    "sinusoids",
    "streaming_cache",
    "weights",
]
