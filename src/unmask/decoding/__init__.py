"""Decoding: plans, confidences, decoders and the loop."""

from unmask.decoding.confidence import CONFIDENCES, Confidence
from unmask.decoding.decode import Streamer, decode, decode_each
from unmask.decoding.decoder import PRESETS, SCHEDULES, Decoder, make_decoder
from unmask.decoding.plan import Plan
from unmask.decoding.sampling import Candidates
from unmask.decoding.score import replay

__all__ = ["CONFIDENCES", "PRESETS", "SCHEDULES", "Candidates", "Confidence", "Decoder", "Plan", "Streamer"]
__all__ += ["decode", "decode_each", "make_decoder", "replay"]
