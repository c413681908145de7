"""Decoding: plans, confidences, decoders and the loop."""

from unmask.decoding.decode import Streamer, decode, replay
from unmask.decoding.decoder import PRESETS, Decoder, make_decoder
from unmask.decoding.plan import Plan, ascending, uniform

__all__ = ["PRESETS", "Decoder", "Plan", "Streamer", "ascending", "decode", "make_decoder", "replay", "uniform"]
