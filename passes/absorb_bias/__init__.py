"""High-bias absorption: give the part of a bias that the activation never cuts to the layers behind."""

from onnxcompress.passes.absorb_bias.absorb_bias import AbsorbBias

__all__ = ["AbsorbBias"]
