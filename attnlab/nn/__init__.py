"""Flax (NNX) modules, thin over the pure functions; each part is an object you pass."""

from attnlab.nn import weights as weights
from attnlab.nn.alignment import Alignment as Alignment
from attnlab.nn.alignment import PredictiveAlignment as PredictiveAlignment
from attnlab.nn.anchors import AnchorProjections as AnchorProjections
from attnlab.nn.angles import sinusoids as sinusoids
from attnlab.nn.attention import MultiHeadAttention as MultiHeadAttention
from attnlab.nn.bahdanau import BahdanauDecoder as BahdanauDecoder
from attnlab.nn.beams import beam_search as beam_search
from attnlab.nn.blocks import Block as Block
from attnlab.nn.blocks import BlockState as BlockState
from attnlab.nn.cache import Cache as Cache
from attnlab.nn.cache import KeyValue as KeyValue
from attnlab.nn.cache import full_cache as full_cache
from attnlab.nn.cache import ring_cache as ring_cache
from attnlab.nn.cache import streaming_cache as streaming_cache
from attnlab.nn.cells import GRU as GRU
from attnlab.nn.cells import LSTM as LSTM
from attnlab.nn.cells import Cell as Cell
from attnlab.nn.cells import LSTMState as LSTMState
from attnlab.nn.cells import StackedCells as StackedCells
from attnlab.nn.choosing import restrict as restrict
from attnlab.nn.decoding import Decoded as Decoded
from attnlab.nn.decoding import greedy as greedy
from attnlab.nn.decoding import sample as sample
from attnlab.nn.drop_in import attention_fn as attention_fn
from attnlab.nn.embedding import Embedding as Embedding
from attnlab.nn.layers import FeedForward as FeedForward
from attnlab.nn.layers import GatedFeedForward as GatedFeedForward
from attnlab.nn.layers import NoResidual as NoResidual
from attnlab.nn.layers import PostNorm as PostNorm
from attnlab.nn.layers import PreNorm as PreNorm
from attnlab.nn.layers import Residual as Residual
from attnlab.nn.luong import LuongDecoder as LuongDecoder
from attnlab.nn.positions import Alibi as Alibi
from attnlab.nn.positions import ClippedRelative as ClippedRelative
from attnlab.nn.positions import Learned as Learned
from attnlab.nn.positions import Positions as Positions
from attnlab.nn.positions import RelativeBias as RelativeBias
from attnlab.nn.positions import Rotary as Rotary
from attnlab.nn.positions import Sinusoidal as Sinusoidal
from attnlab.nn.readouts import MaxoutReadout as MaxoutReadout
from attnlab.nn.readouts import Readout as Readout
from attnlab.nn.recurrent import Bidirectional as Bidirectional
from attnlab.nn.recurrent import Encoded as Encoded
from attnlab.nn.recurrent import Recurrent as Recurrent
from attnlab.nn.recurrent import RecurrentEncoder as RecurrentEncoder
from attnlab.nn.recurrent_decoders import AttentiveDecoder as AttentiveDecoder
from attnlab.nn.recurrent_decoders import PlainDecoder as PlainDecoder
from attnlab.nn.recurrent_decoders import RecurrentDecoder as RecurrentDecoder
from attnlab.nn.recurrent_decoders import RecurrentState as RecurrentState
from attnlab.nn.recurrent_lm import RecurrentLanguageModel as RecurrentLanguageModel
from attnlab.nn.recurrent_lm import (
    RecurrentLanguageModelState as RecurrentLanguageModelState,
)
from attnlab.nn.seq2seq import RecurrentEncoderDecoder as RecurrentEncoderDecoder
from attnlab.nn.stack import Stack as Stack
from attnlab.nn.standard import make_blocks as make_blocks
from attnlab.nn.transformer import Decoder as Decoder
from attnlab.nn.transformer import DecoderState as DecoderState
from attnlab.nn.transformer import Encoder as Encoder
from attnlab.nn.transformer import EncoderDecoder as EncoderDecoder
from attnlab.nn.transformer import MaskedLanguageModel as MaskedLanguageModel

__all__ = [
    "GRU",
    "LSTM",
    "Alibi",
    "Alignment",
    "AnchorProjections",
    "AttentiveDecoder",
    "BahdanauDecoder",
    "Bidirectional",
    "Block",
    "BlockState",
    "Cache",
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
    "KeyValue",
    "LSTMState",
    "Learned",
    "LuongDecoder",
    "MaskedLanguageModel",
    "MaxoutReadout",
    "MultiHeadAttention",
    "NoResidual",
    "PlainDecoder",
    "Positions",
    "PostNorm",
    "PreNorm",
    "PredictiveAlignment",
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
