"""Decoding: plans, confidences, decoders and the loop."""

from unmask.decoding.decode import Streamer, decode, decode_each, replay
from unmask.decoding.decoder import PRESETS, Decoder, make_decoder
from unmask.decoding.plan import Plan, ascending, uniform

__all__ = [
    "PRESETS",
    "Decoder",
    "Plan",
    "Streamer",
    "ascending",
    "decode",
    "decode_each",
    "make_decoder",
    "replay",
    "uniform",
]
